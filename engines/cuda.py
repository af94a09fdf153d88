"""The little of CUDA that engines need: the GPU at hand, memory, a stream, events. All of it through cuda-python.

Needs the standard library, numpy and, at the first call, `cuda.bindings` (cuda-python 12.9 or newer).
"""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from numpy.typing import NDArray

from samq.errors import MachineLacks

INSTALL = "`pip install samq[tensorrt]`"


@dataclass(frozen=True)
class Device:
    """A GPU.

    Args:
        name: as the driver gives it.
        capability: compute capability, major and minor.
        memory_mib: all of its memory.
    """

    name: str
    capability: tuple[int, int]
    memory_mib: int

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.capability[0]}.{self.capability[1]})"


@cache
def bindings() -> Any:
    """The module `cuda.bindings.runtime`.

    Raises:
        MachineLacks: cuda-python is not installed, or too old.
    """
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise MachineLacks(f"cuda-python 12.9 or newer is not installed ({error}); run {INSTALL}") from error


def find_device() -> Device:
    """The current GPU.

    To be called before anything of TensorRT: without a GPU, 8.6 crashes the process instead of raising.

    Raises:
        MachineLacks: no GPU, no driver, one that is too old, or no cuda-python.
    """
    cuda = bindings()
    status, count = cuda.cudaGetDeviceCount()
    if status == cuda.cudaError_t.cudaErrorInsufficientDriver:
        raise MachineLacks(_driver_sentence())
    if status != cuda.cudaError_t.cudaErrorNoDevice:
        _check(status, "looking for GPUs")
    if not count:
        raise MachineLacks("no NVIDIA GPU is visible; run on one, and see CUDA_VISIBLE_DEVICES")
    properties = call("cudaGetDeviceProperties", call("cudaGetDevice"))
    name = properties.name.split(b"\0")[0].decode()
    return Device(name, (properties.major, properties.minor), properties.totalGlobalMem >> 20)


def _driver_sentence() -> str:
    driver, runtime = call("cudaDriverGetVersion"), call("cudaRuntimeGetVersion")
    needed = f"cuda-python needs CUDA {_version(runtime)}"
    if not driver:
        return f"no NVIDIA driver is loaded; run on a machine with a GPU ({needed})"
    return f"the NVIDIA driver is too old: it gives CUDA {_version(driver)}, {needed}; update the driver"


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def call(function: str, *arguments: Any) -> Any:
    """Call a function of the CUDA runtime; returns what it gives beside its status.

    Raises:
        MachineLacks: it failed; out of memory is named as such.
    """
    status, *answers = getattr(bindings(), function)(*arguments)
    _check(status, function)
    return answers[0] if len(answers) == 1 else tuple(answers)


def _check(status: Any, what: str) -> None:
    cuda = bindings()
    if status == cuda.cudaError_t.cudaSuccess:
        return
    if status == cuda.cudaError_t.cudaErrorMemoryAllocation:
        raise MachineLacks("the GPU is out of memory; free some of it, or use a smaller batch or --image-size")
    text = cuda.cudaGetErrorString(status)[1].decode()
    raise MachineLacks(f"CUDA fails ({what}: {text}); see that `nvidia-smi` works, then run the same command again")


class Owned:
    """A handle of the CUDA runtime that is given back when nothing refers to it any more.

    Args:
        handle: what the runtime gave.
        release: name of the function that takes it back.
    """

    def __init__(self, handle: Any, release: str) -> None:
        self.handle = handle
        self._finalizer = weakref.finalize(self, _release(release), handle)

    def close(self) -> None:
        """Give it back now."""
        self._finalizer()


def _release(function: str) -> Callable[[Any], None]:
    take_back = getattr(bindings(), function)

    def release(handle: Any) -> None:
        take_back(handle)  # its status says only what an earlier call has said already

    return release


def allocate(size: int) -> Owned:
    """Device memory of `size` bytes; its handle is the address."""
    return Owned(call("cudaMalloc", max(size, 1)), "cudaFree")


def stream() -> Owned:
    """A stream of its own."""
    flags = bindings().cudaStreamNonBlocking
    return Owned(call("cudaStreamCreateWithFlags", flags), "cudaStreamDestroy")


def upload(array: NDArray[Any], address: int, on: Owned) -> None:
    """Copy a contiguous array to the device; it must live until the stream is synchronized."""
    kind = bindings().cudaMemcpyKind.cudaMemcpyHostToDevice
    call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, on.handle)


def download(address: int, array: NDArray[Any], on: Owned) -> None:
    """Copy from the device into a contiguous array, which is filled once the stream is synchronized."""
    kind = bindings().cudaMemcpyKind.cudaMemcpyDeviceToHost
    call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, on.handle)


def capture(launch: Callable[[], None], on: Owned) -> Owned:
    """What `launch` enqueues on the stream, as an executable graph for `cudaGraphLaunch`.

    Raises:
        MachineLacks: something in it cannot be captured.
    """
    cuda = bindings()
    call("cudaStreamBeginCapture", on.handle, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
    try:
        launch()
    finally:
        graph = call("cudaStreamEndCapture", on.handle)
    executable = Owned(call("cudaGraphInstantiate", graph, 0), "cudaGraphExecDestroy")
    call("cudaGraphDestroy", graph)
    return executable


def elapsed(launch: Callable[[], None], repeats: int, on: Owned) -> list[float]:
    """Milliseconds of each of `repeats` launches on the stream, by events around them."""
    events = [Owned(call("cudaEventCreate"), "cudaEventDestroy") for _ in range(2 * repeats)]
    for begin, end in zip(events[::2], events[1::2], strict=True):
        call("cudaEventRecord", begin.handle, on.handle)
        launch()
        call("cudaEventRecord", end.handle, on.handle)
    call("cudaStreamSynchronize", on.handle)
    pairs = zip(events[::2], events[1::2], strict=True)
    return [float(call("cudaEventElapsedTime", begin.handle, end.handle)) for begin, end in pairs]
