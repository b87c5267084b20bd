"""The attention and mask functions that Transformers calls, and what its own would do."""
