"""Check of every model type by a tiny model of it, on shards against one process."""
