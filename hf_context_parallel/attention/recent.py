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

    A value may be made twice, and it is the same then. So ranks need not forget the same ones.

    Args:
        most: the most values.
        most_bytes: the most bytes of all values but the last.
    """

    def __init__(self, most: int, most_bytes: float = math.inf):
        self._most, self._most_bytes = most, most_bytes
        self._bytes = 0
        self._kept: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable, make: Callable[[], Value], bytes_of: Callable[[Value], int] = lambda _: 0) -> Value:
        """Return the value of a key, which is made if it is not kept.

        Args:
            bytes_of: bytes of a new value.
        """
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key][0]
        value = make()
        with self._lock:
            if key not in self._kept:
                size = bytes_of(value)
                while self._kept and (len(self._kept) >= self._most or self._bytes > self._most_bytes):
                    self._bytes -= self._kept.popitem(last=False)[1][1]
                self._kept[key] = value, size
                self._bytes += size
            return self._kept[key][0]
