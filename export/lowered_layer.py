"""What a lowering made of a linear layer, for the user: in `lowering.json` and in the report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FLOAT_GEMM, INT8_GEMM, INT4_GEMM = "FP16 GEMM", "INT8 GEMM", "INT4 weights, FP16 arithmetic"


@dataclass(frozen=True)
class LoweredLayer:
    """What a linear layer became.

    Args:
        compute: in words.
        reason: why that is not what was asked for, and what FP16 rounds; empty where it is.
        branch: what became of its low-rank branch, "kept" or "folded"; empty without one.
        fold_error: ‖INT8 weight − (weight + branch)‖ / ‖weight + branch‖ (Frobenius) of a branch, or of a part of one,
            folded into an INT8 weight; None of all others.
        kept_rank: components that are kept of a branch of which the others are folded; None of all others.
    """

    compute: str
    reason: str = ""
    branch: Literal["", "kept", "folded"] = ""
    fold_error: float | None = None
    kept_rank: int | None = None
