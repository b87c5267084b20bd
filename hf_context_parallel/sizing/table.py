"""Plans as text: tables, and the first plan in detail."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from ..memory.advice import PARTS, by_size, gib
from .meshes import Mesh
from .plans import CLOSE, STEP, Plan, Question
from .speed import ASSUMPTIONS, Messages

ROWS = 10
"""Most rows of a table, unless all are asked for."""
_GB = 1e9
_LEFT = ("8 GPUs", "strategy", "kept", "inputs", "our best", "peak in", "ends by")
WIDTH = 118
"""Columns of the output."""
_MESH = ("", "TP", "CP", "strategy", "FSDP", "copies", "kept", "inputs", "tile")
_SHORT = ("weights", "gradients", "optimizer", "of inputs", "attention", "layer", "k/v", "loss", "images")


def table(plans: Sequence[Plan], rows: int = ROWS) -> str:
    """Format the plans: what they are, how fast and long, and below it the memory of a rank by part."""
    shown = list(enumerate(plans[:rows], start=1))
    head = [*_MESH, "tokens/s", "TF/s", "GiB", "longest", "node", "net", "host"]
    first = [
        [
            str(number),
            *_mesh_cells(plan),
            f"{plan.step.tokens_per_second:,.0f}",
            f"{plan.step.tflops:.0f}",
            gib(plan.parts.total),
            f"{plan.longest:,}",
            *_sent_cells(plan.step.messages),
        ]
        for number, plan in shown
    ]
    second = [
        [
            str(number),
            *(gib(getattr(plan.parts.at_peak, part)) for part in PARTS),
            gib(plan.parts.total),
            plan.parts.peak,
        ]
        for number, plan in shown
    ]
    text = [
        columns(first, head),
        wrapped(
            "kept: outputs of attention; inputs: those of layers; tile: tokens that an MLP computes at a time; "
            "tokens/s of all GPUs; TF/s: TFLOP/s of a GPU; node, net, host: GB that a rank sends in a step, in its "
            "node, to others, and to and from the host."
        ),
        "Memory of a rank at its peak, GiB:",
        columns(second, ["", *_SHORT, "sum", "peak in"]),
    ]
    if len(plans) > rows:
        text.append(f"{len(plans) - rows} more fit. --all lists them.")
    return "\n\n".join(text)


def columns(rows: Sequence[Sequence[str]], head: Sequence[str]) -> str:
    """Format rows of cells below a head. Numbers end, and words begin, below each other."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(width) if name in _LEFT else cell.rjust(width) for cell, width, name in zip(row, widths, head)
        ).rstrip()
        for row in (head, *rows)
    ]
    return "\n".join(lines)


def wrapped(text: str, indent: str = "", first: str = "") -> str:
    """Wrap text to `WIDTH` columns."""
    later = indent + " " * len(first)
    wrapper = textwrap.TextWrapper(WIDTH, indent + first, later, break_long_words=False, break_on_hyphens=False)
    return wrapper.fill(text)


def _mesh_cells(plan: Plan) -> list[str]:
    mesh, choice = plan.mesh, plan.choice
    return [
        str(mesh.tp),
        str(mesh.cp),
        _strategy(mesh) if mesh.cp > 1 else "-",
        str(mesh.fsdp),
        str(mesh.replicas),
        choice.kept,
        "host" if choice.offload else "device",
        str(choice.tile_tokens or "-"),
    ]


def _strategy(mesh: Mesh) -> str:
    return f"a2a {mesh.inner}+p2p" if mesh.comm_type == "a2a+p2p" else mesh.comm_type


def _sent_cells(messages: Sequence[Messages]) -> list[str]:
    links = ("near", "far", "host")
    return [f"{sum(getattr(found, link) for found in messages) / _GB:.1f}" for link in links]


def refused(plans: Sequence[Plan]) -> str:
    """Format a line for each TP and CP of which no plan fits."""
    lines = []
    for plan in plans:
        (largest, size), *_ = by_size(plan.parts)
        lines.append(
            f"TP {plan.mesh.tp} x CP {plan.mesh.cp} does not fit: the least is {gib(plan.parts.total)} GiB of "
            f"{gib(plan.question.rates.memory)}, of which {gib(size)} are {largest}."
        )
    return "\n".join(lines)


def details(plan: Plan) -> str:
    """Describe a plan: memory, time and messages by part, what limits it, and what the numbers rest on."""
    asked, step, parts = plan.question, plan.step, plan.parts
    lines = [f"{described(plan)}:"]
    lines += ["", f"  Memory of a rank at its peak ({parts.peak}), {parts.total:,.0f} bytes:"]
    lines += [f"    {size:>18,.0f}  {words}" for words, size in by_size(parts) if size]
    if parts.host:
        lines.append(f"    {parts.host:>18,.0f}  in pinned memory of the host, beside these")
    lines += ["", f"  A step of {step.tokens:,} tokens takes {step.seconds:.2f} s:"]
    spent = sorted(step.parts.items(), key=lambda part: -part[1])
    lines += [f"    {seconds:>10.3f} s  {name}" for name, seconds in spent if seconds > 5e-4]
    lines += ["", "  A rank sends in a step, GB in its node / to other nodes / to and from the host:"]
    lines += [
        f"    {found.near / _GB:>8.1f} / {found.far / _GB:.1f} / {found.host / _GB:.1f}  {found.purpose}"
        for found in step.messages
        if any(found[1:])
    ]
    lines += ["", wrapped(limits(plan), "  "), "", assumptions(asked)]
    return "\n".join(lines)


def assumptions(question: Question) -> str:
    """List what the numbers rest on."""
    lines = (*question.rates.assumptions, *ASSUMPTIONS)
    return "\n".join(["Assumed:", *(wrapped(line, first="  - ") for line in lines)])


def described(plan: Plan) -> str:
    """Describe a plan in a line."""
    mesh, choice = plan.mesh, plan.choice
    words = [f"TP {mesh.tp} x CP {mesh.cp}"]
    if mesh.cp > 1:
        words[0] += f" by {_strategy(mesh)}"
    words.append(f"FSDP over {mesh.fsdp}" if mesh.fsdp > 1 else "weights whole" if mesh.tp == 1 else "no FSDP")
    words += [f"{mesh.replicas} replicas"] * (mesh.replicas > 1)
    words.append(f"attention {'computed again' if choice.kept == 'off' else f'kept on the {choice.kept}'}")
    words += ["inputs of layers on the host"] * choice.offload
    words += [f"MLP in tiles of {choice.tile_tokens} tokens"] * (choice.tile_tokens is not None)
    return ", ".join(words)


def limits(plan: Plan) -> str:
    """Explain what ends the length of a plan, and what its step waits for most."""
    longer = plan.parts_at(plan.longest + STEP)
    (largest, size), *_ = by_size(longer)
    name, seconds = max(plan.step.parts.items(), key=lambda part: part[1])
    room, part = gib(plan.question.rates.memory), seconds / plan.step.seconds
    return (
        f"At {plan.longest:,} tokens the {room} GiB that tensors can take are full, most of them by {largest} "
        f"({gib(size)} GiB). Time is limited by {name} ({part:.0%} of the step)."
    )


def heading(name: str, question: Question, gpu: str) -> str:
    """Describe the model and the machine."""
    facts = question.facts
    trained = "all trained" if facts.lora_parameters is None else f"LoRA trains {facts.lora_parameters / 1e6:,.0f} M"
    dtype = str(question.weights).removeprefix("torch.")
    machine = f"{question.gpus} x {gpu}"
    return wrapped(f"{name}: {facts.parameters / 1e9:.2f} B parameters in {dtype}, {trained}, on {machine}")


def order(question: Question) -> str:
    """Describe the step that is planned, and the order of the plans."""
    tokens = f", {question.tokens:,} tokens a step" if question.tokens else ""
    return wrapped(
        f"{question.rows} x {question.length:,} tokens at a time{tokens}. Best first: speeds within {CLOSE - 1:.0%} "
        "count as equal, and then the simplest and the smallest is first."
    )


def longest_table(plans: Sequence[Plan], rows: int = ROWS) -> str:
    """Format the plans that go longest, with their speed and memory of the host at that length."""
    cells = []
    for number, plan in enumerate(plans[:rows], start=1):
        there = plan.at(plan.longest)
        (largest, _), *_ = by_size(plan.parts_at(plan.longest + STEP))
        row = [f"{plan.longest:,}", f"{there.step.tokens_per_second:,.0f}", gib(there.parts.host), largest]
        cells.append([str(number), *_mesh_cells(plan), *row])
    return columns(cells, [*_MESH, "longest", "tokens/s", "host GiB", "ends by"])
