"""What a stage is said to have taken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from samq.tools.memory import peak_bytes, reset_peak
from samq.tools.progress import Reporter
from samq.tools.watch import Watch

BIG = 200_000_000

linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak")


def test_a_stage_has_its_own_lines_and_the_whole_command() -> None:
    reporter = Reporter(quiet=True, command=["samq-export", "run", "--eval-data", "my photos"])
    reporter.say("before")
    watch = Watch(reporter)
    reporter.say("within")
    taken = watch.taken()
    assert taken["log"] == ["within"]
    assert taken["command"] == "samq-export run --eval-data 'my photos'"
    assert taken["seconds"] >= 0
    assert Watch(Reporter(quiet=True)).taken()["command"] is None


@linux
def test_the_peak_is_of_the_stage_and_not_of_those_before() -> None:
    def use(size: int) -> int:
        watch = Watch(Reporter(quiet=True))
        held = np.ones(size, np.uint8)
        assert held.any()
        del held
        peak = watch.taken()["peak_memory_bytes"]
        assert isinstance(peak, int)
        return peak

    assert use(BIG) - use(1) > 0.9 * BIG


@linux
def test_a_peak_is_never_below_what_is_held() -> None:
    assert reset_peak()
    held = np.ones(BIG, np.uint8)
    peak = peak_bytes()
    assert peak is not None
    assert peak > held.nbytes
