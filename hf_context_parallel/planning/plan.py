"""Plans: what each rank computes and sends. They are made once a batch on the host, and every layer executes them.

Rank r computes with the keys of all ranks in `size` steps. At step k it computes with the keys of rank r + k, their
owner. So in each step every rank has a different owner. If rank r + 1 read the same keys in the step before, they are
forwarded from rank r + 1. Otherwise they come straight from their owner. So each rank receives every key that it
reads, once, and no other key, whatever the mask. Neighbours that read the same keys pass them on as in a ring. In one
long document all keys travel in this way.

A step may have several owners, `together`: at step k those from rank r + (k - 1) * together + 1 on. Keys are then
forwarded from rank r + together.

Partial sums of key/value gradients follow the keys one step behind. Each reader adds its own gradients to the sum. It
sends the sum to the rank that it forwarded those keys to. The last reader sends the sum to the owner.

Tokens are numbered on their rank: row b's token i is b * local_length + i. Sets of tokens are intervals of those
numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from .intervals import Interval, total
from .layout import Layout
from .mask import Mask
from .read_sets import Buffer, Pair, ReadSets
from .tiles import Segments, joined

FEW_RUNS = 2
"""Largest number of runs between two ranks that are sent as messages of their own, as the two chunks of zigzag are."""


class Transfer(NamedTuple):
    """One message to or from rank `peer` of the group: rows of a buffer, in the order in which they travel."""

    peer: int
    rows: tuple[Interval, ...]

    @property
    def tokens(self) -> int:
        """Number of rows."""
        return total(self.rows)


@dataclass(frozen=True)
class Step:
    """Work and messages of one rank at one step. Ranges are of the key buffer of the step, unless said otherwise.

    Args:
        tokens: length of the key buffer, which holds the owners' keys that this rank reads. At step 0 the buffer
            holds all keys of this rank.
        calls: the tiles to compute, as kernel calls.
        receives: keys that arrive, and the ranks that send them.
        forwards: keys to send on to rank r - together, as ranges of the buffer of the step before.
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
        steps: the first one computes with this rank's own keys.
    """

    rank: int
    size: int
    tokens: int
    steps: tuple[Step, ...]

    @cached_property
    def kept(self) -> dict[str, Any]:
        """Cache in which the ring keeps what it makes of the plan, since every layer executes the same plan."""
        return {}

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
        return sum(t.tokens for transfers in of_steps for t in transfers if t.peer != self.rank)


def build_plan(layout: Layout, mask: Mask, rank: int, readers: Mask | None = None, together: int = 1) -> Plan:
    """Make the plan of `rank` for a batch with this mask, dealt to the ranks by this layout.

    Args:
        readers: tokens that read the documents in place of their own tokens; see `readers_in_padding`.
        together: number of owners whose keys are computed with at each step.
    """
    reads = ReadSets(layout, mask, readers, together)
    steps = [_own_step(reads, rank), *(_step(reads, rank, number) for number in reads.steps())]
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
    departures: tuple[Transfer, ...] = ()
    arrivals: dict[int, tuple[Transfer, ...]] = {}
    for other in range(layout.size):
        arrivals[other] = _transfers(other, _of_owner(gathered, other))[1]
        theirs = gathered if other == rank else reads.gathered(other)
        departures += _transfers(other, _of_owner(theirs, rank))[0]
    arriving = tuple(transfer for transfers in arrivals.values() for transfer in transfers)
    computing = Step(
        tokens=gathered.tokens,
        calls=reads.gathered_calls(rank, gathered),
        receives=arriving,
        direct_sends=departures,
        grad_sends=arriving,
        grad_returns=departures,
    )
    return Plan(rank, layout.size, tokens, (Step(tokens, ()), computing))


def _of_owner(buffer: Buffer, owner: int) -> list[Pair]:
    """Rows of an owner that a buffer holds, and rows of the buffer."""
    held = (keys for keys in buffer.held if keys.owner == owner)
    return [((keys.start, keys.stop), (keys.at, keys.at + keys.stop - keys.start)) for keys in held]


def _own_step(reads: ReadSets, rank: int) -> Step:
    """Make the step with the own keys of `rank`."""
    tokens = reads.tokens(rank)
    return Step(tokens, reads.own_calls(rank) if tokens else ())


def _step(reads: ReadSets, rank: int, number: int) -> Step:
    """Make a step of `rank` with keys of other ranks."""
    size = reads.layout.size
    before, after = (rank - reads.together) % size, (rank + reads.together) % size
    receives = _transfers(after, reads.forwards(rank, number))[1]
    direct_sends: tuple[Transfer, ...] = ()
    grad_returns: tuple[Transfer, ...] = ()
    returned: tuple[Transfer, ...] = ()
    # Sender and receiver make their messages from the same pairs, in the same order, so the messages match.
    for distance in reads.distances_of(number):
        owner, reader = (rank + distance) % size, (rank - distance) % size
        receives += _transfers(owner, reads.direct(rank, number, distance))[1]
        direct_sends += _transfers(reader, reads.direct(reader, number, distance))[0]
        returned += _transfers(owner, reads.last(rank, number, distance))[1]
        grad_returns += _transfers(reader, reads.last(reader, number, distance))[0]
    return Step(
        tokens=reads.buffer(rank, number).tokens,
        calls=reads.calls(rank, number),
        receives=receives,
        forwards=_transfers(before, reads.forwards(before, number))[0],
        direct_sends=direct_sends,
        grad_receives=_transfers(after, reads.forwards(rank, number))[1],
        grad_sends=_transfers(before, reads.forwards(before, number + 1))[0] + returned,
        grad_returns=grad_returns,
    )


def _transfers(peer: int, pairs: list[Pair]) -> tuple[tuple[Transfer, ...], tuple[Transfer, ...]]:
    """Make the transfers between a rank and `peer`, on both sides: one message, or a message for each of few runs.

    A run lies side by side on both sides, so it is sent from where it lies, and lands where it is used. More runs are
    packed into one message.
    """
    runs: list[Pair] = []
    for here, there in pairs:
        if runs and (runs[-1][0][1], runs[-1][1][1]) == (here[0], there[0]):
            here, there = (runs[-1][0][0], here[1]), (runs.pop()[1][0], there[1])
        runs.append((here, there))
    messages = [(run,) for run in runs] if len(runs) <= FEW_RUNS else [tuple(runs)]
    sides = ([joined(tuple(run[side] for run in message)) for message in messages] for side in (0, 1))
    left, right = (tuple(Transfer(peer, rows) for rows in side) for side in sides)
    return left, right
