"""Choice of the fastest strategy for a mask, of those that fit into memory.

Time and memory are estimated from counts, so all ranks make the same choice without a message.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch

from ..config import ContextParallelConfig
from ..distributed.messages import accumulation_dtype
from ..distributed.token_exchange import TokenExchange
from ..planning.layout import Layout
from ..planning.machine import Machine, attention_flops
from ..planning.mask import Mask
from ..planning.workload import Workload, workload
from .peak_memory import number_of_groups, peak_of_backward, results_of_groups, shape_of_group
from .ring_steps import Ring, merged_bytes, owners_a_step
from .strategy import Shape, bytes_of_heads, bytes_of_keys
from .ulysses import SharedHeads

CLOSE = 1.03
"""Estimates of time that differ by less than this factor are taken as equal, and memory decides."""


class Candidate(NamedTuple):
    """Strategy that a layer could have.

    Args:
        comm_type: name of the strategy.
        inner: number of ranks in its subgroups.
        together: number of owners whose keys its ring computes with at each step.
        groups: number of groups of heads that are computed one after another.
    """

    comm_type: str
    inner: int
    together: int = 1
    groups: int = 1


class Choice(NamedTuple):
    """Strategy of a layer, and the reason for it; see `Candidate` for the other fields."""

    comm_type: str
    inner: int
    together: int = 1
    groups: int = 1
    reason: str = ""


@dataclass(frozen=True)
class Estimate:
    """Time and memory of a layer, forward and backward, on the rank that takes or needs most.

    Args:
        computing: seconds of kernels.
        messages: seconds of messages, copies and merging that computing does not hide.
        peak: bytes at the peak beyond the inputs; see `peak_memory.py`.
    """

    computing: float
    messages: float
    peak: float = 0.0

    @property
    def total(self) -> float:
        return self.computing + self.messages


def inner_size(config: ContextParallelConfig, comm_type: str, shape: Shape) -> int:
    """Number of ranks of a subgroup that exchanges heads.

    If `a2a_size` is not set, it is the largest number that divides both the key heads and the group. Then no key goes
    to two ranks of a subgroup (the rule of USP, arXiv:2405.07719).
    """
    if comm_type == "a2a":
        return config.size
    if comm_type == "a2a+p2p":
        return config.a2a_size or math.gcd(shape.key_heads, config.size)
    return 1


def choose(
    config: ContextParallelConfig,
    comm_type: str,
    layout: Layout,
    mask: Mask,
    shape: Shape,
    machine: Machine,
    free: float = math.inf,
) -> Choice:
    """Choose the strategy of a layer: `comm_type`, or the best one if it is `"auto"`.

    That is the fastest one that needs at most `free` bytes. Of those that are nearly as fast, it is the one that needs
    the least memory. If none fits, it is the one that needs the least of all.
    """
    counts, most = counts_of(layout, mask), len(mask.rows) * max(layout.local_lengths)
    if comm_type != "auto" or layout.size == 1:
        name = "p2p" if comm_type == "auto" else comm_type
        only = candidate(config, name, inner_size(config, name, shape), layout.size, most, counts, shape, machine)
        return Choice(*only, "one rank" if comm_type == "auto" else "")
    found = estimates(config, layout, most, counts, shape, machine)
    if config.head_groups is None and all(estimated.peak > free for estimated in found.values()):
        smallest = replace(config, head_groups=shape.key_heads)
        found |= estimates(smallest, layout, most, counts, shape, machine)
    fitting = [candidate for candidate in found if found[candidate].peak <= free]
    least = min((found[candidate].total for candidate in fitting), default=0.0)
    close = [candidate for candidate in fitting if found[candidate].total <= CLOSE * least]
    best = min(close or found, key=lambda candidate: (found[candidate].peak, found[candidate].total))
    return Choice(*best, _reason(best, found, free, counts(1)))


Counts = Callable[[int], Workload]
"""Workload of subgroups, by the number of their ranks. It is counted once."""


def counts_of(layout: Layout, mask: Mask) -> Counts:
    """Count what subgroups of a layout compute and read, once they are asked for."""
    return cache(lambda inner: workload(layout if inner == 1 else layout.merged(inner), mask))


def estimates(
    config: ContextParallelConfig, layout: Layout, most: int, counts: Counts, shape: Shape, machine: Machine
) -> dict[Candidate, Estimate]:
    """Estimate all candidates.

    Args:
        most: tokens of the rank that holds most, with those of no document.
    """
    found = {}
    for way in candidates(config, shape):
        one = candidate(config, *way, layout.size, most, counts, shape, machine)
        counted = shares(*way, layout, counts, shape, machine, one.together, one.groups)
        found[one] = estimate(counted, shape, machine)
    return found


def candidate(
    config: ContextParallelConfig,
    comm_type: str,
    inner: int,
    size: int,
    most: int,
    counts: Counts,
    shape: Shape,
    machine: Machine,
) -> Candidate:
    """Complete a strategy of `size` ranks by its groups of heads, and the owners at each step of its ring."""
    groups = number_of_groups(config.head_groups, shape, machine.kernel, comm_type, size, inner, most)
    together = _together(comm_type, inner, size, counts, shape_of_group(shape, inner, groups), machine)
    return Candidate(comm_type, inner, together, groups)


def _together(comm_type: str, inner: int, size: int, counts: Counts, shape: Shape, machine: Machine) -> int:
    """Number of owners at each step of a strategy's ring, the same on all ranks."""
    ranks = size // inner
    if comm_type == "all_gather" or ranks < 3:
        return 1
    outer = counts(inner)
    ring = Ring(ranks, max(outer.pairs), max(outer.read), max(outer.merged), size > machine.node)
    heads, key_heads = (-(-count // inner) for count in (shape.heads, shape.key_heads))
    return owners_a_step(ring, shape._replace(heads=heads, key_heads=key_heads), machine)


def _reason(best: Candidate, found: dict[Candidate, Estimate], free: float, here: Workload) -> str:
    """Describe the estimates, beginning with those of the best candidate."""
    listed = ", ".join(
        f"{_named(candidate)} {found[candidate].total * 1e3:.3g} ms and {found[candidate].peak / 2**30:.3g} GiB"
        for candidate in sorted(found, key=lambda candidate: (candidate != best, found[candidate].total))
    )
    room = "" if free == math.inf else f", of {free / 2**30:.3g} GiB for it"
    if found[best].peak > free:
        room += " (NONE FITS, so it is the one that needs the least)"
    mean = sum(here.pairs) / len(here.pairs)
    uneven = (
        f"; where queries stay, the slowest rank has {max(here.pairs) / mean:.2f} of the mean work" if mean else ""
    )
    return f"a layer is estimated to take, and need at its peak, by {listed}{room}{uneven}"


def candidates(config: ContextParallelConfig, shape: Shape) -> list[tuple[str, int]]:
    """Strategies that can compute a layer, each with the number of ranks in its subgroups."""
    size = config.size
    found = [("p2p", 1), ("all_gather", 1)]
    if shape.heads >= size:
        found.append(("a2a", size))
    inner = [config.a2a_size] if config.a2a_size else [n for n in range(2, size) if size % n == 0]
    return found + [("a2a+p2p", n) for n in inner if 1 < n < size and n <= shape.heads]


def _named(one: Candidate) -> str:
    name = f"{one.comm_type} of {one.inner}" if one.comm_type == "a2a+p2p" else one.comm_type
    further = (one.together, "owners a step"), (one.groups, "groups of heads")
    listed = " and ".join(f"{count} {what}" for count, what in further if count > 1)
    return f"{name} with {listed}" if listed else name


class Traffic(NamedTuple):
    """Bytes that a rank sends within its node and to other nodes, and the number of messages."""

    near: float
    far: float
    messages: int

    @property
    def bytes(self) -> float:
        return self.near + self.far


NOTHING = Traffic(0, 0, 0)


class Share(NamedTuple):
    """Work and traffic of one rank for a layer, forward and backward.

    Args:
        work: query-key pairs, counted for each head.
        calls: kernel calls of one pass.
        copied: bytes that it reads and writes to merge outputs and to copy messages.
        hidden: traffic while it computes.
        shown: traffic before and after it computes.
        peak: bytes that it needs at the peak.
    """

    work: int
    calls: int
    copied: float
    hidden: Traffic = NOTHING
    shown: Traffic = NOTHING
    peak: float = 0.0

    @property
    def bytes(self) -> float:
        """Bytes that the rank sends in all."""
        return self.hidden.bytes + self.shown.bytes

    def in_groups(self, groups: int, results: int) -> Share:
        """Share of a rank that computes groups of heads, and holds further bytes for the results of all of them."""
        hidden, shown = (part._replace(messages=groups * part.messages) for part in (self.hidden, self.shown))
        return self._replace(
            calls=groups * self.calls,
            hidden=hidden,
            shown=shown,
            peak=self.peak + results,
            copied=self.copied + 4 * results,  # results and gradients are read and written, in both passes
        )

    def seconds(self, shape: Shape, machine: Machine) -> Estimate:
        """Estimate the time and memory of this share on a machine."""
        flops = attention_flops(self.work, 1, shape.query_dim, shape.value_dim)
        computing = machine.attention(flops) + 2 * self.calls * machine.launch
        beside = machine.transfer(*self.hidden)
        beside -= machine.overlap * min(computing, beside)
        messages = beside + machine.transfer(*self.shown) + self.copied / machine.memory
        return Estimate(computing, messages, self.peak)


def estimate(found: Sequence[Share], shape: Shape, machine: Machine) -> Estimate:
    """Estimate a layer on its slowest rank, given the share of each rank."""
    times = [share.seconds(shape, machine) for share in found]
    peak = max(share.peak for share in found)
    slowest = replace(max(times, key=lambda time: time.total), peak=peak)
    if machine.cores is None:
        return slowest
    # Ranks that share cores finish when the work of all of them is done.
    shared = min(machine.node, len(times)) / machine.cores / len(times)
    together = Estimate(sum(t.computing for t in times) * shared, sum(t.messages for t in times) * shared, peak)
    return max(slowest, together, key=lambda time: time.total)


def shares(
    comm_type: str,
    inner: int,
    layout: Layout,
    counts: Counts,
    shape: Shape,
    machine: Machine,
    together: int = 1,
    groups: int = 1,
) -> list[Share]:
    """Work and traffic of each rank.

    Each rank is assumed to send as many tokens as it reads. Summed over all ranks the two are equal.

    Args:
        counts: the workloads; see `counts_of`.
        together: owners at each step of a ring.
        groups: groups of heads.
    """
    one = shape_of_group(shape, inner, groups)
    if inner > 1:
        found = _shares_of_heads(inner, layout.size, counts, shape, one, machine, together)
    else:
        found = _shares_of_tokens(comm_type, layout, counts, shape, one, machine, together)
    if groups == 1:
        return found
    results = [results_of_groups(shape, tokens, groups) for tokens in counts(1).tokens]
    return [share.in_groups(groups, more) for share, more in zip(found, results)]


def _shares_of_tokens(
    comm_type: str, layout: Layout, counts: Counts, shape: Shape, one: Shape, machine: Machine, together: int
) -> list[Share]:
    """Work and traffic of each rank if each computes the queries of its tokens.

    Args:
        one: shape of a group of heads, by which memory is counted.
    """
    here = counts(1)
    crosses, most = layout.size > machine.node, max(here.tokens)
    outside = max(0, layout.size - machine.node) / max(1, layout.size - 1)  # share of a rank's group on other nodes
    found = []
    for rank in range(layout.size):
        read, owners = here.read[rank], here.owners[rank]
        work, own_tokens = here.pairs[rank] * shape.heads, here.tokens[rank]
        call = one, machine.kernel, own_tokens
        if comm_type == "all_gather":
            traffic = _split(sum(bytes_of_keys(shape, shape.key_heads, read, read)), outside, 3 * owners)
            own = own_tokens * shape.key_value_numbers * shape.dtype.itemsize
            # In both passes the rank copies its own keys to the other ranks.
            copied = 4 * own + _adding(shape, read)
            # The sums of its own keys that arrive from other ranks, when the kernel is done, are taken to be as many
            # as those that leave.
            gathered = own_tokens + read
            sums = own_tokens + gathered
            peak = peak_of_backward(*call, gathered, here.documents[rank], own_tokens + gathered, sums, read)
            found.append(Share(work, 2, copied, shown=traffic, peak=peak))
        else:
            ring = ring_of_keys(work, 1 + owners, read, read, here.merged[rank], shape, crosses, together)
            found.append(ring._replace(peak=_peak_of_ring(*call, read, together * most, here.documents[rank])))
    return found


def _shares_of_heads(
    inner: int, size: int, counts: Counts, shape: Shape, one: Shape, machine: Machine, together: int
) -> list[Share]:
    """Work and traffic of each rank if subgroups exchange heads."""
    here, outer = counts(1), counts(inner)
    found = []
    for rank in range(size):
        group = rank // inner
        first, last = group * inner, (group + 1) * inner
        shared, copied, exchanged = exchange_of_heads(rank, here.exchanged[first:last], shape, machine)
        heads, own = len(shared.mine), here.own_pairs[rank]
        work = (outer.pairs[group] - sum(here.own_pairs[first:last])) * heads + own * shape.heads
        read, calls = outer.read[group], 1 + outer.owners[group] + (own > 0)
        here_shape = shape._replace(heads=heads, key_heads=shared.key_heads)
        crosses = size > machine.node
        ring = ring_of_keys(work, calls, read, read, outer.merged[group], here_shape, crosses, together)
        tokens, most = outer.tokens[group], together * max(outer.tokens)
        of_group = (
            here_shape if one == shape else one._replace(heads=one.heads // inner, key_heads=one.key_heads // inner)
        )
        peak = _peak_of_ring(of_group, machine.kernel, tokens, read, most, outer.documents[group])
        peak += tokens * of_group.heads * shape.value_dim * shape.dtype.itemsize  # gradients of outputs, exchanged
        found.append(ring._replace(copied=ring.copied + copied, shown=exchanged, peak=peak))
    return found


def _peak_of_ring(shape: Shape, kernel: str, tokens: int, read: int, most: int, documents: int) -> float:
    """Bytes that a rank needs at the peak of a ring.

    Beside its own, it holds the keys/values of the step and of the next, the sums of gradients of the step before and
    as many that arrive, and then those of this step.

    Args:
        tokens: tokens of the rank.
        read: tokens of other ranks that it reads.
        most: most tokens of a step.
        documents: number of documents that the rank has tokens of.
    """
    steps = [tokens] + [min(most, read - begin) for begin in range(0, read, max(1, most))]
    peaks = []
    for number, now in enumerate(steps):
        is_own = number == 0
        before = steps[number - 1] if number > 1 else 0
        following = steps[number + 1] if number + 1 < len(steps) else 0
        held = tokens + following + (0 if is_own else now)
        sums, later = tokens + 2 * before, 0 if is_own else now
        peaks.append(peak_of_backward(shape, kernel, tokens, now, documents, held, sums, later))
    return max(peaks)


def ring_of_keys(
    work: int, calls: int, keys: int, gradients: int, merged: int, shape: Shape, crosses: bool, together: int = 1
) -> Share:
    """Work and traffic of a rank that computes while keys travel around the ring.

    Args:
        work: query-key pairs, counted for each head.
        calls: kernel calls of one pass, if the keys of each owner are computed apart.
        keys: tokens whose keys/values the rank sends in each pass.
        gradients: tokens whose key/value gradients the rank sends.
        merged: rows of outputs that it merges, if the keys of each owner are computed apart.
        crosses: True if the ring crosses nodes. Then the ranks at the edge of a node get all keys from another node,
            and the other ranks wait for them.
        together: owners whose keys are computed with at each step.
    """
    steps = -(-(calls - 1) // together)
    merged, calls = merged * steps // max(1, calls - 1), 1 + steps
    sent = sum(bytes_of_keys(shape, shape.key_heads, keys, gradients))
    copied = merged_bytes(shape, merged, shape.heads) + _adding(shape, keys)
    return Share(work, calls, copied, _split(sent, float(crosses), 3 * (calls - 1)))


def exchange_of_heads(
    rank: int, counts: Sequence[int], shape: Shape, machine: Machine
) -> tuple[SharedHeads, float, Traffic]:
    """Heads, copied bytes and traffic of a rank whose subgroup of neighbours exchanges heads.

    Args:
        counts: number of tokens that travel from each rank of the subgroup.
    """
    inner, first = len(counts), rank - rank % len(counts)
    tokens = TokenExchange(None, rank - first, counts[rank - first], None, counts, (), sum(counts))
    shared = SharedHeads(tokens, shape.heads, shape.key_heads, torch.device("cpu"))
    sent = sum(bytes_of_heads(shape, shared))
    outside = sum(other // machine.node != rank // machine.node for other in range(first, first + inner))
    # What leaves and what arrives is read and written once. So is this rank's own part, which is never packed.
    copied = sent * (4 + 2 / (inner - 1))
    return shared, copied, _split(sent, outside / (inner - 1), 4 * (inner - 1))


def _split(sent: float, far: float, messages: int) -> Traffic:
    """Divide `sent` bytes into those within the node and the share `far` to other nodes."""
    return Traffic(sent * (1 - far), sent * far, messages if sent else 0)


def _adding(shape: Shape, tokens: int) -> float:
    """Bytes read and written to add up the key/value gradients that arrive."""
    return tokens * shape.key_value_numbers * 3 * accumulation_dtype(shape.dtype).itemsize
