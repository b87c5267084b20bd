"""Time of a training step on a mesh, by part, estimated from counts of operations and bytes."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from math import isqrt
from typing import NamedTuple

import torch

from ..attention.auto_strategy import NOTHING, Counts, Share, Traffic, counts_of, estimate, shares
from ..attention.peak_memory import number_of_groups
from ..attention.strategy import Shape, bytes_of_keys
from ..memory.facts import ModelFacts
from ..memory.tower_facts import ITEM, TowerFacts
from ..planning.layout import zigzag
from ..planning.machine import Machine, attention_flops
from ..planning.mask import Mask, Pattern, whole_rows
from .gpus import Rates
from .meshes import Mesh

ELEMENTWISE = 16, 4
"""Numbers of a token that element-wise work of a layer (norms, RoPE, residuals, activations) reads and writes in one
pass, in multiples of the hidden size and of the intermediate size. It is assumed."""
OPTIMIZER_BYTES = 32
"""Bytes that Adam reads and writes for each trained parameter: weight, gradient and two states in float32, all read
once, three of them written, and the gradient set to zero."""
HOST_LAYER = 2e-3
"""Seconds that the host takes to launch a layer's kernels forward, again and backward. It is assumed. Where the device
takes less, it waits."""
ASSUMPTIONS = (
    f"the host takes {HOST_LAYER * 1e3:.1f} ms to launch a layer forward, again and backward",
    "every sequence is one document, so its attention is the most that its length can need",
    "messages of FSDP hide behind matrix products, those of a ring behind its kernels, and copies to the host behind "
    "all computing; messages of tensor parallelism and exchanges of heads hide behind nothing",
    "scans of linear attention and Mamba count as their projections alone",
    "the loader is never waited for, and experts are equally busy",
    f"an image has {ITEM:,} patches, unless the tower takes images of one size, and ranks encode as many patches each",
)


class Attention(NamedTuple):
    """Attention layers of one kind.

    Args:
        pattern: what their tokens read.
        shape: their heads, head dims and dtype, of all TP ranks together.
        layers: number of these layers.
    """

    pattern: Pattern
    shape: Shape
    layers: int


class Work(NamedTuple):
    """Work of a model for a token, and the parameters that it holds.

    Args:
        layers: number of layers.
        hidden, intermediate: hidden size, and intermediate size of the MLP that a token runs through.
        active: parameters of matrix products that a token runs through, without the head.
        mlp: those of them that tiles compute once more.
        head: parameters of the head.
        parameters: all parameters.
        trained: those that are trained.
        weights_trained: False if the matrices themselves are frozen, as under LoRA.
        attention: the attention layers, by kind.
        itemsize: bytes of a number that is computed with.
        tower: the vision tower, or None.
    """

    layers: int
    hidden: int
    intermediate: int
    active: float
    mlp: float
    head: float
    parameters: float
    trained: float
    weights_trained: bool
    attention: tuple[Attention, ...]
    itemsize: int = 2
    tower: TowerFacts | None = None


class Choice(NamedTuple):
    """Choices that a mesh leaves open.

    Args:
        kept: where outputs of attention are kept, `"off"`, `"device"` or `"host"`. With `"off"` it is computed again.
        offload: True if checkpoints are moved to the host.
        tile_tokens: tokens that an MLP computes at a time, or None for all.
    """

    kept: str = "off"
    offload: bool = False
    tile_tokens: int | None = None


class Messages(NamedTuple):
    """Bytes that a rank sends for one purpose in a step, by link."""

    purpose: str
    near: float = 0.0
    far: float = 0.0
    host: float = 0.0


class Step(NamedTuple):
    """Estimate of an optimizer step.

    Args:
        parts: seconds by part. Messages count where computing does not hide them.
        messages: bytes of the slowest rank, by purpose and link.
        tokens: tokens of all ranks.
        flops: operations of the model on all ranks, without what is computed again.
        gpus: number of GPUs.
    """

    parts: dict[str, float]
    messages: tuple[Messages, ...]
    tokens: int
    flops: float
    gpus: int

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def tflops(self) -> float:
        """Operations of the model a second and GPU, in TFLOP/s."""
        return self.flops / self.seconds / self.gpus / 1e12


def work_of(facts: ModelFacts, dtype: torch.dtype = torch.bfloat16) -> Work:
    """Count the work of a model that computes in `dtype`. Layers with chunks count as layers with a window."""
    one = 3 * facts.hidden * facts.intermediate  # an expert, or the MLP, of a layer
    in_layers = facts.parameters - facts.tower_parameters - facts.head_parameters * (1 if facts.tied else 2)
    # Some layers may have no experts. The largest layers have them, and are at most so many.
    with_experts = min(facts.layers, in_layers // facts.layer_parameters)
    idle = max(0, facts.experts - facts.active_experts) * with_experts * one
    shape = Shape(facts.heads, facts.key_heads, facts.query_dim, facts.value_dim, dtype)
    kinds = (Pattern(), facts.full_layers), (Pattern(True, facts.window), facts.window_layers)
    return Work(
        layers=facts.layers,
        hidden=facts.hidden,
        intermediate=facts.intermediate * facts.active_experts,
        active=in_layers - idle,
        mlp=facts.active_experts * facts.layers * one,
        head=facts.head_parameters,
        parameters=facts.parameters,
        trained=facts.trained_parameters,
        weights_trained=facts.lora_parameters is None,
        attention=tuple(Attention(pattern, shape, layers) for pattern, layers in kinds if layers),
        itemsize=dtype.itemsize,
        tower=facts.tower,
    )


def step_of(
    work: Work, mesh: Mesh, choice: Choice, length: int, rows: int, runs: int, rates: Rates, images: int = 0
) -> Step:
    """Estimate an optimizer step under gradient checkpointing.

    Args:
        length: tokens of a sequence.
        rows: sequences that a CP group computes at a time.
        runs: forward and backward passes of the step, whose gradients are added up.
        images: tokens of a sequence that are of images.
    """
    machine, tokens = rates.machine, rows * length / mesh.cp  # tokens of a rank in a run
    linear = _linear_flops(work, choice) * tokens / mesh.tp / machine.linear
    wide, narrow = ELEMENTWISE
    passed = wide * work.hidden + narrow * work.intermediate / mesh.tp
    passes = 4 + bool(choice.tile_tokens)  # forward, again, backward that reads twice as much
    elementwise = passes * work.layers * tokens * passed * work.itemsize / machine.memory
    attention = _attention(work, mesh, choice.kept != "off", length, rows, machine)
    computing = linear + elementwise + attention.computing
    reducing = _tensor_parallel(work, mesh, tokens, machine)
    sharding, averaging = _sharded(work, mesh, machine)
    host = _host_bytes(work, mesh, choice, tokens)
    encoding, exchange = _tower(work, mesh, rows * images, machine)
    of_layers = computing + attention.messages + _seconds(reducing, machine, 6 * work.layers)
    hidden = runs * (linear + elementwise)
    parts = {
        "matrix products": runs * linear,
        "attention": runs * attention.computing,
        "element-wise work": runs * elementwise,
        "messages of CP": runs * attention.messages,
        "messages of TP": runs * _seconds(reducing, machine, 6 * work.layers),
        "waiting for launches": runs * _shown(HOST_LAYER * work.layers, of_layers),
        "messages of FSDP and replicas": _shown(
            runs * _seconds(sharding, machine, 3 * work.layers) + _seconds(averaging, machine, work.layers), hidden
        ),
        "copies to the host": runs * _shown(2 * host / rates.host, computing),
        "vision tower": runs * (encoding + _seconds(exchange, machine, 2)),
        "optimizer": OPTIMIZER_BYTES * work.trained / mesh.tp / mesh.fsdp / machine.memory,
    }
    messages = (
        Messages("CP: keys/values, heads", runs * attention.traffic.near, runs * attention.traffic.far),
        Messages("TP: activations", runs * reducing.near, runs * reducing.far),
        Messages("towers: features", runs * exchange.near, runs * exchange.far),
        Messages("FSDP: weights, gradients", runs * sharding.near, runs * sharding.far),
        Messages("replicas: gradients", averaging.near, averaging.far),
        Messages("host: checkpoints, kept attention", host=runs * 2 * host),
    )
    all_tokens = rows * length * mesh.groups * runs
    flops = model_flops(work, length, images) * all_tokens / length
    return Step(parts, messages, all_tokens, flops, mesh.ranks)


def model_flops(work: Work, length: int, images: int = 0) -> float:
    """Operations of a sequence, forward and backward, where nothing is computed again.

    Gradients of frozen matrices are not made. Attention's backward counts twice its forward, as is usual.

    Args:
        images: tokens of the sequence that are of images.
    """
    products = (6 if work.weights_trained else 4) * (work.active + work.head) * length
    products += sum(_tower_flops(work.tower, images)) * _passes(work.tower)
    return products + 3 * sum(
        layer.layers * attention_flops(_pairs(layer.pattern, length), layer.shape.heads, *layer.shape[2:4])
        for layer in work.attention
    )


def _tower_flops(tower: TowerFacts | None, images: int) -> tuple[float, float]:
    """Operations of a tower forward: those of its matrices, and those of its attention."""
    if tower is None or not images:
        return 0.0, 0.0
    sizes, patches = tower.sizes, images * tower.merge
    side = isqrt(min(tower.item, patches))
    of_item = sizes.pairs(1, side, side)
    # A unit of the cost of an item is two multiplications and two additions for each number of the width.
    unit, items = 4 * sizes.width, patches / side**2
    return unit * items * (sizes.cost(1, side, side) - of_item), unit * items * of_item


def _passes(tower: TowerFacts | None) -> int:
    """Passes of a tower where nothing is computed again. Gradients of weights and those of inputs are one each."""
    return 1 if tower is None else 3 if tower.trained else 2 if tower.woken else 1


def _tower(work: Work, mesh: Mesh, images: int, machine: Machine) -> tuple[float, Traffic]:
    """Estimate a tower in a run: seconds of a rank for its share, and bytes of features and gradients that it sends.

    Args:
        images: tokens of images in the sequences of a CP group.
    """
    tower = work.tower
    if tower is None or not images:
        return 0.0, NOTHING
    matrices, attention = (part / mesh.cp for part in _tower_flops(tower, images))
    wide, narrow = ELEMENTWISE
    numbers = tower.sizes.layers * images * tower.merge / mesh.cp
    numbers *= wide * tower.sizes.width + narrow * tower.sizes.inner
    has_graph = tower.trained or tower.woken
    again = 1 + has_graph  # forward passes
    backward = (2 if tower.trained else 1) * has_graph
    seconds = (again + backward) * matrices / machine.linear
    seconds += again * attention / machine.forward + has_graph * 2.5 * attention / machine.backward
    seconds += (again + 2 * has_graph) * numbers * work.itemsize / machine.memory
    # Features go to the ranks of their tokens, and gradients back.
    sent = (1 + tower.levels) * images / mesh.cp * work.hidden * work.itemsize * (1 + has_graph)
    return seconds, _all_to_all(sent, mesh.cp, mesh.tp, machine.node)


def _linear_flops(work: Work, choice: Choice) -> float:
    """Operations of matrix products for a token: forward, again, and backward."""
    backward = 4 if work.weights_trained else 2
    return (4 + backward) * (work.active + work.head) + (2 * work.mlp if choice.tile_tokens else 0)


def _pairs(pattern: Pattern, length: int) -> int:
    return sum(_counts(pattern, length, 1, 1)(1).pairs)


@lru_cache(maxsize=256)
def _counts(pattern: Pattern, length: int, rows: int, cp: int) -> Counts:
    """Count what the ranks of a group compute and read."""
    return counts_of(zigzag(length, cp), Mask(length, whole_rows(rows, length), pattern))


class _Attention(NamedTuple):
    computing: float
    messages: float
    traffic: Traffic


def _attention(work: Work, mesh: Mesh, kept: bool, length: int, rows: int, machine: Machine) -> _Attention:
    """Estimate the attention of all layers in a run: forward, again unless it is kept, and backward."""
    computing, messages, near, far = 0.0, 0.0, 0.0, 0.0
    alike = mesh._replace(fsdp=mesh.cp, replicas=1)  # attention does not depend on these, and is estimated once
    for layer in work.attention:
        found = _of_layer(layer, alike, kept, length, rows, machine)
        computing += layer.layers * found.computing
        messages += layer.layers * found.messages
        near += layer.layers * found.traffic.near
        far += layer.layers * found.traffic.far
    return _Attention(computing, messages, Traffic(near, far, 0))


@lru_cache(maxsize=4096)
def _of_layer(layer: Attention, mesh: Mesh, kept: bool, length: int, rows: int, machine: Machine) -> _Attention:
    shape = layer.shape._replace(heads=layer.shape.heads // mesh.tp, key_heads=layer.shape.key_heads // mesh.tp)
    here = replace(machine, node=max(1, machine.node // mesh.tp))  # TP ranks are neighbours
    counts, layout = _counts(layer.pattern, length, rows, mesh.cp), zigzag(length, mesh.cp)
    tokens = rows * max(layout.local_lengths)
    groups = number_of_groups(None, shape, here.kernel, mesh.comm_type, mesh.cp, mesh.inner, tokens)
    found = shares(mesh.comm_type, mesh.inner, layout, counts, shape, here, groups=groups)
    again = [_again(share, shape, mesh.inner, kept) for share in found]
    both = estimate(found, shape, here)
    more = max(_forward(share, shape, here) for share in again)
    busiest = max(range(mesh.cp), key=lambda rank: found[rank].bytes)
    sent = [part for share in (found[busiest], again[busiest]) for part in (share.hidden, share.shown)]
    traffic = Traffic(sum(part.near for part in sent), sum(part.far for part in sent), 0)
    return _Attention(both.computing + more.computing, both.messages + more.messages, traffic)


def _again(share: Share, shape: Shape, inner: int, kept: bool) -> Share:
    """Share of the second pass of a layer.

    Kept attention computes nothing and sends no keys. Heads are exchanged once more in either case.
    """
    keys = bytes_of_keys(shape, shape.key_heads, 1, 1)
    of_keys = keys.forward / sum(keys)
    numbers = shape.heads * (shape.query_dim + shape.value_dim)
    of_heads = (numbers + shape.key_value_numbers) / (2 * numbers + 3 * shape.key_value_numbers)
    shown = _times(share.shown, of_heads if inner > 1 else of_keys)
    if kept:
        return Share(0, 0, 0, shown=shown if inner > 1 else NOTHING)
    return Share(share.work, share.calls, share.copied / 3, _times(share.hidden, of_keys), shown)


def _times(traffic: Traffic, part: float) -> Traffic:
    return Traffic(traffic.near * part, traffic.far * part, traffic.messages // 3)


def _forward(share: Share, shape: Shape, machine: Machine) -> _Attention:
    """Estimate a forward pass of a share."""
    flops = attention_flops(share.work, 1, shape.query_dim, shape.value_dim)
    computing = flops / machine.forward + share.calls * machine.launch
    messages = _shown(machine.transfer(*share.hidden), machine.overlap * computing)
    messages += machine.transfer(*share.shown) + share.copied / machine.memory
    return _Attention(computing, messages, NOTHING)


def _shown(seconds: float, hidden: float) -> float:
    """Seconds of messages that remain when `hidden` seconds of computing run beside them."""
    return max(0.0, seconds - hidden)


def _seconds(traffic: Traffic, machine: Machine, messages: int) -> float:
    return machine.transfer(traffic.near, traffic.far, messages)


def _collective(total: float, size: int, stride: int, node: int) -> Traffic:
    """Bytes that a rank sends when `size` ranks, `stride` apart, gather or reduce a tensor of `total` bytes.

    The ranks of a group on a node share what the node gets from other nodes.
    """
    together = max(1, min(size, node // stride))
    nodes = -(-size // together)
    near = total * (size - 1) / size if together > 1 else 0.0
    return Traffic(near, total * (nodes - 1) / nodes / together, 0)


def _all_to_all(total: float, size: int, stride: int, node: int) -> Traffic:
    """Bytes that a rank sends when `size` ranks, `stride` apart, exchange `total` bytes of each evenly."""
    together = max(1, min(size, node // stride))
    return Traffic(total * (together - 1) / size, total * (size - together) / size, 0)


def _add(*parts: Traffic) -> Traffic:
    return Traffic(sum(part.near for part in parts), sum(part.far for part in parts), 0)


def _tensor_parallel(work: Work, mesh: Mesh, tokens: float, machine: Machine) -> Traffic:
    """Bytes that a rank sends in a run, by tensor parallelism.

    A layer sums two outputs over the ranks in the forward pass and in its repetition, and two gradients in backward. A
    sum over ranks is a reduction and a gathering.
    """
    if mesh.tp == 1:
        return NOTHING
    total = 2 * 6 * work.layers * tokens * work.hidden * work.itemsize
    return _collective(total, mesh.tp, 1, machine.node)


def _sharded(work: Work, mesh: Mesh, machine: Machine) -> tuple[Traffic, Traffic]:
    """Bytes that a rank sends to gather weights and reduce gradients in a run, and to average them over replicas.

    FSDP2 gathers weights in the model's dtype for forward and for backward, and reduces gradients in float32. Where it
    does not shard, DDP averages gradients once a step.
    """
    weights, gradients = work.parameters / mesh.tp * work.itemsize, work.trained / mesh.tp * 4
    within, across = NOTHING, NOTHING
    if mesh.fsdp > 1:
        within = _collective(2 * weights + gradients, mesh.fsdp, mesh.tp, machine.node)
    if mesh.replicas > 1:
        across = _collective(2 * gradients / mesh.fsdp, mesh.replicas, mesh.tp * mesh.fsdp, machine.node)
    return within, across


def _host_bytes(work: Work, mesh: Mesh, choice: Choice, tokens: float) -> float:
    """Bytes that a rank moves to the host in a run. As many come back."""
    checkpoints = work.layers * tokens * work.hidden * work.itemsize if choice.offload else 0.0
    if choice.kept != "host":
        return checkpoints
    return checkpoints + tokens / mesh.tp * sum(
        layer.layers * layer.shape.heads * (layer.shape.value_dim * work.itemsize + 4) for layer in work.attention
    )
