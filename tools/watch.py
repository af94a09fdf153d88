"""What a stage took and said, for the manifest and the report."""

from __future__ import annotations

import shlex
import time
from typing import Any

from samq.tools.memory import peak_bytes, reset_peak
from samq.tools.progress import Reporter


class Watch:
    """Watches a stage from here to `taken`.

    Args:
        reporter: what the stage says goes through it.
    """

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._said_before = len(reporter.said)
        self._sees_peaks = reset_peak()
        self._started = time.perf_counter()

    def taken(self) -> dict[str, Any]:
        """Figures so far, as JSON values.

        Returns:
            `seconds`; `peak_memory_bytes`, the most that was resident in this process since the stage began, None where
            that cannot be told; `command`, the line that started samq, None when it was no command; `log`, what was
            said in the stage, line by line.
        """
        reporter = self._reporter
        return {
            "seconds": round(time.perf_counter() - self._started, 3),
            "peak_memory_bytes": peak_bytes() if self._sees_peaks else None,
            "command": shlex.join(reporter.command) if reporter.command else None,
            "log": reporter.said[self._said_before :],
        }
