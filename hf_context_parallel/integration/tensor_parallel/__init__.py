"""Context parallelism combined with the tensor parallelism of Transformers."""
