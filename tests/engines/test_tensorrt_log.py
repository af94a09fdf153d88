"""TensorRT's own words, as users have quoted them, in one line that says what to do."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from samq.engines import tensorrt_log
from samq.engines.tensorrt_log import ERROR, INFO, WARNING, Log, captured, failure, load_tensorrt, parse_failure, plain
from samq.errors import BadInput, MachineLacks, SamqError

PATH = Path("/somewhere/image_encoder.onnx")
SKIPPED = (
    "Skipping tactic 3 due to insufficient memory on requested size of 4294967296 detected for tactic 0x04.\n"
    "Try decreasing the workspace size with IBuilderConfig::setMemoryPoolLimit()."
)
NO_GPU = (
    "CUDA initialization failure with error: 35. Please check your CUDA installation:  http://docs.nvidia.com/cuda/"
)
NULL = "pybind11::init(): factory function returned nullptr"
OLD_PLAN = (
    "1: [stdArchiveReader.cpp::StdArchiveReader::40] Error Code 1: Serialization (Serialization assertion "
    "stdVersionRead == serializationVersion failed.Version tag does not match. Note: Current Version: 213, "
    "Serialized Engine Version: 232)"
)
OLD_LIBRARY = (
    "6: The engine plan file is not compatible with this version of TensorRT, expecting library version "
    "8.6.0.12 got 8.5.3.1, please rebuild."
)
OTHER_GPU = (
    "IRuntime::deserializeCudaEngine: Error Code 6: API Usage Error (The engine plan file is generated on an "
    "incompatible device, expecting compute 8.9 got compute 8.6, please rebuild.)"
)
NO_PLAN = (
    "1: [stdArchiveReader.cpp::StdArchiveReader::32] Error Code 1: Serialization (Serialization assertion "
    "magicTagRead == kMAGIC_TAG failed.Magic tag does not match)"
)
NO_PLAN_OF_8_6 = (
    "1: [runtime.cpp::parsePlan::314] Error Code 1: Serialization (Serialization assertion plan->header.magicTag == "
    "rt::kPLAN_MAGIC_TAG failed.)"
)
NEW_GPU = (
    "IBuilder::buildSerializedNetwork: Error Code 9: API Usage Error (Target GPU SM 120 is not supported by this "
    "TensorRT release.)"
)
OLD_GPU = (
    "1: [caskUtils.cpp::nvinfer1::rt::task::trtSmToCask::193] Error Code 1: Internal Error (Unsupported SM: 0x601)"
)
NO_MEMORY_FOR_CUDNN = "1: Error Code 1: Cudnn (CUDNN_STATUS_ALLOC_FAILED)"
FAILED = "4: [runtime.cpp::deserializeCudaEngine::66] Error Code 4: Internal Error (Engine deserialization failed.)"
NO_MEMORY = "2: [virtualMemoryBuffer.cpp::resizePhysical::160] Error Code 2: OutOfMemory (no further information)"
NO_WORKSPACE = "Could not find any implementation for node a/MatMul due to insufficient workspace. See verbose log for"
NO_KERNEL = (
    "10: [optimizer.cpp::computeCosts::3869] Error Code 10: Internal Error (Could not find any implementation "
    "for node {ForeignNode[blocks.0.norm/LayerNormalization...blocks.1/Add]}.)"
)
NO_SIZE = "4: [network.cpp::validate::3062] Error Code 4: Internal Error (x: dynamic input is missing dimensions.)"
FAILURES: list[tuple[list[tuple[str, str]], type[SamqError], str]] = [
    ([(WARNING, NO_GPU), (ERROR, NULL)], MachineLacks, "CUDA does not start (error 35)"),
    ([(WARNING, NO_GPU.replace("35", "2")), (ERROR, NULL)], MachineLacks, "memory is not enough"),
    ([(WARNING, NO_GPU.replace("35", "209")), (ERROR, NULL)], MachineLacks, "CUDA does not start (error 209)"),
    ([(ERROR, NO_PLAN), (ERROR, FAILED)], BadInput, "no plan, or one of a TensorRT far from this one; build it again"),
    ([(ERROR, NO_PLAN_OF_8_6), (ERROR, FAILED)], BadInput, "no plan"),
    ([(ERROR, NEW_GPU)], MachineLacks, "does not support the GPU; install a newer one"),
    ([(ERROR, OLD_GPU)], MachineLacks, "where the GPU is too old for it, an older one"),
    ([(ERROR, NO_MEMORY_FOR_CUDNN)], MachineLacks, "memory is not enough"),
    ([(ERROR, OLD_PLAN), (ERROR, FAILED)], MachineLacks, "another version of TensorRT"),
    ([(ERROR, OLD_LIBRARY)], MachineLacks, "another version of TensorRT"),
    ([(ERROR, OTHER_GPU)], MachineLacks, "another GPU"),
    ([(ERROR, NO_MEMORY)], MachineLacks, "memory is not enough"),
    ([(WARNING, SKIPPED), (ERROR, NO_WORKSPACE)], MachineLacks, "memory is not enough"),
    ([(WARNING, SKIPPED)], MachineLacks, "memory is not enough"),
    (
        [(WARNING, SKIPPED), (ERROR, NO_KERNEL)],  # tactics are skipped in builds that end well, too
        BadInput,
        "no kernel for {ForeignNode[blocks.0.norm/LayerNormalization...blocks.1/Add]};",
    ),
    ([(WARNING, SKIPPED), (ERROR, NO_SIZE)], BadInput, "dynamic input is missing dimensions"),
    ([(ERROR, NO_SIZE)], BadInput, "TensorRT fails (Internal Error (x: dynamic input is missing dimensions.))"),
    ([(INFO, "Graph optimization time: 0.1 seconds.")], BadInput, "no reason given"),
]


@pytest.mark.parametrize(("said", "kind", "text"), FAILURES)
def test_failures(said: list[tuple[str, str]], kind: type[SamqError], text: str) -> None:
    error = failure(PATH, Log(said))
    assert type(error) is kind
    assert str(error).startswith("image_encoder.onnx: ")
    assert text in str(error)
    assert "\n" not in str(error)
    assert "; " in str(error), "the fix stands behind the reason"


NODE = (
    'input: "1055"\ninput: "648"\noutput: "652"\nname: "Range_271"\nop_type: "Range"\nattribute {\n  name: "axis"\n}\n'
)
OF_8 = [
    (ERROR, 'ModelImporter.cpp:771: While parsing node number 205 [Range -> "652"]:'),
    (ERROR, "ModelImporter.cpp:772: --- Begin node ---"),
    (ERROR, f"ModelImporter.cpp:773: {NODE}"),
    (ERROR, "ModelImporter.cpp:774: --- End node ---"),
]
OF_10 = [
    (ERROR, 'ModelImporter.cpp:963: While parsing node number 4448 [Range -> "652"]:'),
    (ERROR, f"ModelImporter.cpp:964: --- Begin node ---\n{NODE}"),
    (ERROR, "ModelImporter.cpp:965: --- End node ---"),
]


@pytest.mark.parametrize("said", [OF_8, OF_10], ids=["8.6", "10"])
def test_a_node_that_is_not_taken_is_named(said: list[tuple[str, str]]) -> None:
    error = parse_failure(
        PATH, "Invalid Node - Range_271\nAll inputs to range should be initializers.", Log(said), "8.6.0"
    )
    assert str(error) == (
        "image_encoder.onnx: TensorRT 8.6.0 does not take node Range_271 (Range): Invalid Node - Range_271 "
        "All inputs to range should be initializers; export it for this version"
    )


def test_a_file_that_is_not_taken_is_named() -> None:
    said = Log([(ERROR, "ModelImporter.cpp:735: Failed to parse ONNX model from file: image_encoder.onnx")])
    error = parse_failure(PATH, "", said, "8.6.0")
    assert str(error).startswith(
        "image_encoder.onnx: TensorRT 8.6.0 does not take the file: Failed to parse ONNX model"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4: [runtime.cpp::deserialize::66] Error Code 4: Internal Error (failed.)", "Internal Error (failed.)"),
        ("ModelImporter.cpp:735: Failed to parse\n ONNX.", "Failed to parse ONNX"),
        ("a plain sentence", "a plain sentence"),
    ],
)
def test_places_in_sources_are_left_out(text: str, expected: str) -> None:
    assert plain(text) == expected


def test_a_log_tells_each_message_once() -> None:
    log = Log([(WARNING, "twice"), (INFO, "between"), (WARNING, "twice"), (ERROR, "last")])
    assert log.of(WARNING, ERROR) == ["twice", "last"]
    assert str(log) == "warning: twice\ninfo: between\nwarning: twice\nerror: last\n"


@pytest.fixture
def logging_module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for the module with the logger's base class alone."""

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = "internal", "error", "warning", "info", "verbose"

    module = SimpleNamespace(ILogger=ILogger)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    tensorrt_log._logger.cache_clear()
    yield module
    tensorrt_log._logger.cache_clear()


def test_each_block_has_its_own_log(logging_module: Any) -> None:
    kinds: Any = logging_module.ILogger
    with captured() as (logger, outer):
        said: Any = logger
        said.log(kinds.WARNING, "outer")
        with captured() as (same, inner):
            assert same is logger, "TensorRT keeps the first logger that it is given"
            for kind in (kinds.INTERNAL_ERROR, kinds.VERBOSE, kinds.INFO):
                said.log(kind, f"{kind} message")
        said.log(kinds.ERROR, "outer again")
    assert inner.messages == [(ERROR, "internal message"), (INFO, "info message")]
    assert outer.messages == [(WARNING, "outer"), (ERROR, "outer again")]


def test_a_missing_tensorrt_names_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MachineLacks, match=r"not installed; run `pip install samq\[tensorrt\]`.*SAMQ_TENSORRT_PYTHON"):
        load_tensorrt()


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reason = "libnvinfer.so.8: cannot open shared object file: No such file or directory"
    (tmp_path / "tensorrt.py").write_text(f"raise ImportError({reason!r})\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(MachineLacks, match=r"libnvinfer\.so\.8: cannot open"):
        load_tensorrt()


def test_the_module_is_given_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    assert load_tensorrt() is module
