"""Layer-by-layer comparison of a model on shards with the same model on whole sequences."""
