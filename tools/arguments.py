"""What the benchmarks' command lines have in common."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence


def count(most: int | None = None) -> Callable[[str], int]:
    """The type of an option that takes whole numbers from 1 on, or from 1 to `most`, and refuses all else in words."""
    wanted = "1 or more" if most is None else f"from 1 to {most}"

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = 0
        if number < 1 or (most is not None and number > most):
            raise argparse.ArgumentTypeError(f"{text} is not a whole number, {wanted}")
        return number

    return parse


def command_line(module: str, arguments: Sequence[str] | None) -> str:
    """The line that runs a module with these arguments; None stands for those of this process."""
    return " ".join([f"python -m {module}", *(sys.argv[1:] if arguments is None else arguments)])
