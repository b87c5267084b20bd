"""Cache of what was made last, so that batches that are alike are planned once."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Recent(Generic[Value]):
    """Values by what they depend on. The one that was not used for longest is forgotten first.

    A value may be made twice, and it is the same then. So ranks need not forget the same ones, and a value may come
    from another process.

    Args:
        most: the most values.
        most_bytes: the most bytes of all values but the last.
        bytes_of: bytes of a value.
    """

    def __init__(self, most: int, most_bytes: float = math.inf, bytes_of: Callable[[Value], int] = lambda _: 0):
        self._most, self._most_bytes, self._bytes_of = most, most_bytes, bytes_of
        self._bytes = 0
        self._kept: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()
        self._lock = threading.Lock()
        self._made: list[tuple[Hashable, Value]] | None = None

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """Return the value of a key, which is made if it is not kept."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key][0]
        value = make()
        if self._made is not None:
            self._made.append((key, value))
        return self.put(key, value)

    def put(self, key: Hashable, value: Value) -> Value:
        """Keep the value of a key, and return the one that is kept: an earlier one, if there is one."""
        size = self._bytes_of(value)
        with self._lock:
            if key not in self._kept:
                while self._kept and (len(self._kept) >= self._most or self._bytes > self._most_bytes):
                    self._bytes -= self._kept.popitem(last=False)[1][1]
                self._kept[key] = value, size
                self._bytes += size
            return self._kept[key][0]

    def take_made(self) -> list[tuple[Hashable, Value]]:
        """Return what was made since the last call. The first call returns nothing, and begins to take note."""
        made, self._made = self._made or [], []
        return made
