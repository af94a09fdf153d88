"""What is kept of images that were encoded: features under unguessable handles, within a budget of bytes."""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from samq.errors import BadInput, UsageError

HANDLE_BYTES = 24  # 192 random bits: nobody guesses the handle of another's image


class UnknownHandle(BadInput):
    """No image is kept under this handle, or not any more."""


@dataclass(frozen=True)
class Encoded:
    """One encoded image.

    Args:
        features: outputs of the image encoder by name, one image each.
        size: (H, W) of the image in pixels.
    """

    features: Mapping[str, NDArray[Any]]
    size: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes of the features."""
        return sum(array.nbytes for array in self.features.values())


class EmbeddingStore:
    """Encoded images by handle; the least recently used ones make room for new ones. Safe to use from many threads.

    Args:
        capacity: bytes that all features together may take.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._kept: OrderedDict[str, Encoded] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        with self._lock:
            return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Bytes that are taken."""
        with self._lock:
            return self._bytes

    def keep(self, encoded: Encoded) -> str:
        """Keep an image; returns its handle.

        Raises:
            UsageError: this one image is larger than the store.
        """
        if encoded.nbytes > self.capacity:
            raise UsageError(
                f"the features of one image take {encoded.nbytes} bytes, and the store {self.capacity}; "
                "raise store_mib in the config.pbtxt of `sam`"
            )
        handle = secrets.token_urlsafe(HANDLE_BYTES)
        with self._lock:
            self._kept[handle] = encoded
            self._bytes += encoded.nbytes
            while self._bytes > self.capacity:
                _, oldest = self._kept.popitem(last=False)
                self._bytes -= oldest.nbytes
        return handle

    def find(self, handle: str) -> Encoded:
        """The image under a handle, which now is the most recently used one.

        Raises:
            UnknownHandle: there is none.
        """
        with self._lock:
            encoded = self._kept.get(handle)
            if encoded is None:
                raise UnknownHandle("unknown handle: images are kept for a while only; send the image again")
            self._kept.move_to_end(handle)
            return encoded
