"""Everything that only a GPU can show, in one command of about five minutes: `python -m benchmarks.gpu_suite`.

Each item is a module whose `run(options)` yields results. An item runs in a process of its own with a time limit, and
its results are written as they come, so that a crash or a hang costs one item and no more.
"""
