"""What of a model, its inputs and its weights is refused on shards."""
