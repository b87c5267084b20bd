"""How the score of a query and a key is made, and what becomes of the weights."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch


class Scores(NamedTuple):
    """How the score of a query and a key is made, and what becomes of the weights.

    Args:
        scale: what their product is multiplied with.
        softcap: c of `c * tanh(score / c)`, or None.
        dropout_p: the probability that a weight is left out, the others growing by 1 / (1 - dropout_p).
        seed: of which weights are left out. A kernel that is called with the same seed leaves out the same.
        deterministic: the same bits from the same tensors.
    """

    scale: float
    softcap: float | None = None
    dropout_p: float = 0.0
    seed: int = 0
    deterministic: bool = False

    def of(self, *part: object) -> Scores:
        """These for a part of the work that has a name, with a seed of its own."""
        return self._replace(seed=seed_of(self.seed, *part)) if self.dropout_p else self


def seed_of(*numbers: object) -> int:
    """63 bits that differ wherever the numbers do."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def make_scores(
    query: torch.Tensor, scale: float | None, softcap: float | None, dropout_p: float, deterministic: bool
) -> Scores:
    """Scores as a caller asks for them. Dropout's seed is drawn from torch's default generator, on the host.

    Raises:
        ValueError: naming the value that cannot be.
    """
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap={softcap!r} must be greater than 0 and finite, or None for none.")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p={dropout_p!r} must be at least 0 and less than 1.")
    seed = int(torch.empty((), dtype=torch.int64).random_()) if dropout_p else 0
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return Scores(scale, softcap, dropout_p, seed, deterministic)
