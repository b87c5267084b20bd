"""Mixers: modules that mix tokens otherwise than by the attention interface."""
