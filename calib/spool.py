"""A list of tensors that outgrows memory: as many as a budget allows are kept where they are, the rest in files."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from samq.errors import MachineLacks

CPU_BUDGET = 2 << 30
CUDA_SHARE = 0.4  # of the memory that is free


def memory_budget(device: torch.device) -> int:
    """Bytes of tensors that a spool may leave on a device."""
    if device.type != "cuda":
        return CPU_BUDGET
    return int(CUDA_SHARE * torch.cuda.mem_get_info(device)[0])


class Spool:
    """Tensors by index. A context manager, which removes the files at its end.

    Args:
        budget: bytes of tensors that stay in memory.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._items: list[Tensor | Path] = []
        self._folder: Path | None = None

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Tensor:
        """The tensor; from a file, it comes on the CPU."""
        item = self._items[index]
        if isinstance(item, Tensor):
            return item
        read: Tensor = torch.load(item, weights_only=True)
        return read

    def append(self, tensor: Tensor) -> None:
        """Add a tensor at the end.

        Raises:
            MachineLacks: the disk is full or not writable.
        """
        self._items.append(self._put(len(self._items), tensor))

    def __setitem__(self, index: int, tensor: Tensor) -> None:
        """Put a tensor in the place of another, which is forgotten; raises what `append` does."""
        old = self._items[index]
        self._items[index] = tensor[:0]
        if isinstance(old, Path):
            old.unlink()
        self._items[index] = self._put(index, tensor)

    def in_memory(self) -> int:
        """Bytes of the tensors that are not in files."""
        return sum(item.nbytes for item in self._items if isinstance(item, Tensor))

    def _put(self, index: int, tensor: Tensor) -> Tensor | Path:
        if self.in_memory() + tensor.nbytes <= self.budget:
            return tensor.detach()
        try:
            if self._folder is None:
                self._folder = Path(tempfile.mkdtemp(prefix="samq-"))
            path = self._folder / f"{index}.pt"
            torch.save(tensor.detach().cpu().contiguous().clone(), path)
        except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into the latter
            raise MachineLacks(
                f"no room for calibration data in {tempfile.gettempdir()} ({error}); set TMPDIR to a larger disk, "
                "calib.num_samples lower, or calib.mode: one_pass"
            ) from error
        return path
