"""Towers of multimodal models: each rank encodes some of the images, videos or sounds, and gathers all features."""
