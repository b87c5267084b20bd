"""Some heads of tensors `[T, H, ...]`, and the groups of heads that are computed one after another.

No head needs another one. So what attention needs beside its inputs and results exists for the heads of one group at a
time: packed keys of other ranks, sums of their gradients, exchanged heads, and what kernels allocate. As many bytes
are sent, by as many times more messages and kernel calls as there are groups. (For all-to-all, this is the idea of
Ghadia et al., "Untied Ulysses", 2026, arXiv:2602.21196.)
"""

from __future__ import annotations

import torch

from ..distributed.token_exchange import deal_heads


def most_groups(key_heads: int, inner: int) -> int:
    """Number of groups at most, so that a key head goes to no more ranks than in one group.

    Args:
        inner: number of ranks that exchange heads. Each of them has as many key heads of a group.
    """
    return key_heads // inner if key_heads % inner == 0 else 1


def heads_of_groups(heads: int, key_heads: int, inner: int, groups: int) -> list[tuple[range, range]]:
    """List the query heads and the key heads of each group, in order. There are `most_groups` at most."""
    groups = min(groups, most_groups(key_heads, inner))
    if groups == 1:
        return [(range(heads), range(key_heads))]
    ratio = heads // key_heads
    dealt = (range(part.start * inner, part.stop * inner) for part in deal_heads(key_heads // inner, groups))
    return [(range(keys.start * ratio, keys.stop * ratio), keys) for keys in dealt]


def heads_of(tensor: torch.Tensor, heads: range) -> torch.Tensor:
    """View heads of a tensor. The view has no part in a graph, which would keep itself alive if it saved it."""
    return tensor if len(heads) == tensor.shape[1] else tensor.detach()[:, heads.start : heads.stop]


def with_heads(
    whole: torch.Tensor | None, part: torch.Tensor, heads: range, total: int, add: bool = False
) -> torch.Tensor:
    """Write the heads of a part to a whole of `total` heads, and return it.

    Args:
        whole: what was written before. It is made if it is None, unless the part has all heads.
        add: True to add the part.
    """
    if whole is None:
        if len(heads) == total:
            return part
        whole = part.new_empty(len(part), total, *part.shape[2:])
    place = whole[:, heads.start : heads.stop]
    if add:
        place += part
    else:
        place.copy_(part)
    return whole
