"""What a person sees while samq works: progress bars on a terminal, log lines elsewhere, nothing when asked so."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Event, Thread

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


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

    @property
    def draws(self) -> bool:
        """Bars are drawn, with a clock that moves."""
        return not self.quiet and self.console.is_terminal and sys.stdout.isatty()

    @contextmanager
    def track(self, title: str, total: int | None) -> Iterator[Callable[[], None]]:
        """Yields a function to call after each of `total` steps; a bar on a terminal, then one line."""
        started = time.perf_counter()
        if not self.draws:
            yield lambda: None
        else:
            times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
            columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), *times)
            with Progress(*columns, console=self.console, transient=True) as progress:
                task = progress.add_task(title, total=total)
                yield lambda: progress.advance(task)
        self.say(f"{title}: {time.perf_counter() - started:.1f} s")


@contextmanager
def every(seconds: float, act: Callable[[], None]) -> Iterator[None]:
    """Call a function every so many seconds, from a thread that ends with the block, however that ends."""
    ended = Event()

    def beat() -> None:
        while not ended.wait(seconds):
            act()

    thread = Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
