"""A model against itself, layer by layer."""
