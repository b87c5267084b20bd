"""Transformers' models on shards."""
