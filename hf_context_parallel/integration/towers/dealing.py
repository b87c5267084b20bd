"""Dealing of the items that a tower encodes to ranks, by their costs. Host integers only, the same on all ranks."""

from __future__ import annotations

from collections.abc import Sequence


def dealt(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """Deal items to ranks, the most expensive first, each to the rank that has the least so far.

    Returns:
        The items of each rank, in ascending order.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for item in sorted(range(len(costs)), key=lambda item: (-costs[item], item)):
        rank = loads.index(min(loads))
        shares[rank].append(item)
        loads[rank] += costs[item]
    return [sorted(share) for share in shares]


def dealt_in_order(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """Deal items to ranks so that the items of a rank follow those of the rank before, with the least largest load.

    Returns:
        The items of each rank, in ascending order.
    """
    low, high = max(costs, default=0), sum(costs)
    while low < high:
        middle = (low + high) // 2
        if len(_filled(costs, middle)) <= ranks:
            high = middle
        else:
            low = middle + 1
    shares = _filled(costs, low)
    return shares + [[] for _ in range(ranks - len(shares))]


def _filled(costs: Sequence[int], most: int) -> list[list[int]]:
    """Fill shares in order, each with a load of at most `most`."""
    shares: list[list[int]] = [[]]
    load = 0
    for item, cost in enumerate(costs):
        if load + cost > most:
            shares.append([])
            load = 0
        shares[-1].append(item)
        load += cost
    return shares
