"""Model repositories: their configs, files and code, where they are refused, and `samq-export triton`."""

from __future__ import annotations

import ast
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from conftest import Answer, refused, samq
from google.protobuf import text_format
from triton_plans import MODELS, MOST, built, with_plans
from tritonclient.grpc import model_config_pb2

from samq.files import sha256_of

PROVIDED = {"numpy", "PIL", "onnx", "onnxruntime", "triton_python_backend_utils"}
DTYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "int64": "TYPE_INT64", "int32": "TYPE_INT32"}


@pytest.fixture
def out(finished: tuple[Path, Answer], tmp_path: Path) -> Path:
    """A copy of the finished job's output directory."""
    shutil.copytree(finished[0], tmp_path / "out")
    return tmp_path / "out"


def config_of(repository: Path, model: str) -> Any:
    """A model's config.pbtxt, as Triton's own classes read it."""
    text = (repository / model / "config.pbtxt").read_text(encoding="utf-8")
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def tensors_of(entries: Any) -> dict[str, tuple[str, list[int]]]:
    """Type and dims of a config's inputs or outputs."""
    return {entry.name: (model_config_pb2.DataType.Name(entry.data_type), list(entry.dims)) for entry in entries}


def copied_as(out: Path, folder: str) -> Path:
    """The ONNX Runtime engine under another target's name."""

    def make(engine: Path, part: str) -> list[Path]:
        return [Path(shutil.copy(out / "engines" / "onnxruntime" / f"{part}.onnx", engine))]

    return built(out, folder, make)


def test_configs_say_what_the_graphs_say(out: Path) -> None:
    answer = samq("triton", "--output-dir", out, "--json")
    assert answer.code == 0, answer.err
    repository = out / "triton"
    assert answer.json == {
        "repository": str(repository),
        "engine": "onnxruntime",
        "models": ["sam_image_encoder", "sam_mask_decoder", "sam"],
    }
    for part, model in MODELS.items():
        config = config_of(repository, model)
        graph = onnx.load(repository / model / "1" / "model.onnx").graph
        assert (config.name, config.backend, config.max_batch_size) == (model, "python", 4)
        for values, entries in ((graph.input, config.input), (graph.output, config.output)):
            expected = {
                value.name: (
                    "TYPE_INT64" if value.name == "point_labels" else "TYPE_FP32",
                    [side.dim_value or -1 for side in value.type.tensor_type.shape.dim][1:],
                )
                for value in values
            }
            assert tensors_of(entries) == expected
        assert config.HasField("dynamic_batching")
        assert config.dynamic_batching.default_queue_policy.max_queue_size > 0
        assert config.version_policy.latest.num_versions == 1
        assert [(group.count, group.kind) for group in config.instance_group] == [
            (1, model_config_pb2.ModelInstanceGroup.KIND_CPU)
        ]
        (warm_up,) = config.model_warmup
        assert set(warm_up.inputs) == {value.name for value in graph.input}
        assert sha256_of(repository / model / "1" / "model.onnx") == sha256_of(
            out / "engines" / "onnxruntime" / f"{part}.onnx"
        )


def test_the_model_sam_has_one_instance_ragged_inputs_and_its_limits(out: Path) -> None:
    options = ["--store-mib", 77, "--concurrency", 3, "--max-batch", 2]
    assert samq("triton", "--output-dir", out, *options).code == 0
    config = config_of(out / "triton", "sam")
    assert (config.backend, config.max_batch_size) == ("python", 3)
    assert [group.count for group in config.instance_group] == [1]
    assert all(entry.optional and entry.allow_ragged_batch for entry in config.input)
    assert tensors_of(config.input)["mask_input"] == ("TYPE_FP32", [-1, 32, 32])
    assert {name: int(value.string_value) for name, value in config.parameters.items()} == {
        "store_mib": 77,
        "max_image_pixels": 50_000_000,
        "max_prompts": 64,
        "max_points": 64,
        "max_mask_pixels": 200_000_000,
    }
    assert config_of(out / "triton", "sam_image_encoder").max_batch_size == 2


def test_plans_are_served_by_tensorrt_in_fp16_within_their_ranges(out: Path) -> None:
    answer = samq("triton", "--output-dir", with_plans(out), "--model-version", 3)
    assert answer.code == 0, answer.err
    repository = out / "triton"
    for part, model in MODELS.items():
        config = config_of(repository, model)
        assert (config.platform, config.backend) == ("tensorrt_plan", "")
        assert config.max_batch_size == MOST["batch"]
        assert config.default_model_filename == "model.plan"
        assert dict(config.cc_model_filenames) == {"9.0": "model.plan"}
        assert [group.kind for group in config.instance_group] == [model_config_pb2.ModelInstanceGroup.KIND_GPU]
        types = {kind for kind, _ in tensors_of([*config.input, *config.output]).values()}
        assert types == ({"TYPE_FP16", "TYPE_INT64"} if part == "mask_decoder" else {"TYPE_FP16"})
        assert [path.name for path in (repository / model / "3").iterdir()] == ["model.plan"]
        assert (repository / model / "3" / "model.plan").read_bytes() == f"plan of {part} for (9, 0)".encode()
    settings = json.loads((repository / "sam" / "3" / "settings.json").read_text())
    assert settings["prompts_at_once"] == MOST["prompts"]
    assert settings["mask_decoder"]["inputs"]["point_coords"] == {
        "shape": ["batch", "prompts", "points", 2],
        "dtype": "float16",
    }
    assert config_of(repository, "sam").parameters["max_points"].string_value == str(MOST["points"])
    assert (repository / "requirements.txt").read_text().split() == ["numpy>=1.23", "pillow>=11"]


def test_an_engine_of_static_shape_has_no_batching(out: Path) -> None:
    assert samq("triton", "--output-dir", with_plans(out, dynamic=())).code == 0
    config = config_of(out / "triton", "sam_image_encoder")
    assert config.max_batch_size == 0
    assert not config.HasField("dynamic_batching")
    assert tensors_of(config.input) == {"pixel_values": ("TYPE_FP16", [1, 3, 128, 128])}
    assert config_of(out / "triton", "sam").parameters["max_points"].string_value == "1"


def test_plans_for_one_image_take_any_prompts_and_are_not_batched(out: Path) -> None:
    """What TensorRT jobs build unless told otherwise: prompts are never filled up."""
    assert samq("triton", "--output-dir", with_plans(out, dynamic=("prompts", "points"))).code == 0
    repository = out / "triton"
    for model in MODELS.values():
        config = config_of(repository, model)
        assert config.max_batch_size == 0
        assert not config.HasField("dynamic_batching")
    config = config_of(repository, "sam_mask_decoder")
    assert tensors_of(config.input)["point_coords"] == ("TYPE_FP16", [1, -1, -1, 2])
    assert list(config.model_warmup[0].inputs["point_coords"].dims) == [1, 1, 1, 2]
    settings = json.loads((repository / "sam" / "1" / "settings.json").read_text())
    assert settings["mask_decoder"]["inputs"]["point_coords"]["shape"] == [1, "prompts", "points", 2]
    assert settings["prompts_at_once"] == MOST["prompts"]
    assert config_of(repository, "sam").parameters["max_points"].string_value == str(MOST["points"])


def test_plans_for_several_gpus_stand_side_by_side(out: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(out, other)
    with_plans(out), with_plans(other, (8, 9))
    assert samq("triton", "--output-dir", out, "--plans-of", other).code == 0
    model = out / "triton" / "sam_mask_decoder"
    filenames = dict(config_of(out / "triton", "sam_mask_decoder").cc_model_filenames)
    assert filenames == {"9.0": "model.plan", "8.9": "model_cc8.9.plan"}
    assert (model / "1" / "model_cc8.9.plan").read_bytes() == b"plan of mask_decoder for (8, 9)"


@pytest.mark.parametrize(
    ("capability", "options", "words"),
    [
        ((9, 0), {}, "compute capability 9.0 already"),
        ((8, 9), {"sha256": "1" * 64}, "another graph"),
        ((8, 9), {"dynamic": ()}, "other inputs or outputs"),
    ],
)
def test_plans_of_another_model_are_refused(
    out: Path, tmp_path: Path, capability: tuple[int, int], options: dict[str, Any], words: str
) -> None:
    other = tmp_path / "other"
    shutil.copytree(out, other)
    with_plans(out), with_plans(other, capability, **options)
    refused(samq("triton", "--output-dir", out, "--plans-of", other), 2, words)
    assert not (out / "triton").exists()


def test_plans_cannot_join_onnx_files(out: Path) -> None:
    refused(samq("triton", "--output-dir", out, "--plans-of", out), 2, "no TensorRT plans", "--plans-of")


def test_onnx_runtime_on_a_gpu_needs_its_own_package(out: Path) -> None:
    assert samq("triton", "--output-dir", copied_as(out, "onnxruntime-cuda")).code == 0
    assert not list((out / "triton").glob("*/1/model.onnx.json"))  # which is for the CPU
    kinds = {config_of(out / "triton", model).instance_group[0].kind for model in MODELS.values()}
    assert kinds == {model_config_pb2.ModelInstanceGroup.KIND_GPU}
    assert "onnxruntime-gpu[cuda,cudnn]==" in (out / "triton" / "requirements.txt").read_text()


def test_engines_keep_what_says_how_they_are_run(out: Path) -> None:
    assert samq("triton", "--output-dir", out).code == 0
    for part, model in MODELS.items():
        copied = out / "triton" / model / "1" / "model.onnx.json"
        assert copied.read_bytes() == (out / "engines" / "onnxruntime" / f"{part}.onnx.json").read_bytes()


def test_the_code_of_a_model_needs_only_what_requirements_name(out: Path) -> None:
    assert samq("triton", "--output-dir", out).code == 0
    for home in (out / "triton").glob("*/1"):
        files = sorted(home.rglob("*.py"))
        laid_out = {".".join(path.relative_to(home).with_suffix("").parts).removesuffix(".__init__") for path in files}
        for path in files:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom):
                    names = {str(node.module)}
                elif isinstance(node, ast.Import):
                    names = {alias.name for alias in node.names}
                else:
                    continue
                outside = {name for name in names if name.split(".")[0] not in {*sys.stdlib_module_names, *PROVIDED}}
                assert outside <= laid_out, path


def test_a_repository_is_replaced_whole_or_left_as_it_was(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert samq("triton", "--output-dir", out).code == 0
    before = sha256_of(out / "triton" / "sam" / "config.pbtxt")
    (out / "triton" / "sam" / "stale").touch()
    monkeypatch.setattr(shutil, "copyfile", fail_on("model.onnx", shutil.copyfile))
    refused(samq("triton", "--output-dir", out, "--store-mib", 5), 5, "No space left", "--repository")
    assert sha256_of(out / "triton" / "sam" / "config.pbtxt") == before
    monkeypatch.undo()
    assert samq("triton", "--output-dir", out, "--store-mib", 5).code == 0
    assert sha256_of(out / "triton" / "sam" / "config.pbtxt") != before
    assert not (out / "triton" / "sam" / "stale").exists()
    assert not list(out.glob(".*"))


def fail_on(name: str, copy: Callable[..., Any]) -> Callable[..., Any]:
    """A copy function that finds the disk full when it comes to a file."""

    def copying(source: Any, target: Path, **options: Any) -> Any:
        if target.name == name:
            raise OSError(28, "No space left on device")
        return copy(source, target, **options)

    return copying


def test_a_folder_with_other_things_is_left_alone(out: Path, tmp_path: Path) -> None:
    (tmp_path / "models" / "resnet").mkdir(parents=True)
    refused(samq("triton", "--output-dir", out, "--repository", tmp_path / "models"), 2, "something else")
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["resnet"]


def test_an_unfinished_or_changed_output_directory_is_refused(out: Path, tmp_path: Path) -> None:
    refused(samq("triton", "--output-dir", tmp_path / "nothing"), 6, "no output directory")
    with (out / "engines" / "onnxruntime" / "mask_decoder.onnx").open("ab") as file:
        file.write(b"x")
    refused(samq("triton", "--output-dir", out), 6, "`build`", "was changed")


def test_without_tritonclient_the_fix_is_named(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tritonclient.grpc", None)
    refused(samq("triton", "--output-dir", out), 5, "tritonclient", 'pip install "samq[triton]"')
    assert not (out / "triton").exists()
    assert not list(out.glob(".*"))
