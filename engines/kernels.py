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
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from samq.errors import MachineLacks

INSTALL = "`pip install samq[kernels]`"
BUFFER_BYTES = 8 << 20
FLUSH_ALL = 1  # records of kernels that have not ended too; all have, where the caller waits for the device

GEMM, ATTENTION, SOFTMAX, DEQUANTIZE, OTHER = "GEMM", "fused attention", "softmax", "weights dequantized", "other"

_XMMA = {"i8": "INT8", "f16": "FP16", "bf16": "BF16", "tf32": "TF32", "f32": "FP32", "e4m3": "FP8"}
_NVJET = {"h": "FP16", "t": "BF16", "s": "TF32", "q": "FP8", "o": "FP8"}
_NUMBERS: tuple[tuple[re.Pattern[str], dict[str, str]], ...] = (
    (re.compile(rf"xmma_\w*?_[a-z0-9]+_({'|'.join(_XMMA)})(?:{'|'.join((*_XMMA, 'i32'))})_"), _XMMA),
    (re.compile(r"nvjet_(?:sm\d+_)?([a-z])"), _NVJET),
    (re.compile(r"()bf16_?s?\d*gemm"), {"": "BF16"}),
    (re.compile(r"()(?:tf32|_s1688)\w*gemm"), {"": "TF32"}),
    (re.compile(r"()_i\d+gemm"), {"": "INT8"}),
    (re.compile(r"()(?:_h\d+|_(?:fp16|f16|h)_?s?\d+)gemm"), {"": "FP16"}),
    (re.compile(r"()_sgemm"), {"": "FP32"}),
)
_ATTENTION = re.compile(r"mha|flash|sdpa|attention", re.IGNORECASE)
_SOFTMAX = re.compile(r"softmax|MaxSubExp", re.IGNORECASE)  # the latter as TensorRT's compiler abbreviates it
_DEQUANTIZE = re.compile(r"dequantize(?:4bits|blockwise)|unpack", re.IGNORECASE)
_PRODUCT = re.compile(r"gemm|gemv|nvjet|xmma_fprop|conv(?!ert)", re.IGNORECASE)


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
        for kind, pattern in ((ATTENTION, _ATTENTION), (SOFTMAX, _SOFTMAX), (DEQUANTIZE, _DEQUANTIZE)):
            if pattern.search(self.name):
                return kind
        for pattern, numbers in _NUMBERS:
            found = pattern.search(self.name)
            if found is not None:
                return f"{numbers.get(found[1], 'unknown')} {GEMM}"
        return f"unknown {GEMM}" if _PRODUCT.search(self.name) else OTHER


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
    try:
        cupti.activity_enable(kind)
        try:
            run()
            cupti.activity_flush_all(FLUSH_ALL)
        finally:
            cupti.activity_disable(kind)
    except RuntimeError as error:  # of CUPTI; what `run` raises is of `samq.errors`
        if type(error).__module__.partition(".")[0] != "cupti":
            raise
        raise _refused(error) from error
    spent: defaultdict[str, list[float]] = defaultdict(list)
    for name, nanoseconds in _RECORDS:
        spent[name].append(nanoseconds / 1000)
    kernels = (Kernel(name, len(times), sum(times)) for name, times in spent.items())
    return tuple(sorted(kernels, key=lambda kernel: -kernel.microseconds))


_RECORDS: list[tuple[str, int]] = []  # name and nanoseconds of each launch; CUPTI has one consumer in a process


@cache
def _cupti() -> Any:
    """The module `cupti.cupti`, its records on their way to `_RECORDS`."""
    try:
        cupti = importlib.import_module("cupti.cupti")
    except ImportError as error:
        raise MachineLacks(f"kernels cannot be traced: cupti-python does not load ({error}); run {INSTALL}") from error

    def take(activities: Iterable[Any]) -> None:
        for activity in activities:  # they live as long as this call
            if activity.kind == cupti.ActivityKind.CONCURRENT_KERNEL:
                _RECORDS.append((activity.name, activity.end - activity.start))

    try:
        cupti.activity_register_callbacks(lambda: (BUFFER_BYTES, 0), take)
    except RuntimeError as error:
        raise _refused(error) from error
    return cupti


def _refused(error: RuntimeError) -> MachineLacks:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return MachineLacks(f"kernels cannot be traced: CUPTI refuses ({reason}); see whether `nvidia-smi` works")
