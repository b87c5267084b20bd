"""Integration with Transformers: models that run on shards."""
