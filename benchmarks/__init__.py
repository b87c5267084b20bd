"""Measurements of the cost of context parallelism.

Each module is a command: `python -m benchmarks.attention --help`.
"""
