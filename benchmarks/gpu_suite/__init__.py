"""Checks and measurements that need a GPU, in one command of at most eight minutes: `python -m benchmarks.gpu_suite`.

Each item is a module whose `run(options)` yields results. An item runs in a process of its own with a time limit. Its
results are written as they come. So a crash or a hang loses only one item. Beside this repository it needs torch,
Transformers and accelerate.
"""
