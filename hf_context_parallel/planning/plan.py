"""Who must see whom, and what travels for it: built once a batch on the host, executed by every layer.

A rank meets the keys of the others in `size` steps. At step k it computes with the keys of rank r + k (its owner), so
that in a step every rank has a different owner. The keys come from rank r + 1 where that rank read the same keys in
the step before, and straight from their owner where it did not. So each rank receives what it reads, once, and nothing
else, whatever the mask; and where neighbours read the same keys, which for one long document is everywhere, they
travel as in a ring: from neighbour to neighbour.

Partial sums of key and value gradients follow the keys one step behind. Each reader adds its own and hands them to the
next reader that got those keys from it, the last one to the owner.

Tokens are numbered on their rank: row b's token i is b * local_length + i. Sets of tokens are intervals of those
numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from .intervals import Interval, total
from .layout import Layout
from .mask import Mask
from .read_sets import ReadSets, within
from .tiles import Segments


class Transfer(NamedTuple):
    """Tokens `[start, stop)` of a buffer, to or from rank `peer` of the group."""

    peer: int
    start: int
    stop: int


@dataclass(frozen=True)
class Step:
    """What one rank does at one step. Ranges are of the step's key buffer, unless said otherwise.

    Args:
        tokens: length of the key buffer, which holds what this rank reads of the owner's keys. At step 0 the buffer
            is this rank's own keys, all of them.
        calls: the tiles to compute, as kernel calls.
        receives: where the keys come from.
        forwards: keys to send on to rank r - 1, as ranges of the buffer of the step before.
        direct_sends: keys to send to readers that have no neighbour to get them from, as ranges of this rank's own
            keys.
        grad_receives: partial gradients to add to this rank's.
        grad_sends: to whom the sum goes.
        grad_returns: finished partial gradients from the last reader, as ranges of this rank's own keys.
    """

    tokens: int
    calls: tuple[Segments, ...]
    receives: tuple[Transfer, ...] = ()
    forwards: tuple[Transfer, ...] = ()
    direct_sends: tuple[Transfer, ...] = ()
    grad_receives: tuple[Transfer, ...] = ()
    grad_sends: tuple[Transfer, ...] = ()
    grad_returns: tuple[Transfer, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What one rank computes and moves for one batch and mask.

    Args:
        rank, size: this rank and the ranks of its group.
        tokens: how many tokens this rank holds, all rows counted.
        steps: the first is of this rank's own keys. In a ring there is one a rank.
    """

    rank: int
    size: int
    tokens: int
    steps: tuple[Step, ...]

    @property
    def pairs(self) -> int:
        """Query-key pairs that this rank computes."""
        return sum(call.pairs for step in self.steps for call in step.calls)

    @property
    def sent_keys(self) -> int:
        """Tokens whose keys and values this rank sends in a forward pass."""
        return self._others((*step.forwards, *step.direct_sends) for step in self.steps)

    @property
    def sent_gradients(self) -> int:
        """Tokens whose partial gradients this rank sends in a backward pass."""
        return self._others(step.grad_sends for step in self.steps)

    def _others(self, of_steps: Iterable[tuple[Transfer, ...]]) -> int:
        """The tokens of transfers to other ranks."""
        return sum(t.stop - t.start for transfers in of_steps for t in transfers if t.peer != self.rank)


def build_plan(layout: Layout, mask: Mask, rank: int) -> Plan:
    """The plan of `rank` for a batch with this mask, dealt to the ranks by this layout."""
    reads = ReadSets(layout, mask)
    steps = [_own_step(reads, rank)]
    steps += [_step(reads, rank, distance) for distance in range(1, layout.size)]
    return Plan(rank, layout.size, steps[0].tokens, tuple(steps))


def build_own_plan(layout: Layout, mask: Mask, rank: int) -> Plan:
    """The plan of `rank` for documents that lie on one rank each: nothing travels."""
    step = _own_step(ReadSets(layout, mask), rank)
    return Plan(rank, layout.size, step.tokens, (step,))


def build_gathering_plan(layout: Layout, mask: Mask, rank: int) -> Plan:
    """A plan of `rank` in which all that it reads arrives at once, before anything is computed.

    The second step's buffer has the keys in the order of the sequence, document by document, those of this rank
    included, which it sends to itself. So queries that are neighbours in the sequence make one tile with all keys that
    they read, and there is nothing to merge. A causal or full mask takes two kernel calls at most: of zigzag's two
    chunks, so that no call has keys twice.
    """
    reads = ReadSets(layout, mask)
    tokens = reads.tokens(rank)
    gathered = reads.gathered(rank)
    arrivals = tuple(Transfer(key.owner, key.at, key.at + key.stop - key.start) for key in gathered)
    departures = tuple(
        Transfer(reader, key.start, key.stop)
        for reader in range(layout.size)
        for key in (gathered if reader == rank else reads.gathered(reader))
        if key.owner == rank
    )
    computing = Step(
        tokens=arrivals[-1].stop if arrivals else 0,
        calls=reads.gathered_calls(rank, gathered),
        receives=arrivals,
        direct_sends=departures,
        grad_sends=arrivals,
        grad_returns=departures,
    )
    return Plan(rank, layout.size, tokens, (Step(tokens, ()), computing))


def _own_step(reads: ReadSets, rank: int) -> Step:
    """The step with this rank's own keys."""
    tokens = reads.tokens(rank)
    return Step(tokens, reads.calls(rank, rank, ((0, tokens),) if tokens else ()))


def _step(reads: ReadSets, rank: int, distance: int) -> Step:
    """Step `distance` of `rank`."""
    size = reads.layout.size
    owner, reader = (rank + distance) % size, (rank - distance) % size
    before, after = (rank - 1) % size, (rank + 1) % size
    held = reads.needed(rank, owner)
    # The sender's lists and the receiver's are made from the same sets, in the same order, so they match.
    relayed, direct = reads.relayed(rank, owner), reads.direct(rank, owner)
    previous_owner = (rank + distance - 1) % size
    sent_on = reads.relayed(before, previous_owner)
    passed, home = reads.relayed(before, owner), reads.last(rank, owner)
    return Step(
        tokens=total(held),
        calls=reads.calls(rank, owner, held),
        receives=_transfers(after, relayed, held) + _transfers(owner, direct, held),
        forwards=_transfers(before, sent_on, reads.needed(rank, previous_owner)),
        direct_sends=tuple(Transfer(reader, *interval) for interval in reads.direct(reader, rank)),
        grad_receives=_transfers(after, relayed, held),
        grad_sends=_transfers(before, passed, held) + _transfers(owner, home, held),
        grad_returns=tuple(Transfer(reader, *interval) for interval in reads.last(reader, rank)),
    )


def _transfers(peer: int, intervals: list[Interval], buffer: list[Interval]) -> tuple[Transfer, ...]:
    """Transfers of `intervals` of a rank's tokens, as ranges of `buffer`."""
    return tuple(Transfer(peer, *within(interval, buffer)) for interval in intervals)
