"""Comparison of models on shards with the same models on whole sequences."""
