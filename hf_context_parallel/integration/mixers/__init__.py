"""Mixers: modules that mix tokens by other means than the attention interface."""
