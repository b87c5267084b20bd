"""Files of this package in the cache of the user. Each machine may have a cache of its own."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HOME

FOLDER = Path(HF_HOME) / "context_parallel"


def kept(path: Path) -> dict[str, Any]:
    """Read the entries of a file. There are none if it is missing or damaged."""
    try:
        entries = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return entries if isinstance(entries, dict) else {}


def keep(path: Path, entries: Mapping[str, Any]) -> None:
    """Add entries to a file, in one piece, so that other processes read all of it or nothing.

    Raises:
        OSError: if the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(f".{os.getpid()}")
    written.write_text(json.dumps({**kept(path), **entries}, indent=1) + "\n")
    written.replace(path)
