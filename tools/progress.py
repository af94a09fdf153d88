"""What a person sees while samq works: progress bars on a terminal, log lines elsewhere, nothing when asked so."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Reporter:
    """Messages and progress bars on stderr; stdout belongs to results.

    Args:
        quiet: say nothing but errors.
        command: the words of the command line that started samq, for the report.

    Attributes:
        said: every message so far, also those that `quiet` kept back.
    """

    def __init__(self, quiet: bool = False, command: Sequence[str] = ()) -> None:
        self.quiet = quiet
        self.command = command
        self.said: list[str] = []
        self.console = Console(stderr=True, highlight=False)

    def say(self, message: str) -> None:
        """One line for the user."""
        self._note(message)

    def warn(self, message: str) -> None:
        """One line that the user should not miss."""
        self._note(f"warning: {message}", style="yellow")

    def _note(self, line: str, style: str | None = None) -> None:
        self.said.append(line)
        if not self.quiet:
            self.console.print(line, style=style, markup=False, soft_wrap=True)

    @contextmanager
    def track(self, title: str, total: int | None) -> Iterator[Callable[[], None]]:
        """Yields a function to call after each of `total` steps; a bar on a terminal, then one line."""
        started = time.perf_counter()
        if self.quiet or not (self.console.is_terminal and sys.stdout.isatty()):
            yield lambda: None
        else:
            columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            with Progress(*columns, console=self.console, transient=True) as progress:
                task = progress.add_task(title, total=total)
                yield lambda: progress.advance(task)
        self.say(f"{title}: {time.perf_counter() - started:.1f} s")
