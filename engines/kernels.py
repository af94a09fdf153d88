"""The kernels that a GPU runs, by name, as NVIDIA's CUPTI records them: what an engine executes, whoever hides it.

TensorRT's inspector shows a fused region as one opaque layer. The names of its kernels tell what it computes with:

| library         | a matrix product's kernel                                 | its numbers                   |
|-----------------|-----------------------------------------------------------|-------------------------------|
| TensorRT, cuDNN | `sm80_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize…`         | second pair: factors, sums    |
| cuBLAS, CUTLASS | `ampere_h16816gemm_…`, `cutlass_80_tensorop_i16832gemm_…` | letters before the tile's     |
| cuBLAS 12.3, 13 | `nvjet_sm90_hsh_…`                                        | first letter: factors         |

(names as `ncu` and CUPTI tell them of TensorRT 8.6, cuDNN 9 and cuBLAS 13 on an H200, docs/tensorrt.md.)

Needs the standard library and, at the first trace, cupti-python.
"""

from __future__ import annotations

import importlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from samq.errors import MachineLacks

INSTALL = "install it for the interpreter that runs the engines: `pip install cupti-python`"
BUFFER_BYTES = 8 << 20
FLUSH_ALL = 1  # records of kernels that have not ended too; all have, where the caller waits for the device

GEMM, ATTENTION, SOFTMAX, DEQUANTIZE, OTHER = "GEMM", "fused attention", "softmax", "weights dequantized", "other"

# Of names in lower case. First match wins: TensorRT's compiler abbreviates a softmax's steps, s1688 is also the tile of
# FP16 before Ampere, and "bf16" holds "f16".
_PARTS = (
    (SOFTMAX, r"softmax|maxsubexp"),
    (ATTENTION, r"(?<![a-z])f?mha|flash|sdpa|attention"),
    (DEQUANTIZE, r"dequantize(?:[48]bits|blockwise)"),
)
_OPERATION = "(?:gemm|fprop|cudnn)"
_NUMBERS = (
    ("INT8", rf"xmma_\w*?_[a-z0-9]+_i8i32_|(?<![a-z])i[\dx]+{_OPERATION}|{_OPERATION}_s8"),
    ("FP8", r"xmma_\w*?_[a-z0-9]+_e4m3\w*?_|nvjet_(?:sm\d+_)?q"),
    ("FP4", r"nvjet_(?:sm\d+_)?o"),
    ("BF16", rf"xmma_\w*?_[a-z0-9]+_bf16\w*?_|nvjet_(?:sm\d+_)?t|bf16_s?[\dx]*{_OPERATION}|{_OPERATION}_bf16"),
    (
        "FP16",
        r"xmma_\w*?_[a-z0-9]+_f16f(?:16|32)_|nvjet_(?:sm\d+_)?h|gemv.*__half"
        rf"|(?<![a-z])h[\dx]*{_OPERATION}|fp?16_s?[\dx]*{_OPERATION}|{_OPERATION}_fp?16",
    ),
    ("TF32", rf"xmma_\w*?_[a-z0-9]+_tf32f32_|tf32|s1688{_OPERATION}"),
    ("FP32", rf"xmma_\w*?_[a-z0-9]+_f32f32_|(?<![a-z])s{_OPERATION}"),
)
_PRODUCT = r"gemm|gemv|nvjet|fprop|matmulfloat|\d{4}cudnn|scudnn|conv(?!er)"


@dataclass(frozen=True)
class Kernel:
    """Launches of one kernel.

    Args:
        name: as the compiler left it, which for C++ is mangled.
        launches: how many there were.
        microseconds: on the device, of all launches together.
    """

    name: str
    launches: int
    microseconds: float

    @property
    def kind(self) -> str:
        """What it computes: a GEMM (or convolution) with its numbers, or one of this module's other kinds."""
        name = self.name.lower()
        for kind, pattern in _PARTS:
            if re.search(pattern, name):
                return kind
        if not re.search(_PRODUCT, name):
            return OTHER
        numbers = (numbers for numbers, pattern in _NUMBERS if re.search(pattern, name))
        return f"{next(numbers, 'unknown')} {GEMM}"


@dataclass(frozen=True)
class Launched:
    """Kernels of one kind together; `microseconds` are on the device, kernel by kernel."""

    launches: int
    microseconds: float


def by_kind(kernels: Iterable[Kernel]) -> dict[str, Launched]:
    """Kernels together by what they compute, those that take longest first."""
    sums: defaultdict[str, list[Kernel]] = defaultdict(list)
    for kernel in kernels:
        sums[kernel.kind].append(kernel)
    kinds = {
        kind: Launched(sum(k.launches for k in own), round(sum(k.microseconds for k in own), 1))
        for kind, own in sums.items()
    }
    return dict(sorted(kinds.items(), key=lambda item: -item[1].microseconds))


def trace(run: Callable[[], object]) -> tuple[Kernel, ...]:
    """The kernels that `run` launches, those that take longest first.

    Args:
        run: launches them, on any stream, and waits for the device.

    Raises:
        MachineLacks: cupti-python is not installed, or CUPTI does not start here.
    """
    cupti = _cupti()
    kind = cupti.ActivityKind.CONCURRENT_KERNEL
    _RECORDS.clear()
    with _refusals_told():
        cupti.activity_enable(kind)
        try:
            run()
        finally:
            cupti.activity_flush_all(FLUSH_ALL)  # also of a run that failed, or the next trace would have its kernels
            cupti.activity_disable(kind)
    spent: defaultdict[str, list[float]] = defaultdict(list)
    for name, nanoseconds in _RECORDS:
        spent[name].append(nanoseconds / 1000)
    kernels = (Kernel(name, len(times), sum(times)) for name, times in spent.items())
    return tuple(sorted(kernels, key=lambda kernel: -kernel.microseconds))


_RECORDS: list[tuple[str, int]] = []  # name and nanoseconds of each launch; CUPTI has one consumer in a process


def require_cupti() -> None:
    """See that kernels can be recorded, before anything is run for it.

    Raises:
        MachineLacks: as `trace`.
    """
    _cupti()


@cache
def _cupti() -> Any:
    """The module `cupti.cupti`, its records on their way to `_RECORDS`."""
    try:
        cupti = importlib.import_module("cupti.cupti")
    except ImportError as error:
        raise MachineLacks(f"kernels cannot be traced: cupti-python does not load ({error}); {INSTALL}") from error

    def take(activities: Iterable[Any]) -> None:
        for activity in activities:  # they live as long as this call
            if activity.kind == cupti.ActivityKind.CONCURRENT_KERNEL:
                _RECORDS.append((activity.name, activity.end - activity.start))

    with _refusals_told():
        cupti.activity_register_callbacks(lambda: (BUFFER_BYTES, 0), take)
    return cupti


@contextmanager
def _refusals_told() -> Iterator[None]:
    """CUPTI's own errors, whose classes have no base of their own, as one line."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "cupti":
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        text = f"kernels cannot be traced: CUPTI refuses ({reason}); see whether `nvidia-smi` works"
        raise MachineLacks(text) from error
