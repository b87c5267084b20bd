"""Sharding of whole batches, and data loaders that deal samples to CP groups."""
