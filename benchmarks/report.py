"""Reports of benchmarks: a page to read (`.md`) and the numbers for programs (`.json`)."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hf_context_parallel.calibration.rates import processor

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Properties of the machine and versions on which the numbers of a run depend."""
    facts = {
        "CPU": processor(),
        "cores": os.cpu_count(),
        "Python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        facts["GPU"] = torch.cuda.get_device_name()
    return facts


def described(facts: dict[str, Any]) -> str:
    """Description of the machine in a sentence."""
    return ", ".join(f"{key} {value}" for key, value in facts.items()) + "."


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Format a Markdown table. Cells are written as they are given."""
    from tabulate import tabulate  # `gpu_suite` runs where torch, Transformers and accelerate are all there is

    numeric = ["left" if isinstance(cell, str) and not cell[:1].isdigit() else "right" for cell in rows[0]]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True, colalign=numeric)


def write(folder: Path, name: str, title: str, text: str, data: dict[str, Any]) -> None:
    """Write `name.md` and `name.json` into `folder`, and print the page."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    page = folder / f"{name}.md"
    page.write_text(f"# {title}\n\n{text.strip()}\n", encoding="utf-8")
    print(page.read_text(encoding="utf-8"), f"Written to {page}", sep="\n")


def comma_separated(convert=str):
    """Argparse type that turns `"2,4"` into a list of `convert`'s values."""
    return lambda text: [convert(part) for part in text.split(",")]
