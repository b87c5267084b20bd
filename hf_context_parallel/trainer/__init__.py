"""Transformers' Trainer over sharded sequences."""
