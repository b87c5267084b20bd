"""A tiny model of every type against itself."""
