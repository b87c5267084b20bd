"""Calls of the models around decoders: what they were given, for code that lies between them and the decoder."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from transformers import PreTrainedConfig, PreTrainedModel


class OuterCall:
    """Call of the outermost model with a whole batch, which its decoder is going to shard.

    Args:
        model: the model.
        decoder: its decoder.
        given: its arguments by name.
        is_alone: True if one rank computes the whole batch.
        compiler: what compiles the decoder, where the model around it is not compiled; see `compat.set_compiler`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        decoder: PreTrainedModel,
        given: Mapping[str, Any],
        is_alone: bool,
        compiler: Any = None,
    ):
        self.model, self.decoder, self.given = model, decoder, given
        self.is_alone, self.compiler = is_alone, compiler
        self.met_decoder = False
        """True once its decoder has begun. From then on, ranks wait for each other elsewhere."""

    @property
    def uses_padding(self) -> bool:
        """Return whether the caller may use outputs of the decoder at padding."""
        return True

    def is_of_decoder(self, config: PreTrainedConfig) -> bool:
        """Return whether a mask that is made for this configuration is one for the decoder, and not for a tower."""
        return type(config) in (type(self.decoder.config), type(self.model.config))


Call = TypeVar("Call", bound="OuterCall | None")


class _Calls(threading.local):
    """Stack of the calls that a thread is in. A None stands for no call."""

    def __init__(self) -> None:
        self.open: list[OuterCall | None] = []


_calls = _Calls()


def outer_call() -> OuterCall | None:
    """Return the innermost call that this thread is in, or None."""
    return _calls.open[-1] if _calls.open else None


@contextmanager
def in_call(call: Call) -> Iterator[Call]:
    """Make a call the innermost one in this block, and yield it."""
    _calls.open.append(call)
    try:
        yield call
    finally:
        _calls.open.pop()
