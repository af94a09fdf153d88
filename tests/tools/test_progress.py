"""Bars on a terminal only, messages on stderr only."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from threading import Event
from threading import enumerate as threads

import pytest

from samq.tools.progress import Reporter, every

SCRIPT = """
import time
from samq.tools.progress import Reporter
reporter = Reporter()
with reporter.track("working", 3) as step:
    for _ in range(3):
        step()
        time.sleep(0.15)
reporter.warn("[red]careful[/red]")
print("result")
"""


def _run(*, stdout_is_terminal: bool) -> tuple[str, str]:
    """What the script writes to stdout and to stderr; stderr is a terminal."""
    leader, follower = pty.openpty()
    out = follower if stdout_is_terminal else subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdout=out, stderr=follower, env={**os.environ, "TERM": "xterm"}
    )
    piped = process.communicate(timeout=60)[0]
    os.close(follower)
    shown = b""
    try:
        while chunk := os.read(leader, 65536):
            shown += chunk
    except OSError:  # Linux' way of saying that the other end is closed
        pass
    os.close(leader)
    assert process.returncode == 0, shown
    return (piped or b"").decode(), shown.decode()


def test_everything_said_is_kept_for_the_report_even_when_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter(quiet=True, command=["samq-export", "run"])
    reporter.say("one")
    reporter.warn("two")
    with reporter.track("three", 1) as step:
        step()
    assert [line.partition(":")[0] for line in reporter.said] == ["one", "warning", "three"]
    assert capsys.readouterr() == ("", "")


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_bars_are_shown_on_a_terminal_only() -> None:
    shown = re.sub(r"\x1b\[[\d;?]*\w", "", _run(stdout_is_terminal=True)[1])
    assert "3/3" in shown
    assert "0/3 0:00:00 left -:--:--" in shown, "time that has passed, and time that is left"
    out, err = _run(stdout_is_terminal=False)
    assert out == "result\n"
    assert "/3" not in err
    assert "working: 0." in err
    assert "[red]careful[/red]" in err


def test_what_is_done_every_so_often_ends_with_the_block() -> None:
    before, called, again = threads(), [], Event()

    def act() -> None:
        called.append(len(called))
        if len(called) == 3:
            again.set()

    def fail() -> None:
        assert again.wait(60)
        raise RuntimeError("in the block")

    with pytest.raises(RuntimeError, match="in the block"), every(0.001, act):
        fail()
    assert threads() == before
    with every(3600, act):
        done = len(called)
    assert len(called) == done
