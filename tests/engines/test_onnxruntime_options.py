"""The sidecar of an engine for ONNX Runtime on the CPU: what it says, that it is heeded, what is said without it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
from exported import canonical
from small_model import recipe_of

from samq.calib.parts import IMAGE_ENCODER
from samq.engines import onnxruntime
from samq.engines.base import sidecar_of
from samq.engines.onnxruntime import executed_layers, open_engine
from samq.engines.onnxruntime_options import EXACT_INT8, NO_IDLE_SPINNING, CpuEngineInfo, CpuOptions, load_info
from samq.errors import BadInput, MachineLacks
from samq.export.lower_onnxruntime import lower_for_onnxruntime, requested_layers
from samq.export.parts import save_part
from samq.files import write_json


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder as `samq-export build` writes it."""
    path = tmp_path_factory.mktemp("built") / "image_encoder.onnx"
    graph = canonical(recipe_of("int8_w8a8"), IMAGE_ENCODER)
    info = CpuEngineInfo(ort.__version__, requested_layers(graph))
    save_part(lower_for_onnxruntime(graph), path)
    write_json(sidecar_of(path), info.as_json())
    return path


@pytest.fixture
def engine(built: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    for path in (built, sidecar_of(built)):
        shutil.copy(path, tmp_path)
    return tmp_path / built.name


def rewrite(engine: Path, **changes: Any) -> None:
    """Change keys of a sidecar; None takes one away."""
    content = {**json.loads(sidecar_of(engine).read_text()), **changes}
    sidecar_of(engine).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def test_it_says_what_others_must_know(engine: Path) -> None:
    told = json.loads(sidecar_of(engine).read_text())
    assert told["config"] == {NO_IDLE_SPINNING: "1"}
    assert told["config_where_u8s8_saturates"] == {EXACT_INT8: "1"}
    assert told["reasons"].keys() == {**told["config"], **told["config_where_u8s8_saturates"]}.keys()
    assert (told["at_least"], told["built_with"]) == ("1.23", ort.__version__)
    executed = {layer: found.compute for layer, found in executed_layers(engine).items()}
    assert told["requested"]
    assert {layer: executed[layer] for layer in told["requested"]} == told["requested"]


def test_what_is_written_is_read(engine: Path) -> None:
    info = CpuEngineInfo("1.30.0", {"a": "INT8 GEMM"}, CpuOptions({"b": "1"}, {"c": "0"}), "1.24")
    write_json(sidecar_of(engine), info.as_json())
    assert load_info(engine) == info


@pytest.mark.parametrize("exact", [True, False])
def test_its_entries_are_set(exact: bool, engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "multiplies_exactly", lambda: exact)
    rewrite(engine, config={"session.dynamic_block_base": "4"}, config_where_u8s8_saturates={EXACT_INT8: "1"})
    options = open_engine(engine)._session.get_session_options()
    assert options.get_session_config_entry("session.dynamic_block_base") == "4"
    for name in (NO_IDLE_SPINNING,) if not exact else (NO_IDLE_SPINNING, EXACT_INT8):
        with pytest.raises(RuntimeError, match=name):
            options.get_session_config_entry(name)
    if not exact:
        assert options.get_session_config_entry(EXACT_INT8) == "1"


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"config": None}, "config"),
        ({"config": ["session.force_spinning_stop"]}, "config"),
        ({"config": {NO_IDLE_SPINNING: 1}}, "config"),
        ({"config_where_u8s8_saturates": "1"}, "config_where_u8s8_saturates"),
        ({"requested": None}, "requested"),
        ({"at_least": None}, "at_least"),
        ({"at_least": "soon"}, "soon"),
        ({"runtime": "tensorrt"}, "tensorrt"),
    ],
)
def test_a_corrupt_one_is_one_line(changes: dict[str, Any], word: str, engine: Path) -> None:
    rewrite(engine, **changes)
    refused(engine, r"image_encoder\.onnx\.json is no sidecar", word, "samq-export build")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe\x00", b"null"])
def test_what_is_no_json_is_one_line(content: bytes, engine: Path) -> None:
    sidecar_of(engine).write_bytes(content)
    refused(engine, r"image_encoder\.onnx\.json is no sidecar", "samq-export build")


def test_a_missing_one_is_one_line(engine: Path) -> None:
    sidecar_of(engine).unlink()
    refused(engine, r"image_encoder\.onnx\.json is missing", "samq-export build")


def refused(engine: Path, *words: str) -> None:
    for word in words:
        with pytest.raises(BadInput, match=word) as caught:
            open_engine(engine)
        assert "\n" not in str(caught.value)


def test_a_missing_engine_is_told_first(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"image_encoder\.onnx is missing"):
        open_engine(tmp_path / "image_encoder.onnx")


@pytest.mark.parametrize("version", ["1.22.1", "0.99", "1.9.0"])
def test_an_older_runtime_is_told_what_is_wanted(version: str, engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "VERSION", version)
    with pytest.raises(MachineLacks, match=rf'1\.23 or later, here is {version}; .*"onnxruntime>=1\.23"'):
        open_engine(engine)


@pytest.mark.parametrize("version", ["1.23.0", "1.23.2", "1.40.0+build", "2.0.0"])
def test_others_are_not(version: str, engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "VERSION", version)
    assert open_engine(engine).inputs == ["pixel_values"]
