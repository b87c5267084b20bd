"""Attention over the ranks of a group: strategies, kernels that compute tiles, and the merging of their outputs."""
