"""How far a build is: TensorRT's own account of it, where the version has one (IProgressMonitor)."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# phase, step, steps (0: not known)
Progress = Callable[[str, int, int], None]

_INTERRUPTED = "interrupted: ends when TensorRT lets it, with 8.6 once this plan is built; Ctrl-C again ends at once"


def silent(phase: str, step: int, steps: int) -> None:
    """The progress that nobody watches."""


class Watch:
    """TensorRT's own account of a build, passed on. What the watcher raises ends the build, and is raised after it:
    through TensorRT's own frames it would end the process.
    """

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.raised: BaseException | None = None
        self._steps: dict[str, int] = {}

    def started(self, phase: str, steps: int) -> None:
        self._steps[phase] = steps
        self.reached(phase, 0)

    def reached(self, phase: str, step: int) -> bool:
        """Tell of a step; False when the build must end."""
        if self.raised is None:
            try:
                self.progress(phase, step, self._steps.get(phase, 0))
            except BaseException as error:  # Ctrl-C too
                self.raised = error
        return self.raised is None

    @contextmanager
    def heeding_interrupts(self) -> Iterator[None]:
        """Let Ctrl-C end the build, too: what Python raises within TensorRT's calls of its logger, the bindings swallow
        (`PyLogger::log`). The caller raises `raised` afterwards. A second one ends the process at once.
        """
        in_main = threading.current_thread() is threading.main_thread()
        if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            yield  # there is none here, or somebody else takes it
            return

        def heed(*_: object) -> None:
            self.raised = KeyboardInterrupt()
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.write(2, f"\n{_INTERRUPTED}\n".encode())  # `print` may have been interrupted itself

        signal.signal(signal.SIGINT, heed)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def monitor(self, api: Any) -> Any:
        """As TensorRT wants it, or None where the version (8.6) knows no such thing."""
        if not hasattr(api, "IProgressMonitor"):
            return None
        watch = self

        class Monitor(api.IProgressMonitor):  # type: ignore[misc]
            def __init__(self) -> None:
                api.IProgressMonitor.__init__(self)

            def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
                watch.started(phase, steps)

            def step_complete(self, phase: str, step: int) -> bool:
                return watch.reached(phase, step + 1)

            def phase_finish(self, phase: str) -> None:
                """Nothing: its last step was told."""

        return Monitor()
