"""The sidecar of a plan, and where the plan is refused."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from samq.engines.base import Executed
from samq.engines.cuda import Device
from samq.engines.predictor import MOST_PROMPTS_AT_ONCE
from samq.engines.tensorrt_layers import EngineLayer
from samq.engines.tensorrt_plan import (
    USUAL_RANGES,
    BuildOptions,
    PlanInfo,
    PlanTensor,
    Refittable,
    executed_layers,
    load_info,
    save_info,
    sidecar_of,
)
from samq.errors import BadInput, UsageError

H100 = Device("NVIDIA H100 80GB HBM3", (9, 0), 81559)
INFO = PlanInfo(
    gpu=H100.name,
    capability=H100.capability,
    tensorrt="8.6.0",
    onnx="image_encoder.onnx",
    onnx_sha256="00" * 32,
    strongly_typed=False,
    inputs=(PlanTensor("pixel_values", ("batch", 3, 1024, 1024), "float32"),),
    outputs=(PlanTensor("image_embeddings", (1, 256, 64, 64), "float16"),),
    options=BuildOptions(workspace_mib=4096, ranges={"batch": (1, 1, 8)}, timing_cache="timings"),
    seconds=61.25,
    plan_bytes=4,
    gemms=("a.qkv/MatMul",),
    layers=(EngineLayer("a.qkv/MatMul", "gemm", "INT8", "", "sm80_i8i8", ("a.qkv/MatMul",)),),
    warnings=("something to know",),
    refittable=Refittable("structure", {"a/KERNEL": "digest", "b/CONSTANT": ""}),
)


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "image_encoder.plan"
    path.write_bytes(b"plan")
    save_info(path, INFO)
    return path


def test_a_sidecar_reads_as_it_was_written(plan: Path) -> None:
    assert sidecar_of(plan).name == "image_encoder.plan.json"
    assert load_info(plan) == INFO
    assert executed_layers(plan) == {"a.qkv": Executed("INT8 GEMM", "sm80_i8i8")}


def test_options_read_as_they_were_written() -> None:
    options = BuildOptions(
        fp16=False, float32=("a", "b"), half_io=("c",), version_compatible=True, tactics_off=("CUDNN",),
        ranges={"prompts": (1, 2, 3)},
    )  # fmt: skip
    assert BuildOptions.from_json(json.loads(json.dumps(asdict(options)))) == options
    assert BuildOptions.from_json({}) == BuildOptions()


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"optimization_level": 6}, "optimization level 6: choose 0 to 5"),
        ({"workspace_mib": 0}, "workspace of 0 MiB"),
        ({"ranges": {"batch": (2, 1, 3)}}, r"range of batch: give smallest ≤ usual ≤ largest size, not \[2, 1, 3\]"),
        ({"ranges": {"batch": (1, 2)}}, "range of batch"),
        ({"ranges": {"batch": (0, 1, 2)}}, "range of batch"),
        ({"optimisation": 3}, "optimisation"),
        ({"tactics_off": None}, "build options: "),
        ({"ranges": [1]}, "build options: "),
    ],
)
def test_wrong_options_are_one_line(values: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        BuildOptions.from_json(values)


@pytest.mark.parametrize(
    ("options", "device", "version", "sentence"),
    [
        ({}, H100, "8.6.0", None),
        ({}, H100, "8.6.0.12", None),
        (
            {},
            H100,
            "8.6.1",
            "it was built for TensorRT 8.6.0, and this is 8.6.1; build it again with this version",
        ),
        ({"version_compatible": True}, H100, "8.6.1", None),
        (
            {"version_compatible": True},
            H100,
            "10.3.0",
            "it was built for TensorRT 8.x from 8.6.0 on, and this is 10.3.0; build it again with this version",
        ),
        (
            {"version_compatible": True},
            H100,
            "8.5.3",
            "it was built for TensorRT 8.x from 8.6.0 on, and this is 8.5.3; build it again with this version",
        ),
        (
            {},
            Device("NVIDIA A10", (8, 6), 0),
            "8.6.0",
            "it was built for NVIDIA H100 80GB HBM3 (compute capability 9.0), and this is NVIDIA A10 "
            "(compute capability 8.6); build it again here",
        ),
        ({"hardware_compatible": True}, Device("NVIDIA A10", (8, 6), 0), "8.6.0", None),
        (
            {"hardware_compatible": True},
            Device("Tesla T4", (7, 5), 0),
            "8.6.0",
            "it was built for compute capability 8.0 or newer, and this is Tesla T4 (compute capability 7.5); "
            "build it again here",
        ),
        ({}, Device("NVIDIA H200", (9, 0), 0), "8.6.0", None),
    ],
)
def test_where_a_plan_fits(options: dict[str, Any], device: Device, version: str, sentence: str | None) -> None:
    assert replace(INFO, options=BuildOptions(**options)).misfit(device, version) == sentence


def test_the_usual_ranges_hold_what_predictors_send() -> None:
    """A click (one point) and a box (two), one prompt and as many as are sent at once."""
    assert BuildOptions().ranges == USUAL_RANGES
    assert USUAL_RANGES["prompts"] == (1, 1, MOST_PROMPTS_AT_ONCE)
    assert USUAL_RANGES["points"][:2] == (1, 2)
    assert INFO.largest == {"batch": 8}
    assert replace(INFO, inputs=(PlanTensor("x", (1, 3), "float32"),)).largest == {}


def test_plans_and_sidecars_that_do_not_belong_together(plan: Path) -> None:
    plan.write_bytes(b"another plan")
    with pytest.raises(BadInput, match=r"is not the plan that image_encoder\.plan\.json tells of"):
        load_info(plan)


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"gpu": 1}', '{"capability": 9'])
def test_sidecars_that_are_none_are_one_line(plan: Path, content: str | None) -> None:
    if content is None:
        sidecar_of(plan).unlink()
    else:
        sidecar_of(plan).write_text(content, encoding="utf-8")
    with pytest.raises(BadInput, match=r"image_encoder\.plan\.json.*build the engine") as caught:
        load_info(plan)
    assert "\n" not in str(caught.value)


def test_a_sidecar_with_more_or_less_is_none(plan: Path) -> None:
    values = asdict(INFO)
    for changed in ({**values, "more": 1}, {name: value for name, value in values.items() if name != "layers"}):
        sidecar_of(plan).write_text(json.dumps(changed), encoding="utf-8")
        with pytest.raises(BadInput, match="is no sidecar of this version of samq"):
            load_info(plan)
