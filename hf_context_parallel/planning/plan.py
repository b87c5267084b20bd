"""Plans: what each rank computes and sends. They are made once a batch on the host, and every layer executes them.

Rank r computes with the keys of all ranks in `size` steps. At step k it computes with the keys of rank r + k, their
owner. So in each step every rank has a different owner. If rank r + 1 read the same keys in the step before, they are
forwarded from rank r + 1. Otherwise they come straight from their owner. So each rank receives every key that it
reads, once, and no other key, whatever the mask. Neighbours that read the same keys pass them on as in a ring. In one
long document all keys travel in this way.

Partial sums of key/value gradients follow the keys one step behind. Each reader adds its own gradients to the sum. It
sends the sum to the rank that it forwarded those keys to. The last reader sends the sum to the owner.

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
    """Work and messages of one rank at one step. Ranges are of the key buffer of the step, unless said otherwise.

    Args:
        tokens: length of the key buffer, which holds the owner's keys that this rank reads. At step 0 the buffer
            holds all keys of this rank.
        calls: the tiles to compute, as kernel calls.
        receives: keys that arrive, and the ranks that send them.
        forwards: keys to send on to rank r - 1, as ranges of the buffer of the step before.
        direct_sends: keys to send to readers whose neighbour has not read them, as ranges of this rank's own keys.
        grad_receives: partial gradients to add to those of this rank.
        grad_sends: sums of gradients to send on, and the ranks that receive them.
        grad_returns: sums of gradients that arrive from the last readers, as ranges of this rank's own keys.
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
    """Work and messages of one rank for one batch and mask.

    Example: one causal document of 16 tokens on 4 ranks, in zigzag. The rows are positions in the sequence.

                         rank 0       rank 1       rank 2       rank 3
        queries          0 1 14 15    2 3 12 13    4 5 10 11    6 7 8 9
        keys at step 0   0 1 14 15    2 3 12 13    4 5 10 11    6 7 8 9      its own
        keys at step 1   2 3 12 13    4 5 10 11    6 7 8 9      0 1          of rank r + 1
        keys at step 2   4 5 10 11    6 7 8 9      0 1          2 3          of rank r + 2
        keys at step 3   6 7 8 9      0 1          2 3          4 5          of rank r + 3

    All keys that rank r receives come from rank r + 1 (those of rank 3 from rank 0). At step 1 they are keys of rank
    r + 1 itself, later they are keys that it forwards. Keys that no further rank reads are not forwarded: rank 0
    forwards 4 5, and not 10 11. So the gradients of 10 11 return to rank 2 from rank 0, their last reader. Those of
    4 5 are summed on ranks 1, 0 and 3, and return from rank 3.

    Args:
        rank, size: this rank and the ranks of its group.
        tokens: number of tokens that this rank holds, all rows counted.
        steps: the first one computes with this rank's own keys. In a ring there are as many steps as ranks.
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
        """Count the tokens of transfers to other ranks."""
        return sum(t.stop - t.start for transfers in of_steps for t in transfers if t.peer != self.rank)


def build_plan(layout: Layout, mask: Mask, rank: int, readers: Mask | None = None) -> Plan:
    """Make the plan of `rank` for a batch with this mask, dealt to the ranks by this layout.

    Args:
        readers: tokens that read the documents in place of their own tokens; see `readers_in_padding`.
    """
    reads = ReadSets(layout, mask, readers)
    steps = [_own_step(reads, rank)]
    steps += [_step(reads, rank, distance) for distance in range(1, layout.size)]
    return Plan(rank, layout.size, steps[0].tokens, tuple(steps))


def build_own_plan(layout: Layout, mask: Mask, rank: int) -> Plan:
    """Make the plan of `rank` for documents that lie on one rank each, so that nothing travels."""
    step = _own_step(ReadSets(layout, mask), rank)
    return Plan(rank, layout.size, step.tokens, (step,))


def build_gathering_plan(layout: Layout, mask: Mask, rank: int) -> Plan:
    """Make a plan of `rank` in which all keys that it reads arrive at once, before anything is computed.

    The buffer of the second step holds the keys document by document, in the order of the sequence. They include the
    keys of this rank, which it sends to itself. So queries that are neighbours in the sequence make one tile with all
    keys that they read, and nothing has to be merged. A causal or full mask takes at most two kernel calls in zigzag,
    one for each chunk of the rank, so that no call has the same keys twice.
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
    """Make the step with the own keys of `rank`."""
    tokens = reads.tokens(rank)
    return Step(tokens, reads.calls(rank, rank, ((0, tokens),) if tokens else ()))


def _step(reads: ReadSets, rank: int, distance: int) -> Step:
    """Make step `distance` of `rank`."""
    size = reads.layout.size
    owner, reader = (rank + distance) % size, (rank - distance) % size
    before, after = (rank - 1) % size, (rank + 1) % size
    held = reads.needed(rank, owner)
    # Sender and receiver make their lists from the same sets, in the same order, so the lists match.
    forwarded, direct = reads.forwarded(rank, owner), reads.direct(rank, owner)
    previous_owner = (rank + distance - 1) % size
    sent_on = reads.forwarded(before, previous_owner)
    passed, returned = reads.forwarded(before, owner), reads.last(rank, owner)
    return Step(
        tokens=total(held),
        calls=reads.calls(rank, owner, held),
        receives=_transfers(after, forwarded, held) + _transfers(owner, direct, held),
        forwards=_transfers(before, sent_on, reads.needed(rank, previous_owner)),
        direct_sends=tuple(Transfer(reader, *interval) for interval in reads.direct(reader, rank)),
        grad_receives=_transfers(after, forwarded, held),
        grad_sends=_transfers(before, passed, held) + _transfers(owner, returned, held),
        grad_returns=tuple(Transfer(reader, *interval) for interval in reads.last(reader, rank)),
    )


def _transfers(peer: int, intervals: list[Interval], buffer: list[Interval]) -> tuple[Transfer, ...]:
    """Make transfers of `intervals`, which are of a rank's tokens, as ranges of `buffer`."""
    return tuple(Transfer(peer, *within(interval, buffer)) for interval in intervals)
