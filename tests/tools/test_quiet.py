"""Other tools are kept quiet while they work, and only then."""

from __future__ import annotations

import logging
import sys
import warnings

import pytest

from samq.tools.quiet import quiet


def _say(word: str) -> None:
    print(f"{word}, printed")
    print(f"{word}, on stderr", file=sys.stderr)
    warnings.warn(f"{word}, warned", stacklevel=1)
    logging.getLogger("a tool").warning("%s, logged", word)


@pytest.mark.filterwarnings("always")
def test_nothing_is_heard_within_and_all_of_it_afterwards(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    with quiet():
        _say("within")
    _say("after")
    out, err = capsys.readouterr()
    assert (out, err) == ("after, printed\n", "after, on stderr\n")
    assert [str(warning.message) for warning in recwarn] == ["after, warned"]
    assert caplog.messages == ["after, logged"]


def test_errors_are_still_logged(caplog: pytest.LogCaptureFixture) -> None:
    with quiet():
        logging.getLogger("a tool").error("it fails")
    assert caplog.messages == ["it fails"]


def test_what_was_disabled_stays_so_even_after_a_failure() -> None:
    logging.disable(logging.ERROR)
    try:
        with pytest.raises(RuntimeError, match="a tool's own"), quiet():
            raise RuntimeError("a tool's own")
        assert logging.root.manager.disable == logging.ERROR
    finally:
        logging.disable(logging.NOTSET)
