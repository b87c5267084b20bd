"""Attention and mask functions that Transformers calls, and the stock functions outside of a batch."""
