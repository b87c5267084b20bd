"""Kernels, one file for each backend, and their registry."""
