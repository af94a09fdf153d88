"""Ranks of low-rank branches under one budget of bytes or FLOPs for all layers (`low_rank.rank: auto`).

Rounding leaves an error in proportion to the energy of what is rounded, so that a branch which takes the first r
directions of a layer, of energies σ² (see `samq.quant.low_rank.energies`), lowers its relative output error e to about

    e · (1 − Σ_{i ≤ r} σᵢ² / Σᵢ σᵢ²)

Each direction's gain is e σᵢ² / Σ σ², its price the 2 (K + N) bytes of its factors in FP16, or as many FLOPs for each
token that the layer sees: of equal layers, one of Hiera's first stage sees 64 times the tokens of one of the last.
Gains of a layer fall with i. A sum of concave functions is largest when the steps with most gain for their price are
taken first, whatever layers they belong to (Fox, Operations Research 14(2), 1966).

Layers that share a down-projection are one candidate: stacked, each weight times √(e / Σ σ²), they have energies that
add up to the sum of their errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

RANK_STEP = 8
"""Ranks are multiples of it, for tensor cores multiply FP16 matrices in tiles whose sides are."""
PRICE = 2  # per input and output channel: bytes of an FP16 number, or a multiplication and an addition for each token


@dataclass(frozen=True)
class Candidate:
    """A layer that may get a branch.

    Args:
        gains: [min(N, K)] error that each direction removes, never rising.
        channels: K + N.
        tokens: that the layer sees, where FLOPs are spent; 1 for bytes.
    """

    gains: Tensor
    channels: int
    tokens: int = 1

    def price(self, rank: int) -> int:
        """Bytes or FLOPs of a branch."""
        return PRICE * rank * self.channels * self.tokens


def share_out(candidates: Sequence[Candidate], budget: int) -> list[int]:
    """The rank of each layer, in steps of RANK_STEP, all branches within `budget`, in what prices are in.

    A layer whose next step is too dear gets no more, and cheaper steps of others are taken instead. Of equal steps the
    earlier layer's comes first.
    """
    steps = []
    for layer, candidate in enumerate(candidates):
        whole = len(candidate.gains) // RANK_STEP
        totals: list[float] = candidate.gains[: whole * RANK_STEP].reshape(whole, RANK_STEP).sum(1).tolist()
        steps += [(-total / candidate.price(RANK_STEP), layer, index) for index, total in enumerate(totals)]
    ranks, full = [0] * len(candidates), set[int]()
    for _, layer, _ in sorted(steps):
        price = candidates[layer].price(RANK_STEP)
        if layer in full or price > budget:
            full.add(layer)
            continue
        ranks[layer] += RANK_STEP
        budget -= price
    return ranks
