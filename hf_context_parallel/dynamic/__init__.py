"""Dynamic context parallelism: samples of a global batch dealt to groups of different sizes."""
