"""Layouts of batches in tests of models, whose rows are too short to be dealt in small chunks."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from hf_context_parallel.data import shard
from hf_context_parallel.planning import balanced
from hf_context_parallel.planning.balanced import padded_layout
from hf_context_parallel.planning.layout import Layout


@contextmanager
def finely_dealt() -> Iterator[list[Layout]]:
    """Deal batches in chunks of one token and more, and list their layouts."""
    dealt: list[Layout] = []

    def noting(*how):
        dealt.append(padded_layout(*how))
        return dealt[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(balanced, "FINEST", 1)
        patch.setattr(balanced, "LEAST", 1)
        patch.setattr(shard, "padded_layout", noting)
        yield dealt
