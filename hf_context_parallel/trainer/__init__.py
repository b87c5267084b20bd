"""Context parallelism for the Trainer of Transformers."""
