"""What every engine offers: named arrays in, named arrays out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from numpy.typing import NDArray

from samq.engines.kernels import Kernel

Arrays = Mapping[str, NDArray[Any]]


class Engine(Protocol):
    """One part of the model, ready to run.

    Attributes:
        inputs, outputs: names, in order.
        shapes: input name → sides; a dynamic side has a name instead of a number.
    """

    inputs: Sequence[str]
    outputs: Sequence[str]
    shapes: Mapping[str, Sequence[int | str]]

    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """Outputs by name; `feeds` may hold more than the inputs."""
        ...


@runtime_checkable
class TimedEngine(Protocol):
    """An engine that takes the time of its own runs, on its device and without the way there and back."""

    def time(self, feeds: Arrays, repeats: int) -> list[float]:
        """Milliseconds of each of `repeats` runs, after a warm-up."""
        ...


class TracedEngine(Engine, Protocol):
    """An engine whose kernels can be recorded."""

    def kernels(self, feeds: Arrays) -> Sequence[Kernel]:
        """The kernels of one run."""
        ...


@runtime_checkable
class BoundedEngine(Protocol):
    """An engine whose dynamic sides have an end.

    Attributes:
        largest: name of a dynamic side → its largest size.
    """

    largest: Mapping[str, int]


@dataclass(frozen=True)
class Executed:
    """What a runtime made of one layer: in words, and the operator that it runs."""

    compute: str
    operator: str


def together(gemms: Iterable[Executed]) -> Executed:
    """What is executed for a layer of several GEMMs: the same for each, or all of it."""
    gemms = tuple(gemms)
    computes = dict.fromkeys(gemm.compute for gemm in gemms)
    operators = dict.fromkeys(gemm.operator for gemm in gemms)
    return Executed(" and ".join(computes), ", ".join(operators))


def sidecar_of(path: Path) -> Path:
    """Path of the file that says what an engine is and how it is to be run."""
    return path.with_name(f"{path.name}.json")
