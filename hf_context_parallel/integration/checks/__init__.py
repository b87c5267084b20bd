"""Checks that refuse a model, inputs or weights that would not be exact on shards."""
