"""Towers of multimodal models: each rank encodes some of the images, videos or sounds, and sends features on."""
