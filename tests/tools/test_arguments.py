"""What the benchmarks' command lines take, and the line that is recorded."""

from __future__ import annotations

import argparse
import sys

import pytest

from samq.tools.arguments import command_line, count


@pytest.mark.parametrize(("most", "text"), [(None, "1"), (None, "70000"), (5, "1"), (5, "5")])
def test_counts_are_taken(most: int | None, text: str) -> None:
    assert count(most)(text) == int(text)


@pytest.mark.parametrize(
    ("most", "text", "words"),
    [
        (None, "0", "0 is not a whole number, 1 or more"),
        (None, "-2", "-2 is not"),
        (None, "1.5", "1.5 is not"),
        (None, "many", "many is not a whole number"),
        (5, "0", "0 is not a whole number, from 1 to 5"),
        (5, "6", "6 is not a whole number, from 1 to 5"),
    ],
)
def test_all_else_is_refused_in_words(
    most: int | None, text: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=count(most))
    with pytest.raises(SystemExit) as ended:
        parser.parse_args([f"--runs={text}"])
    assert ended.value.code == 2
    assert f"argument --runs: {words}" in capsys.readouterr().err


def test_the_line_is_that_of_the_arguments_or_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["somewhere/__main__.py", "--runs", "3"])
    assert command_line("samq.tools.bench_gpu", ["--table"]) == "python -m samq.tools.bench_gpu --table"
    assert command_line("samq.tools.bench_gpu", []) == "python -m samq.tools.bench_gpu"
    assert command_line("samq.tools.bench_gpu", None) == "python -m samq.tools.bench_gpu --runs 3"
