"""Tables of Markdown, as the benchmarks print them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def line(cells: Iterable[str]) -> str:
    """One line of a table."""
    return f"| {' | '.join(cells)} |"


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table with a header; each line ends with a line break."""
    return "".join(f"{line(cells)}\n" for cells in (header, ["---"] * len(header), *lines))
