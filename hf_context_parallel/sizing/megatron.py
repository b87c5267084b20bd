"""The table by which users of Megatron-LM compare tensor and context parallelism on 8 GPUs."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from .meshes import Mesh
from .plans import Plan, Question, longest_plans, plans_of
from .table import columns, described, wrapped

GPUS = 8


class Published(NamedTuple):
    """Row that is published for Megatron-LM: a mesh, the tokens of a sequence, and TFLOP/s of a GPU."""

    tp: int
    cp: int
    length: int
    tflops: int


PUBLISHED = (Published(8, 1, 2048, 180), Published(4, 2, 4096, 165), Published(2, 4, 8192, 140))


def megatron_table(question: Question) -> str:
    """Format the published figures with our estimates beside them, for the model and the GPU of a question."""
    rows, notes = [], []
    for row in PUBLISHED:
        asked = replace(question, gpus=GPUS, length=row.length)
        answer, longest = plans_of(asked), longest_plans(asked)
        fitting = [plan for plan in answer.fitting if _is(plan.mesh, row)]
        ours = fitting[0] if fitting else None
        best = answer.fitting[0] if answer.fitting else None
        rows.append(
            [
                f"TP {row.tp} x CP {row.cp}",
                f"{row.length:,}",
                str(row.tflops),
                f"{ours.step.tflops:.0f}" if ours else "none fits",
                f"{_longest(longest, row):,}",
                f"TP {best.mesh.tp} x CP {best.mesh.cp}" if best else "-",
                f"{best.step.tflops:.0f}" if best else "-",
                f"{_longest(longest):,}" if best else "-",
            ]
        )
        if ours:
            notes.append(f"ours at {row.length:,}: {described(ours)}")
    head = ["8 GPUs", "tokens", "published", "ours", "longest", "our best", "TFLOP/s", "longest of all"]
    return "\n\n".join(
        [
            "TFLOP/s of a GPU, and longest sequence:",
            columns(rows, head),
            wrapped(
                "published: what is reported elsewhere for Megatron-LM, on a model, GPUs and a batch that may differ "
                "from these. The other columns are estimates of this command, not measurements. Operations are those "
                "of a model that computes nothing again. longest is of that mesh, longest of all is of any mesh."
            ),
            "\n".join(notes),
        ]
    )


def _is(mesh: Mesh, row: Published) -> bool:
    return (mesh.tp, mesh.cp) == (row.tp, row.cp)


def _longest(found: list[Plan], row: Published | None = None) -> int:
    """Longest sequence of the plans with the mesh of a row, or of all."""
    return max((plan.longest for plan in found if row is None or _is(plan.mesh, row)), default=0)
