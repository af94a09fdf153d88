"""Items made one ahead of their use, in another thread: images are read while a model is busy with those before."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Ahead(Generic[Item]):
    """An iterator's items in their order, and what it raises in its place.

    Args:
        items: asked for the next item while the one before is in use.

    Attributes:
        waited: seconds that the user of the items has waited for them.
    """

    def __init__(self, items: Iterator[Item]) -> None:
        self._items = items
        self.waited = 0.0

    def __iter__(self) -> Iterator[Item]:
        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(self._next)
            while True:
                taken = self._wait(coming)
                if not taken:
                    return
                coming = pool.submit(self._next)
                yield taken[0]

    def _next(self) -> tuple[Item, ...]:
        """The next item, or nothing at the end: StopIteration would not pass through a future."""
        for item in self._items:
            return (item,)
        return ()

    def _wait(self, coming: Future[tuple[Item, ...]]) -> tuple[Item, ...]:
        started = time.monotonic()
        try:
            return coming.result()
        finally:
            self.waited += time.monotonic() - started
