"""The kernels, one file a backend, and the choice among them."""
