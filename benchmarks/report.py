"""What every benchmark leaves behind: a page for people (`.md`) and the numbers for programs (`.json`)."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """What the numbers of this run depend on."""
    facts = {
        "CPU": _cpu_model(),
        "cores": os.cpu_count(),
        "Python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        facts["GPU"] = torch.cuda.get_device_name()
    return facts


def described(facts: dict[str, Any]) -> str:
    """The machine in a sentence."""
    return ", ".join(f"{key} {value}" for key, value in facts.items()) + "."


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table. Cells are shown as they are given."""
    numeric = ["left" if isinstance(cell, str) and not cell[:1].isdigit() else "right" for cell in rows[0]]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True, colalign=numeric)


def write(folder: Path, name: str, title: str, text: str, data: dict[str, Any]) -> None:
    """Writes `name.md` and `name.json` into `folder`, and shows the page."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    page = folder / f"{name}.md"
    page.write_text(f"# {title}\n\n{text.strip()}\n", encoding="utf-8")
    print(page.read_text(encoding="utf-8"), f"Written to {page}", sep="\n")


def comma_separated(convert=str):
    """An argparse type: `"2,4"` as a list of `convert`'s values."""
    return lambda text: [convert(part) for part in text.split(",")]


def _cpu_model() -> str:
    """The processor's name as Linux gives it; elsewhere its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
