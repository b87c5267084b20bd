"""Plans of a run before it starts: the meshes of some GPUs, what each rank holds, and how fast it trains."""
