from pathlib import Path
from typing import Any

import pytest

from samq.errors import BadInput
from samq.tools.records import read_json_record


def read(path: Path) -> dict[str, Any]:
    return read_json_record(path, "samq.tools.bench_x", lambda content: content["rows"]["tiny"].items())


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text('{"rows": {"tiny": {"ms": 1.5}}}')
    assert read(path) == {"rows": {"tiny": {"ms": 1.5}}}


def test_a_missing_record_says_that_it_must_be_measured_first(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"record\.json: cannot be read \(No such file.*measure first"):
        read(tmp_path / "record.json")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"rows": 1}', '{"rows": {"tiny": 1}}', "\xff"])
def test_anything_else_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(BadInput, match=r"record\.json: is no record of samq\.tools\.bench_x; name another --json"):
        read(path)
