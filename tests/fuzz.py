"""Runner of the property tests with new random examples, round after round, for some minutes.

    python -m tests.fuzz --minutes 10

The tests are those of plans, layouts, masks, strategies, schedules, batches and recipes that `pytest` runs with the
same examples each time. The first failure ends the run, and is printed with the example and the seed that finds it
again: `FUZZ=1 pytest TEST --hypothesis-seed=SEED`.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time

from tqdm import tqdm

PLACES = ("planning", "attention", "dynamic", "data", "distributed", "integration", "recipe")
SELECTED = "hypothesis and not exhaustive and not distributed and not cuda"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    options = parser.parse_args(arguments)
    end = time.monotonic() + 60 * options.minutes
    rounds = 0
    with tqdm(total=round(60 * options.minutes), unit="s", desc="fuzz") as progress:
        while time.monotonic() < end:
            seed = random.randrange(2**32)
            places = [f"tests/{place}" for place in PLACES]
            command = [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-x",
                "-m",
                SELECTED,
                f"--hypothesis-seed={seed}",
                *places,
            ]
            run = subprocess.run(command, env={**os.environ, "FUZZ": "1"}, capture_output=True, text=True)
            if run.returncode:
                print(run.stdout[-8000:], run.stderr[-2000:], f"seed {seed}", sep="\n")
                return 1
            rounds += 1
            progress.set_postfix_str(run.stdout.strip().splitlines()[-1])
            progress.update(min(progress.total, round(progress.total - (end - time.monotonic()))) - progress.n)
    print(f"{rounds} rounds in {options.minutes:g} minutes found nothing.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
