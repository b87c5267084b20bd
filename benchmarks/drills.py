"""Drills: runs that are killed at random moments, and resume to the same bits as a run that nobody killed.

    python -m benchmarks.drills                        # 20 kills in each phase on each layout, and fewer of others
    python -m benchmarks.drills --kills 2 --others 1

A run trains a tiny Llama for ten steps with Adam, and saves a checkpoint every second step. All its ranks are killed
(SIGKILL) at a random moment of a phase, it is started again, goes on from its newest whole checkpoint, and is killed
again, until it is near its end. The last start ends it. After each step of each start the checksum of all weights
is compared with that of the run that nobody killed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hf_context_parallel.trainer.checkpoints import SAVING, WHOLE, checkpoints_of, flaw_of

from . import report
from .drill_ranks import LAST_KILL, PHASES, STEPS, run

LAYOUTS = {"CP 2": 2, "DP 2 x CP 2": 4}
PATIENCE = 180.0
"""Seconds after which ranks that have not ended have failed."""


@dataclass
class Result:
    """Result of the drills of a kind of run in one phase.

    Args:
        kills: runs that were killed.
        same: kills after which the weights of every step, up to the last, were those of the run that nobody killed.
        left: what kills left behind in the folder of the run.
    """

    kills: int = 0
    same: int = 0
    left: Counter = field(default_factory=Counter)


class Drill:
    """Drills of one kind of run.

    Args:
        ranks: processes of the run.
        family: the way to hold the weights, one of `drill_ranks.FAMILY`.
    """

    _launches = itertools.count()

    def __init__(self, ranks: int, family: str):
        self._ranks, self._family = ranks, family
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([run.__module__])
        with tempfile.TemporaryDirectory() as folder:
            store = self._launch(Path(folder), None)
            self._measured = json.loads(Path(f"{store}.measured").read_text())
            self._expected = dict(weights_of(Path(folder)))
        assert set(self._expected) == set(range(1, STEPS + 1))

    def run(self, phase: str, kills: int, seed: int, progress: tqdm) -> Result:
        """Kill runs in a phase until there were so many kills."""
        result = Result()
        while result.kills < kills:
            with tempfile.TemporaryDirectory() as name:
                folder, begun = Path(name), result.kills
                try:
                    found = self._resumed(folder, phase, kills, seed, result, progress)
                except RuntimeError as error:
                    progress.write(str(error))
                    result.kills += 1
                    continue
                if found[-1][0] == STEPS and all(self._expected.get(step) == bits for step, bits in found):
                    result.same += result.kills - begun
                else:
                    wrong = [step for step, bits in found if self._expected.get(step) != bits]
                    progress.write(f"{self._family}, {phase}, seed {seed}: other weights after steps {wrong}")
        return result

    def _resumed(
        self, folder: Path, phase: str, kills: int, seed: int, result: Result, progress: tqdm
    ) -> list[tuple[int, str]]:
        """Kill and resume a run until it is near its end, and let it end. Return what `weights_of` reads."""
        while result.kills < kills and last_whole(folder) < LAST_KILL:
            store = self._launch(folder, (phase, seed + result.kills, self._measured))
            if not Path(f"{store}.killed").exists():
                break  # the moment did not come before the end
            result.kills += 1
            result.left[left_in(folder)] += 1
            progress.update()
        self._launch(folder, None)
        return weights_of(folder)

    def _launch(self, folder: Path, kill: tuple[str, int, dict[str, Any]] | None) -> str:
        """Start the ranks, and wait until they have ended.

        Raises:
            RuntimeError: with the output of the ranks, if they ended neither by the drill nor after their last step.
        """
        scratch = folder / "launches"
        scratch.mkdir(exist_ok=True)
        store = str(scratch / str(next(self._launches)))
        arguments = (self._ranks, str(folder), store, self._family, kill)
        processes = [self._context.Process(target=run, args=(rank, *arguments)) for rank in range(self._ranks)]
        for process in processes:
            process.start()
        end = time.monotonic() + PATIENCE
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        late = [process for process in processes if process.is_alive()]
        for process in late:
            process.kill()
            process.join()
        ended = all(process.exitcode == 0 for process in processes)
        if late or not (ended or Path(f"{store}.killed").exists()):
            logs = "\n".join(Path(f"{store}.log{rank}").read_text()[-3000:] for rank in range(self._ranks))
            raise RuntimeError(f"{self._family}, {kill}: the ranks did not end as they should.\n{logs}")
        return store


def weights_of(folder: Path) -> list[tuple[int, str]]:
    """Read the step and the checksum of the weights of each step that was trained, in order."""
    path = folder / "weights.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [(step, bits) for step, bits in map(json.loads, lines)]


def last_whole(folder: Path) -> int:
    """Return the step of the newest whole checkpoint, with those that only have to be moved, or 0."""
    moving = list((folder / SAVING).glob(f"*{WHOLE}"))
    whole = [path for path in checkpoints_of(folder) if flaw_of(path) is None]
    return max((int(path.name.removesuffix(WHOLE).rpartition("-")[2]) for path in (*moving, *whole)), default=0)


def left_in(folder: Path) -> str:
    """Say what a killed run left in its folder."""
    if any(flaw_of(path) is not None for path in checkpoints_of(folder)):
        return "a half checkpoint"
    names = [path.name for path in (folder / SAVING).glob("*")]
    if any(name.endswith(WHOLE) for name in names):
        return "whole ones, one of them to be moved"
    return "whole ones, and a part that nothing takes for one" if names else "whole ones alone"


def left_behind(counts: Counter) -> str:
    return ", ".join(f"{what} ({count})" for what, count in counts.items())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="kills in each phase on each layout")
    parser.add_argument("--others", type=int, default=5, help="kills in each phase with FSDP2 and with LoRA")
    parser.add_argument("--phases", type=report.comma_separated(), default=list(PHASES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=report.RESULTS)
    options = parser.parse_args(arguments)
    kinds = [(name, ranks, "DDP", options.kills) for name, ranks in LAYOUTS.items()]
    kinds += [("CP 2", 2, family, options.others) for family in ("FSDP2", "LoRA")]
    kinds = [kind for kind in kinds if kind[3]]
    total = sum(kills for *_, kills in kinds) * len(options.phases)
    found = []
    with tqdm(total=total, unit="kill") as progress:
        for layout, ranks, family, kills in kinds:
            progress.set_description(f"{layout}, {family}")
            drill = Drill(ranks, family)
            for number, phase in enumerate(options.phases):
                result = drill.run(phase, kills, options.seed + 1000 * number, progress)
                found.append({"layout": layout, "family": family, "phase": phase, **vars(result)})
    headers = ["layout", "weights", "killed in", "kills", "resumed to the same bits", "left in the folder (kills)"]
    rows = [
        [
            x["layout"],
            x["family"],
            x["phase"],
            x["kills"],
            x["same"],
            ", ".join(f"{n} {y}" for y, n in x["left"].items()),
        ]
        for x in found
    ]
    kills, same = (sum(x[key] for x in found) for key in ("kills", "same"))
    text = "\n\n".join(
        [
            f"{same} of {kills} killed runs resumed to the same bits: the weights after every step of every start are "
            f"those of a run that nobody killed. {STEPS} steps of a tiny Llama with Adam, a checkpoint every second "
            "step, two kept. All ranks are killed at once (SIGKILL). In saving, half of the moments are accesses to "
            "files, from the first to the last, and half are random times.",
            report.table(headers, rows),
            report.described(report.machine()),
        ]
    )
    report.write(
        options.output, "drills", "Drills: killed and resumed", text, {"machine": report.machine(), "drills": found}
    )
    return 0 if same == kills else 1


if __name__ == "__main__":
    sys.exit(main())
