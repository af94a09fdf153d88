"""Which form for which layer, so that the least is lost for the bytes: the front of an additive model.

Loss and bytes of a configuration are taken as sums over its layers. Then the best ones are found layer by layer: with
a price λ on a byte, each layer takes the form of least loss + λ · bytes, and as λ falls, layer after layer moves along
the lower convex hull of its own (bytes, loss). The moves of all layers, steepest first, are the front (H. Everett,
Generalized Lagrange multiplier method, Operations Research 11, 1963).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Option:
    """One form of one layer: its bytes, and the loss when this layer alone has it."""

    form: str
    bytes: int
    loss: float


@dataclass(frozen=True)
class Choice:
    """A form for each layer, and the sums over the layers."""

    forms: Mapping[str, str]
    bytes: int
    loss: float


@dataclass(frozen=True)
class _Move:
    layer: str
    to: Option
    bytes: int
    gain: float

    @property
    def steepness(self) -> float:
        """Loss that a byte removes."""
        return self.gain / self.bytes


def front_of(options: Mapping[str, Sequence[Option]]) -> list[Choice]:
    """The configurations of the hull, smallest first; each next one costs more bytes and loses less."""
    chosen = {layer: _hull(of_layer)[0] for layer, of_layer in options.items()}
    found = [_sum(chosen)]
    for move in _moves(options):
        chosen[move.layer] = move.to
        found.append(_sum(chosen))
    return found


def within(options: Mapping[str, Sequence[Option]], budget: int) -> Choice | None:
    """The configuration of at most `budget` bytes: the front's moves, steepest first, those left out that do not fit.

    Returns:
        None where even the smallest configuration is larger.
    """
    chosen = {layer: _hull(of_layer)[0] for layer, of_layer in options.items()}
    left = budget - _sum(chosen).bytes
    if left < 0:
        return None
    full: set[str] = set()
    for move in _moves(options):
        if move.layer in full:
            continue
        if move.bytes > left:
            full.add(move.layer)  # its later moves start from here
            continue
        chosen[move.layer] = move.to
        left -= move.bytes
    return _sum(chosen)


def _moves(options: Mapping[str, Sequence[Option]]) -> list[_Move]:
    """All steps along the layers' hulls, steepest first; those of one layer stay in order, for hulls are convex."""
    moves = []
    for layer, of_layer in options.items():
        hull = _hull(of_layer)
        for before, after in pairwise(hull):
            moves.append(_Move(layer, after, after.bytes - before.bytes, before.loss - after.loss))
    return sorted(moves, key=lambda move: -move.steepness)


def _hull(options: Sequence[Option]) -> list[Option]:
    """The lower convex hull from the smallest option to the one of least loss."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda option: (option.bytes, option.loss)):
        if hull and option.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _slope(hull[-2], option) >= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(option)
    return hull


def _slope(before: Option, after: Option) -> float:
    return (before.loss - after.loss) / (after.bytes - before.bytes)


def _sum(chosen: Mapping[str, Option]) -> Choice:
    forms = {layer: option.form for layer, option in chosen.items()}
    return Choice(
        forms, sum(option.bytes for option in chosen.values()), sum(option.loss for option in chosen.values())
    )
