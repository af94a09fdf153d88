"""The same work on many tensors at once, where one of them would leave a GPU idle.

A decomposition of one matrix is a long row of small kernels with the host in between, and PyTorch takes a batch of them
one after the other (eigenvectors of more than 32 rows: pytorch/pytorch#174674). Threads with a CUDA stream each fill
the gaps of one with the kernels of the others. On a CPU the libraries use all cores themselves.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

THREADS = 8

Item = TypeVar("Item")
Result = TypeVar("Result")


def side_by_side(work: Callable[[Item], Result], items: Sequence[Item], device: torch.device) -> list[Result]:
    """`[work(item) for item in items]` without gradients, on a GPU several at a time; all is done at the return.

    Args:
        work: may be called from several threads, and on any CUDA stream. What it raises is raised here. A tensor that
            an item keeps from an earlier call it may drop only after the device has used it, as it has when a number
            was read since: its memory belongs to another stream.
        device: where the tensors are.
    """
    if device.type != "cuda" or len(items) < 2:
        with torch.no_grad():
            return [work(item) for item in items]
    return _threads(device, THREADS).map(work, items)


class _Threads:
    """Threads with a CUDA stream each, kept: libraries keep some memory for every thread and stream."""

    def __init__(self, device: torch.device, count: int) -> None:
        # PyTorch loads its solvers when one is first used, and fails when two threads are the first.
        torch.linalg.cholesky(torch.eye(1, device=device))
        self._device, self._own = device, threading.local()
        self._pool = ThreadPoolExecutor(count, initializer=self._start)

    def map(self, work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        main = torch.cuda.current_stream(self._device)

        def one(item: Item) -> Result:
            stream = self._own.stream
            stream.wait_stream(main)
            try:
                with torch.no_grad(), torch.cuda.stream(stream):
                    return work(item)
            finally:
                stream.synchronize()

        return list(self._pool.map(one, items))

    def _start(self) -> None:
        self._own.stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]


_threads = cache(_Threads)
