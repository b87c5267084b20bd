"""Tensor parallelism as Transformers applies it, beside context parallelism."""
