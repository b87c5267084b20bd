"""What context parallelism costs, measured. Each module is a command: `python -m benchmarks.attention --help`."""
