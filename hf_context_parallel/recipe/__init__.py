"""Training by a recipe: its schema, the model and the documents that it names, the run and its report."""
