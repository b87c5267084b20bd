"""Models compared with themselves: on shards and whole."""
