"""Attention of the ranks of a group: strategies, the kernels that compute tiles, and what joins them."""
