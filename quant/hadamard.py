"""Hadamard matrices of orders that are no power of two: H Hᵀ = n I with entries ±1.

| order n  | where q is a prime   | construction                                                         |
|----------|----------------------|----------------------------------------------------------------------|
| 2ᵏ       |                      | Sylvester: Kronecker powers of [[1, 1], [1, −1]]                     |
| q + 1    | q = 3 (mod 4)        | Paley I:  I + [[0, 1], [−1, Q]]                                      |
| 2(q + 1) | q = 1 (mod 4)        | Paley II: C ⊗ [[1, 1], [1, −1]] + I ⊗ [[1, −1], [−1, −1]], C = [[0, 1], [1, Q]] |
| m·2ᵏ     |                      | the Kronecker product of orders m and 2ᵏ                             |

Q_ij = χ(i − j) is the Jacobsthal matrix of the quadratic residues modulo q (Paley, J. Math. Phys. 12, 1933). Widths of
SAM's layers, 96, 112 and 144 times 2ᵏ, are 12, 28 and 36 times powers of two.
"""

from __future__ import annotations

import torch
from torch import Tensor


def hadamard(order: int) -> Tensor | None:
    """A Hadamard matrix [n, n] of ±1 in float64, the Kronecker factor of the smallest order by Paley; None where none
    of these constructions has that order."""
    power = order & -order
    odd = order // power
    if odd == 1:
        return _sylvester(order)
    for twos in (2**k for k in range(power.bit_length())):  # m = odd · twos, the smallest first
        core = _paley(odd * twos)
        if core is not None:
            return torch.kron(_sylvester(power // twos), core)
    return None


def _sylvester(order: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while len(matrix) < order:
        matrix = torch.kron(pair, matrix)
    return matrix


def _paley(order: int) -> Tensor | None:
    q = order - 1
    if q % 4 == 3 and _is_prime(q):
        return torch.eye(order, dtype=torch.float64) + _bordered(q, -1.0)
    q = order // 2 - 1
    if order % 2 == 0 and q % 4 == 1 and _is_prime(q):
        pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(_bordered(q, 1.0), pair) + torch.kron(torch.eye(q + 1, dtype=torch.float64), diagonal)
    return None


def _bordered(q: int, side: float) -> Tensor:
    """[[0, 1], [side, Q]] of order q + 1."""
    character = torch.full((q,), -1.0, dtype=torch.float64)
    character[[x * x % q for x in range(1, q)]] = 1
    character[0] = 0
    index = torch.arange(q)
    matrix = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    matrix[0, 1:], matrix[1:, 0] = 1, side
    matrix[1:, 1:] = character[(index[:, None] - index) % q]
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))
