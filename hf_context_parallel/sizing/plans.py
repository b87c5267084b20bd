"""Plans of a run: every mesh and every choice that it leaves open, with memory, speed and the longest sequence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from math import ceil, floor, log
from typing import NamedTuple

import torch

from ..memory.advice import TILE, parts_with
from ..memory.facts import ModelFacts
from ..memory.job import Job
from ..memory.parts import Parts
from .gpus import Rates
from .meshes import Mesh, meshes
from .speed import Choice, Step, step_of, work_of

CLOSE = 1.02
"""Plans whose speeds differ by less than this factor are taken as equal. The simplest is first, then the smallest."""
STEP = 1024
"""Tokens by which the longest sequence is counted."""
MOST = 2**30
"""Longest sequence that is looked for, in tokens."""
KEPT = ("off", "device", "host")
"""Values of `attention_checkpoints` that are tried."""
TILE_TOKENS = (None, 8192, TILE)
"""Values of `tile_tokens` that are tried."""


@dataclass(frozen=True)
class Question:
    """Run that is to be planned, before its mesh and its choices are known.

    Args:
        facts: the model.
        gpus: number of GPUs.
        length: tokens of a sequence.
        rates: the GPU, and the links.
        rows: sequences that a CP group computes at a time.
        tokens: tokens of an optimizer step. None for one run of every group.
        weights: dtype of weights, gradients and states of the optimizer. Layers compute in bfloat16.
        may_shard: False if tensor parallelism is refused for the model.
        images: share of the tokens that are of images.
    """

    facts: ModelFacts
    gpus: int
    length: int
    rates: Rates
    rows: int = 1
    tokens: int | None = None
    weights: torch.dtype = torch.bfloat16
    may_shard: bool = True
    images: float = 0.0

    def meshes(self) -> Iterator[Mesh]:
        """List the meshes that need no more tokens in a step than are asked for, and shard no quantised weights."""
        facts = self.facts
        for mesh in meshes(self.gpus, self.rates.machine.node, facts.heads, facts.key_heads, self.may_shard):
            if facts.quantized_parameters and mesh.ranks != mesh.replicas:
                continue  # quantised weights were compared with one process where each rank holds them whole
            if self.tokens is None or mesh.groups * self.rows * self.length <= self.tokens:
                yield mesh

    def image_tokens(self, length: int) -> int:
        """Tokens of images in a sequence of `length` tokens."""
        return round(self.images * length)

    def runs(self, mesh: Mesh) -> int:
        """Runs whose gradients make a step."""
        return 1 if self.tokens is None else ceil(self.tokens / (mesh.groups * self.rows * self.length))


@dataclass(frozen=True)
class Plan:
    """Mesh with its choices: what a rank holds, and how fast it trains."""

    question: Question
    mesh: Mesh
    choice: Choice

    @cached_property
    def parts(self) -> Parts:
        """Bytes of a rank."""
        return self.parts_at(self.question.length)

    @cached_property
    def step(self) -> Step:
        """Estimate of an optimizer step."""
        asked = self.question
        work, images = work_of(asked.facts), asked.image_tokens(asked.length)
        runs = asked.runs(self.mesh)
        return step_of(work, self.mesh, self.choice, asked.length, asked.rows, runs, asked.rates, images)

    @property
    def fits(self) -> bool:
        return self.fits_at(self.question.length)

    @cached_property
    def longest(self) -> int:
        """Longest sequence that fits, in multiples of `STEP`, with all else unchanged. 0 if none does."""
        low, high = 0, STEP
        while high < MOST and self.fits_at(high):
            low, high = high, 2 * high
        while high - low > STEP:
            middle = (low + high) // 2 // STEP * STEP
            low, high = (middle, high) if self.fits_at(middle) else (low, middle)
        return low

    def at(self, length: int) -> Plan:
        """Make the same plan for sequences of another length."""
        return replace(self, question=replace(self.question, length=length))

    def fits_at(self, length: int) -> bool:
        """Return whether sequences of `length` tokens fit."""
        return self.parts_at(length).total <= self.question.rates.memory

    def parts_at(self, length: int) -> Parts:
        """Bytes of a rank, with sequences of `length` tokens."""
        return parts_with(self._job(length), self.question.weights)

    def _job(self, length: int) -> Job:
        asked, mesh, choice = self.question, self.mesh, self.choice
        return Job(
            asked.facts,
            asked.rows * length,
            cp=mesh.cp,
            tp=mesh.tp,
            fsdp=mesh.fsdp,
            ddp=mesh.fsdp == 1 and mesh.replicas > 1,
            comm_type=mesh.comm_type,
            a2a_size=mesh.inner,
            kernel=asked.rates.machine.kernel,
            offload=choice.offload,
            attention_checkpoints=choice.kept,
            tile_tokens=choice.tile_tokens,
            accumulates=asked.runs(mesh) > 1,
            image_tokens=asked.rows * asked.image_tokens(length),
            batches=asked.runs(mesh),
        )

    @property
    def order(self) -> tuple[int, int, float]:
        """Key to sort plans by, best first: faster, then simpler, then smaller."""
        choice, speed = self.choice, self.step.tokens_per_second
        simple = (choice.kept == "host") + choice.offload + (choice.tile_tokens is not None)
        return -floor(log(speed) / log(CLOSE)), simple, self.parts.total


class Plans(NamedTuple):
    """Answer to a question.

    Args:
        fitting: the plans that fit, best first.
        others: for each TP and CP of which no plan fits, the one that needs the least memory.
    """

    fitting: list[Plan]
    others: list[Plan]

    def best(self) -> list[Plan]:
        """List the best plan of each TP and CP, best first."""
        found: dict[tuple[int, int], Plan] = {}
        for plan in self.fitting:
            found.setdefault((plan.mesh.tp, plan.mesh.cp), plan)
        return list(found.values())


def plans_of(question: Question) -> Plans:
    """Find the plans of a question."""
    every = [Plan(question, mesh, choice) for mesh in question.meshes() for choice in _choices(question, mesh)]
    fitting = sorted((plan for plan in every if plan.fits), key=lambda plan: plan.order)
    reached = {(plan.mesh.tp, plan.mesh.cp) for plan in fitting}
    others: dict[tuple[int, int], Plan] = {}
    for plan in sorted(every, key=lambda plan: plan.parts.total):
        if (plan.mesh.tp, plan.mesh.cp) not in reached:
            others.setdefault((plan.mesh.tp, plan.mesh.cp), plan)
    return Plans(fitting, list(others.values()))


def longest_plans(question: Question) -> list[Plan]:
    """Find for each TP and CP the plan that goes longest, and list those of the longest sequences first."""
    found: dict[tuple[int, int], Plan] = {}
    for mesh in question.meshes():
        key = mesh.tp, mesh.cp
        for choice in _choices(replace(question, length=MOST), mesh):
            plan = Plan(question, mesh, choice)
            if key not in found or plan.fits_at(found[key].longest + STEP):
                found[key] = plan
    reached = [plan for plan in found.values() if plan.longest]
    return sorted(reached, key=lambda plan: -plan.longest)


def _choices(question: Question, mesh: Mesh) -> Iterator[Choice]:
    tokens = question.rows * question.length / mesh.cp
    for kept, offload, tile in product(KEPT, (False, True), TILE_TOKENS):
        # A group of one rank without tiles runs the attention of Transformers, which is not kept.
        can_keep = mesh.cp > 1 or tile is not None
        if (tile is None or tile < tokens) and (kept == "off" or can_keep):
            yield Choice(kept, offload, tile)
