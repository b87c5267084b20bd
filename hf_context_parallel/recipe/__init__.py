"""Training by a recipe: its schema, its model and documents, the launch of a run, and the report."""
