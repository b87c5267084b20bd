"""Scores: the rule by which scores of query-key pairs become attention weights."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch


class Scores(NamedTuple):
    """Rule by which scores of query-key pairs become attention weights.

    Args:
        scale: factor of the product of query and key.
        softcap: c in `c * tanh(score / c)`, or None for no softcap.
        dropout_p: probability that a weight is dropped. The others are multiplied by 1 / (1 - dropout_p).
        seed: seed of dropout. A kernel that is called with the same seed drops the same weights.
        deterministic: True for the same bits from the same tensors.
    """

    scale: float
    softcap: float | None = None
    dropout_p: float = 0.0
    seed: int = 0
    deterministic: bool = False

    def of(self, *part: object) -> Scores:
        """Scores for a named part of the work, with a seed of its own."""
        return self._replace(seed=seed_of(self.seed, *part)) if self.dropout_p else self


def seed_of(*numbers: object) -> int:
    """Hash the numbers to a seed of 63 bits."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def make_scores(
    query: torch.Tensor, scale: float | None, softcap: float | None, dropout_p: float, deterministic: bool
) -> Scores:
    """Make the scores that a caller asks for.

    The seed of dropout is drawn from torch's default generator, on the host.

    Raises:
        ValueError: if `softcap` or `dropout_p` is out of range.
    """
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap={softcap!r} is not positive and finite. Give such a number, or None for none.")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p={dropout_p!r} is out of range. Give a number that is at least 0 and less than 1.")
    seed = int(torch.empty((), dtype=torch.int64).random_()) if dropout_p else 0
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return Scores(scale, softcap, dropout_p, seed, deterministic)
