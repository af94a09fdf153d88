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
        work: may be called from several threads, and on any CUDA stream. What it raises is raised here.
        device: where the tensors are.
    """
    if device.type != "cuda" or len(items) < 2:
        with torch.no_grad():
            return [work(item) for item in items]
    _load_solvers(device)
    own = threading.local()
    main = torch.cuda.current_stream(device)

    def start() -> None:
        own.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def one(item: Item) -> Result:
        own.stream.wait_stream(main)
        with torch.no_grad(), torch.cuda.stream(own.stream):
            result = work(item)
        own.stream.synchronize()
        return result

    with ThreadPoolExecutor(min(THREADS, len(items)), initializer=start) as pool:
        return list(pool.map(one, items))


@cache
def _load_solvers(device: torch.device) -> None:
    """PyTorch loads its solvers for GPUs when one is first used, and fails when two threads are the first."""
    torch.linalg.cholesky(torch.eye(1, device=device))
