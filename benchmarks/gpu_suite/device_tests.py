"""Tests of the repository that need a CUDA device, by pytest where it is there."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TESTS = ("tests/attention/test_cuda.py", "tests/integration/test_cuda.py")
NEEDED = ("pytest", "hypothesis")


def run(options: Namespace) -> Iterator[dict[str, Any]]:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing or options.device == "cpu":
        yield {"what": f"{' and '.join(TESTS)} not run", "missing": missing or "a CUDA device"}
        return
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout, done.stderr)  # to the log
    last = done.stdout.strip().splitlines()[-1:]
    yield {"what": " and ".join(TESTS), "right": done.returncode == 0, "pytest": last[0] if last else ""}
