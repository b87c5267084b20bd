"""Checkpoints on disk: which ones are whole, how one appears at once, and which one a run goes on from."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..distributed.agreement import collective, of_first_rank
from ..distributed.mesh import Ranks

logger = logging.getLogger(__name__)

TRAINER_STATE_NAME = "trainer_state.json"
PREFIX_CHECKPOINT_DIR = "checkpoint"
"""Names that Transformers gives."""
SAVING = ".saving"
"""Folder within the folder of a run in which checkpoints are written."""
WHOLE = ".whole"
"""End of the name of a checkpoint in `SAVING` that is whole, and is about to be moved."""
REPLACED = ".replaced"
"""End of the name of a whole checkpoint that one of the same step takes the place of."""
TORCH_FILES = (".bin", ".pt", ".pth")
SHARD = re.compile(r"(.*?)(-\d{5}-of-\d{5})?\.(safetensors|bin)")
LATEST = "latest"
"""File of DeepSpeed that names the folder of its last state."""
CARD = "README.md"
"""File of a model that PEFT extends where there is one."""


def flaw_of(folder: Path) -> str | None:
    """Say what is missing in a checkpoint, or return None if it is whole.

    It reads the state of the Trainer, the headers of safetensors, the ends of archives and the lists of shards, and
    no weights.
    """
    if not folder.is_dir():
        return "there is no such folder"
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{TRAINER_STATE_NAME} is missing or half there"
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    if not any(map(_has_weights, files)):
        return "there are no weights"
    for file in files:
        try:
            flaw = _flaw_of_file(file)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            flaw = "is half there"
        if flaw is not None:
            return f"{file.relative_to(folder)} {flaw}"
    return None


def _has_weights(file: Path) -> bool:
    of_model = file.suffix in TORCH_FILES and "model" in file.name
    return file.suffix in (".safetensors", ".distcp") or of_model


def _flaw_of_file(file: Path) -> str | None:
    """Say what is wrong with a file of a checkpoint.

    Raises:
        OSError, ValueError, KeyError, TypeError, AttributeError: if its header or list cannot be read.
    """
    size = file.stat().st_size
    if file.suffix == ".safetensors":
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(min(length, size)))
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        expected = 8 + length + end
        return None if size == expected else f"has {size:,} of {expected:,} bytes"
    if file.name.endswith(".index.json"):
        named = set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values())
        missing = sorted(name for name in named if not (file.parent / name).is_file())
        return f"names {missing[0]}, which is missing" if missing else None
    if file.name == LATEST:
        tag = file.read_text(encoding="utf-8").strip()
        return None if tag and (file.parent / tag).is_dir() else f"names {tag!r}, which is missing"
    if file.suffix == ".distcp" and not (file.parent / ".metadata").is_file():
        return "has no .metadata beside it"
    if file.suffix in TORCH_FILES:
        with file.open("rb") as opened:
            is_archive = opened.read(2) == b"PK"
        return "is half there" if not size or (is_archive and not zipfile.is_zipfile(file)) else None
    return None


def checkpoints_of(run_dir: Path) -> list[Path]:
    """List the checkpoints of a run, whole or half, that of the last step first."""
    steps = {}
    for folder in run_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        number = folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if number.isdecimal() and folder.is_dir():
            steps[int(number)] = folder
    return [steps[step] for step in sorted(steps, reverse=True)]


def half_ones_of(run_dir: Path) -> dict[Path, str]:
    """Say for each checkpoint of a run that is not whole what it lacks."""
    flaws = {folder: flaw_of(folder) for folder in checkpoints_of(run_dir)}
    return {folder: flaw for folder, flaw in flaws.items() if flaw is not None}


def flush(folder: Path) -> None:
    """Wait until all files of a folder are on the disk, and so are their names."""
    for path in (folder, *folder.rglob("*")):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def publish(staged: Path) -> None:
    """Give a whole checkpoint in `SAVING` its place in the folder of the run. One of the same step goes.

    Where several machines share the disk, one of them does it, and the others find nothing.
    """
    whole = staged.with_name(staged.name + WHOLE)
    with suppress(FileNotFoundError):
        staged.rename(whole)
        _move(whole)


def _move(whole: Path) -> None:
    """Move a checkpoint that is marked as whole."""
    name = whole.name.removesuffix(WHOLE)
    final, replaced = whole.parent.parent / name, whole.with_name(name + REPLACED)
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    whole.rename(final)
    descriptor = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    shutil.rmtree(replaced, ignore_errors=True)


def recover(run_dir: Path) -> list[str]:
    """Move the checkpoints that a killed run left whole in `SAVING`, and return the names of those it left half."""
    left = []
    for staged in sorted((run_dir / SAVING).glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
        if staged.name.endswith(WHOLE):
            _move(staged)
        elif not staged.name.endswith(REPLACED):
            left.append(staged.name)
    return left


def clear(run_dir: Path) -> None:
    """Remove what killed runs left half in `SAVING`."""
    for left in (run_dir / SAVING).glob("*"):
        shutil.rmtree(left, ignore_errors=True)


def starting_point(run_dir: Path, wanted: str | bool | None, ranks: Ranks, is_first_of_machine: bool) -> str | None:
    """Finish what a killed run left, and find the checkpoint to go on from. All ranks call this, and get the same one.

    Args:
        run_dir: the folder of the run.
        wanted: the folder of a checkpoint, True for the newest whole one, or None or False for a fresh start.

    Returns:
        The folder of the checkpoint, or None for a fresh start.

    Raises:
        ValueError: on every rank, if the wanted checkpoint is not whole.
    """
    run_dir = Path(of_first_rank(str(run_dir), ranks))
    with collective(ranks):
        chosen = _choose(run_dir, wanted, recover(run_dir)) if ranks.rank == 0 else None
    with collective(ranks):  # later, since two machines that share a disk must not move the same checkpoint
        if is_first_of_machine and ranks.rank > 0:
            recover(run_dir)
    return of_first_rank(chosen, ranks)


def _choose(run_dir: Path, wanted: str | bool | None, left: list[str]) -> str | None:
    half = half_ones_of(run_dir)
    notes = [f"{folder} ({flaw})" for folder, flaw in half.items()] + [f"{run_dir / SAVING / name}" for name in left]
    if notes:
        logger.warning("passed over, since only a part was saved: %s", "; ".join(notes))
    if not wanted:
        return None
    whole = [str(folder) for folder in checkpoints_of(run_dir) if folder not in half]
    if wanted is True:
        if not whole:
            logger.warning("%s has no whole checkpoint, so the run starts at its first step", run_dir)
        return whole[0] if whole else None
    flaw = flaw_of(Path(wanted))
    if flaw is not None:
        beside = [str(folder) for folder in checkpoints_of(Path(wanted).parent) if flaw_of(folder) is None]
        raise ValueError(
            f"resume_from_checkpoint={str(wanted)!r} is no whole checkpoint: {flaw}. Whole ones beside it: "
            f"{', '.join(beside) or 'none'}. Give one that is whole, or True for the newest whole one of output_dir."
        )
    return str(wanted)


@contextmanager
def replaced_whole(folder: str | Path) -> Iterator[str]:
    """Yield a folder whose files then replace those in `folder`, each file at once, if the block succeeds.

    Shards of an earlier model of the same name that has more of them go.
    """
    folder = Path(folder)
    staged = folder / SAVING / "files"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    if (folder / CARD).is_file():
        shutil.copy2(folder / CARD, staged / CARD)
    try:
        yield str(staged)
        flush(staged)
        files = [file.relative_to(staged) for file in sorted(staged.rglob("*")) if file.is_file()]
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staged / file, folder / file)
        written = {match[1] for file in files if (match := SHARD.fullmatch(file.name))}
        for old in folder.iterdir():
            match = SHARD.fullmatch(old.name)
            if match and match[2] and match[1] in written and Path(old.name) not in files:
                old.unlink()
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        with suppress(OSError):
            staged.parent.rmdir()
