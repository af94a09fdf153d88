"""Figures as text, each with its unit."""

from __future__ import annotations

from collections.abc import Iterable

NONE = "—"


def number(value: float | None, digits: int = 4) -> str:
    """A ratio, an IoU, or a dash where there is none."""
    return NONE if value is None else f"{value:.{digits}f}"


def data_size(count: float | None) -> str:
    """Bytes in the largest decimal unit that leaves three figures: 5.51 MB."""
    if count is None:
        return NONE
    for power, unit in ((3, "GB"), (2, "MB"), (1, "kB")):
        if count >= 1000**power:
            return f"{count / 1000**power:#.3g}".rstrip(".") + f" {unit}"
    return f"{count:.0f} B"


def milliseconds(value: float | None) -> str:
    """A duration: 259 ms, 14.7 ms, 0.12 ms."""
    if value is None:
        return NONE
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} ms"


def seconds(value: float | None) -> str:
    """A stage's duration: 0.9 s, 2 min 14 s."""
    if value is None:
        return NONE
    return f"{value:.1f} s" if value < 100 else f"{int(value) // 60} min {int(value) % 60} s"


def percent(share: float | None) -> str:
    """A share of a whole: 0.33 %, 45 %."""
    return NONE if share is None else f"{100 * share:.3g} %"


def counted(count: int, thing: str) -> str:
    """1 prompt, 2 prompts, 12,345 prompts."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def joined(words: Iterable[str]) -> str:
    """a, b and c."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last
