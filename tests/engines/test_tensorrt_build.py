"""Building with every version of TensorRT, simulated by its API list, and what stands on the disk afterwards."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from simulated_tensorrt import GRAPH, STATIC, VERSIONS, SimulatedCuda, Simulation

from samq.engines import cuda, tensorrt_log, tensorrt_timings
from samq.engines.base import Executed
from samq.engines.cuda import Device
from samq.engines.tensorrt_build import build_engine, wanted_flags
from samq.engines.tensorrt_network import profile_shapes
from samq.engines.tensorrt_plan import USUAL_RANGES, BuildOptions, PlanInfo, PlanTensor, executed_layers, load_info
from samq.engines.tensorrt_progress import Progress, silent
from samq.engines.tensorrt_timings import timings_file
from samq.errors import BadInput, MachineLacks, UsageError
from samq.files import sha256_of

RANGES = {"batch": (1, 2, 4)}


@pytest.fixture(params=VERSIONS)
def trt(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulation]:
    """One version after the other, on a simulated H100."""
    simulation, device = Simulation(request.param), SimulatedCuda()
    monkeypatch.setitem(sys.modules, "tensorrt", simulation)
    monkeypatch.setattr(cuda, "bindings", lambda: device)
    tensorrt_log._logger.cache_clear()
    yield simulation
    tensorrt_log._logger.cache_clear()


@pytest.fixture
def onnx(tmp_path: Path) -> Path:
    path = tmp_path / "part.onnx"
    path.write_text(json.dumps(GRAPH), encoding="utf-8")
    return path


def test_the_plan_its_sidecar_and_its_log(trt: Simulation, onnx: Path, tmp_path: Path) -> None:
    plan, options = tmp_path / "out" / "part.plan", BuildOptions(ranges=RANGES, workspace_mib=512)
    info = build_engine(onnx, plan, options)
    assert info == load_info(plan)
    assert (info.gpu, info.capability, info.tensorrt) == ("NVIDIA H100 80GB HBM3", (9, 0), trt.version)
    assert (info.onnx, info.onnx_sha256) == ("part.onnx", sha256_of(onnx))
    assert info.inputs == (PlanTensor("labels", ("batch", 1), "int32"), PlanTensor("x", ("batch", 3), "float16"))
    assert info.outputs == (PlanTensor("y", ("y_0", 3), "float32"),)
    assert info.options == options
    assert info.strongly_typed == (trt.version != "8.6.0")
    assert executed_layers(plan) == {"a.qkv": Executed("INT8 GEMM", "gemm")}
    assert plan.with_name("part.plan.log").is_file()


def test_what_the_builder_is_told(trt: Simulation, onnx: Path, tmp_path: Path) -> None:
    options = BuildOptions(
        ranges=RANGES, workspace_mib=512, optimization_level=5, version_compatible=True, hardware_compatible=True,
        refittable=True, timing_cache=str(tmp_path / "timings"),
    )  # fmt: skip
    build_engine(onnx, tmp_path / "part.plan", options)
    flags = trt.BuilderFlag
    weak = ["FP16", "INT8", "OBEY_PRECISION_CONSTRAINTS"] if trt.version == "8.6.0" else []
    expected = [(getattr(flags, name),) for name in (*weak, "VERSION_COMPATIBLE", "REFIT")]
    assert trt.values("IBuilderConfig.set_flag") == expected
    assert trt.values("IBuilderConfig.builder_optimization_level") == [5]
    assert trt.values("IBuilderConfig.profiling_verbosity") == [trt.ProfilingVerbosity.DETAILED]
    assert trt.values("IBuilderConfig.set_memory_pool_limit") == [(trt.MemoryPoolType.WORKSPACE, 512 << 20)]
    assert trt.values("IBuilderConfig.hardware_compatibility_level") == [trt.HardwareCompatibilityLevel.AMPERE_PLUS]
    shapes = [("labels", (1, 1), (2, 1), (4, 1)), ("x", (1, 3), (2, 3), (4, 3))]
    assert trt.values("IOptimizationProfile.set_shape") == shapes
    assert len(trt.values("IBuilderConfig.add_optimization_profile")) == 1


def test_sides_that_nobody_asked_about_have_the_usual_ranges(trt: Simulation, onnx: Path, tmp_path: Path) -> None:
    info = build_engine(onnx, tmp_path / "part.plan")
    smallest, usual, largest = USUAL_RANGES["batch"]
    assert trt.values("IOptimizationProfile.set_shape")[0] == ("labels", (smallest, 1), (usual, 1), (largest, 1))
    assert info.largest == {"batch": largest}


def test_fp16_at_the_ends_where_it_is_asked_for(trt: Simulation, tmp_path: Path) -> None:
    """Of float32 inputs and outputs, when the layers have their types; a strongly typed graph says its own."""
    path = tmp_path / "part.onnx"
    path.write_text(json.dumps(GRAPH).replace("HALF", "FLOAT"), encoding="utf-8")
    build_engine(path, tmp_path / "part.plan", BuildOptions(ranges=RANGES))
    assert trt.values("ITensor.dtype") == []
    build_engine(path, tmp_path / "part.plan", BuildOptions(ranges=RANGES, half_io=("labels", "x", "y", "z")))
    weak = trt.version == "8.6.0"
    assert trt.values("ITensor.dtype") == ([trt.DataType.HALF] * 2 if weak else [])
    done = [name for name, _ in trt.done]
    assert not weak or done.index("ITensor.dtype") > max(
        index for index, name in enumerate(done) if name == "ILayer.set_output_type"
    )


def test_float32_where_it_is_asked_for(trt: Simulation, onnx: Path, tmp_path: Path) -> None:
    """By name or by metadata, FP16 elsewhere; nothing is asked of constants, whole numbers, strongly typed graphs."""
    names = ("a.qkv/MatMul", "angles/Sin", "angles/Constant", "angles/Shape", "gone")
    info = build_engine(onnx, tmp_path / "part.plan", BuildOptions(ranges=RANGES, float32=names))
    weak = trt.version == "8.6.0"
    exact, half = trt.DataType.FLOAT, trt.DataType.HALF
    assert trt.values("ILayer.precision") == ([exact, exact, half, half] if weak else [])
    inner = [(0, exact), (0, exact), (0, half)]
    assert trt.values("ILayer.set_output_type") == (inner if weak else []), "the network's outputs keep their type"
    assert ("gone: no layer to keep in float32" in info.warnings) == weak
    assert info == load_info(tmp_path / "part.plan")
    if weak:
        assert (trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS,) in trt.values("IBuilderConfig.set_flag")


def test_products_of_integers_choose_their_arithmetic(trt: Simulation, onnx: Path, tmp_path: Path) -> None:
    """Weights may be moved on their way; a product with one float operand is none of them."""
    layers = [
        ["q", "QUANTIZE", "q", "INT8", "x"],
        ["dq", "DEQUANTIZE", "dq", "FLOAT", "q_out"],
        ["w", "DEQUANTIZE", "w", "FLOAT", "codes"],
        ["broadcast", "SHUFFLE", "broadcast", "FLOAT", "w_out"],
        ["a.qkv/MatMul", "MATRIX_MULTIPLY", "a.qkv/MatMul", "FLOAT", "dq_out", "broadcast_out"],
        ["scores", "MATRIX_MULTIPLY", "scores", "FLOAT", "dq_out", "a.qkv/MatMul_out"],
        ["moved", "SHUFFLE", "moved", "FLOAT", "scores_out"],
    ]
    onnx.write_text(json.dumps(GRAPH | {"layers": layers}), encoding="utf-8")
    build_engine(onnx, tmp_path / "part.plan", BuildOptions(ranges=RANGES))
    weak, half = trt.version == "8.6.0", trt.DataType.HALF
    assert trt.values("ILayer.precision") == ([half] * 2 if weak else [])
    assert trt.values("ILayer.set_output_type") == ([(0, half)] * 3 if weak else [])
    build_engine(onnx, tmp_path / "part.plan", BuildOptions(ranges=RANGES, float32=("a.qkv/MatMul", "broadcast")))
    assert trt.values("ILayer.precision")[2:] == ([trt.DataType.FLOAT] * 2 + [half] * 2 if weak else [])


def test_a_static_graph_has_no_profile(trt: Simulation, onnx: Path, tmp_path: Path) -> None:
    onnx.write_text(json.dumps(STATIC), encoding="utf-8")
    info = build_engine(onnx, tmp_path / "part.plan")
    assert [tensor.shape for tensor in (*info.inputs, *info.outputs)] == [(2, 1), (2, 3), (2, 3)]
    assert not trt.values("IBuilderConfig.add_optimization_profile")
    assert not trt.values("IBuilderConfig.set_memory_pool_limit")


@pytest.fixture
def timings(trt: Simulation, tmp_path: Path) -> Path:
    """File of the timings; this process holds none."""
    tensorrt_timings._HELD.clear()
    return timings_file(tmp_path / "timings", trt.version, Device("NVIDIA H100 80GB HBM3", (9, 0), 0))


def build(onnx: Path, timings: Path, progress: Progress = silent) -> PlanInfo:
    options = BuildOptions(ranges=RANGES, timing_cache=str(timings.parent))
    return build_engine(onnx, onnx.with_suffix(".plan"), options, progress)


def test_timings_are_kept_and_reused(trt: Simulation, onnx: Path, timings: Path) -> None:
    assert timings.name == f"tensorrt-{trt.version}-nvidia-h100-80gb-hbm3.cache"
    build(onnx, timings)
    assert timings.read_bytes() == b"!"
    tensorrt_timings._HELD.clear()  # another process
    timings.write_bytes(b"ab")
    build(onnx, timings)
    assert trt.values("IBuilderConfig.create_timing_cache") == [(b"",), (b"ab",)]
    assert timings.read_bytes() == b"ab!"
    assert list(timings.parent.iterdir()) == [timings]


def test_a_process_holds_on_to_its_timings(trt: Simulation, onnx: Path, timings: Path) -> None:
    """8.6 reads back a part of what it writes, and combines none of the rest; neither is needed for one's own."""
    trt.cannot_read = b"!"
    infos = [build(onnx, timings), build(onnx, timings)]
    timings.write_bytes(b"of another process!")
    infos.append(build(onnx, timings))
    used = [cache for cache, _ in trt.values("IBuilderConfig.set_timing_cache")]
    assert [cache is used[0] for cache in used] == [True] * 3
    assert not [warning for info in infos for warning in info.warnings if timings.name in warning]
    assert timings.read_bytes() == b"!"
    assert "cannot add other builds' timings to its own" in onnx.with_suffix(".plan.log").read_text(encoding="utf-8")


def test_a_process_adds_what_others_measured_since(trt: Simulation, onnx: Path, timings: Path) -> None:
    """Before it builds, for then it need not measure that itself."""
    build(onnx, timings)
    timings.write_bytes(b"c")
    build(onnx, timings)
    calls = [name for name, _ in trt.done]
    assert calls.index("ITimingCache.combine") < len(calls) - 1 - calls[::-1].index("Builder.build_serialized_network")
    assert timings.read_bytes() == b"c!"
    assert len(trt.values("ITimingCache.combine")) == 1
    build(onnx, timings)
    assert len(trt.values("ITimingCache.combine")) == 1


def test_timings_that_were_thrown_away_are_measured_anew(trt: Simulation, onnx: Path, timings: Path) -> None:
    build(onnx, timings)
    timings.unlink()
    build(onnx, timings)
    first, second = (cache for cache, _ in trt.values("IBuilderConfig.set_timing_cache"))
    assert second is not first


@pytest.mark.parametrize(("others", "kept"), [(b"abc", b"a!bc"), (b"of another driver", b"a!")])
def test_builds_at_once_keep_the_timings_of_each(
    others: bytes, kept: bytes, trt: Simulation, onnx: Path, timings: Path
) -> None:
    """Another one, which began with the same file, ends while this one builds."""
    timings.parent.mkdir()
    timings.write_bytes(b"a")

    def end_another(phase: str, _: int, __: int) -> None:
        if phase == "build":
            timings.write_bytes(others)

    info = build(onnx, timings, end_another)
    assert sorted(timings.read_bytes()) == sorted(kept)
    assert (f"{timings.name} does not fit; it is written anew" in info.warnings) == (kept == b"a!")


def test_timings_that_cannot_be_kept_are_told(trt: Simulation, onnx: Path) -> None:
    with pytest.raises(MachineLacks, match="timing_cache"):
        build(onnx, onnx / "timings" / "of.cache")
    assert not trt.values("Builder.build_serialized_network"), "before the minutes that a build takes"


@pytest.mark.parametrize("before", [b"", b"a"])
def test_timings_that_cannot_be_kept_any_more_cost_no_plan(
    before: bytes, trt: Simulation, onnx: Path, timings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills up during the build; this process has them all the same."""
    write_bytes = Path.write_bytes
    timings.parent.mkdir()
    if before:
        timings.write_bytes(before)

    def full(path: Path, content: bytes) -> int:
        if path.parent == timings.parent:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    for _ in range(2):
        info = build(onnx, timings)
        assert load_info(onnx.with_suffix(".plan")) == info
        (warning,) = [warning for warning in info.warnings if "timings" in warning or ".cache" in warning]
        assert re.match(r"timings are not kept: .*(No space|disk is full)", warning)
    first, second = (cache for cache, _ in trt.values("IBuilderConfig.set_timing_cache"))
    assert second is first
    assert (timings.read_bytes() if before else b"") == before


def test_timings_that_tensorrt_does_not_give_cost_no_plan(trt: Simulation, onnx: Path, timings: Path) -> None:
    trt.fails["ITimingCache.serialize"] = None
    assert f"{timings.name} is not written: TensorRT does not give its timings" in build(onnx, timings).warnings
    assert onnx.with_suffix(".plan").is_file()
    assert not timings.exists()


def test_timings_that_do_not_fit_are_measured_anew(trt: Simulation, onnx: Path, timings: Path) -> None:
    timings.parent.mkdir()
    timings.write_bytes(b"of another driver")
    trt.does_not_fit = b"of another driver"
    trt.fails["Builder.build_serialized_network"] = None
    with pytest.raises(BadInput, match="no reason given"):  # what is said of timings is no reason
        build(onnx, timings)
    del trt.fails["Builder.build_serialized_network"]
    assert f"{timings.name} does not fit; timings are measured anew" in build(onnx, timings).warnings
    assert timings.read_bytes() == b"!"
    trt.does_not_fit = b""  # what this process holds by now
    timings.write_bytes(b"a")
    assert not [warning for warning in build(onnx, timings).warnings if timings.name in warning]
    assert timings.read_bytes() == b"a!"


def test_a_tensorrt_that_takes_no_timings_is_told(trt: Simulation, onnx: Path, timings: Path) -> None:
    trt.fails["IBuilderConfig.set_timing_cache"] = False
    assert "this TensorRT takes no timings: all are measured anew" in build(onnx, timings).warnings
    assert not timings.exists()


def test_timings_that_cannot_be_read_at_all_are_told_before_the_build(
    trt: Simulation, onnx: Path, timings: Path
) -> None:
    timings.mkdir(parents=True)
    with pytest.raises(MachineLacks, match=r"cannot be read or written \(Is a directory\); name another timing_cache"):
        build(onnx, timings)
    assert not trt.values("Builder.build_serialized_network")


def test_timings_that_can_be_read_in_part_serve_as_far(trt: Simulation, onnx: Path, timings: Path) -> None:
    """As 8.6 answers timings of fused regions: an error in the log, and a cache of the others."""
    trt.cannot_read = b"fused"
    timings.parent.mkdir()
    timings.write_bytes(b"ab fused")
    info = build(onnx, timings)
    assert [warning for warning in info.warnings if timings.name in warning] == [
        f"{timings.name} cannot be read in full by this TensorRT; the rest is measured anew"
    ]
    assert timings.read_bytes() == b"ab !"


def test_timings_that_cannot_be_read_are_not_why_a_build_fails(trt: Simulation, onnx: Path, timings: Path) -> None:
    timings.parent.mkdir()
    timings.write_bytes(b"of fused regions")
    trt.cannot_read = b"of fused regions"
    trt.fails["Builder.build_serialized_network"] = None
    trt.says["Builder.build_serialized_network"] = [("ERROR", "4: Error Code 4: Internal Error (no dimensions.)")]
    with pytest.raises(BadInput, match=r"TensorRT fails \(Internal Error \(no dimensions"):
        build(onnx, timings)
    assert "Myelin" in onnx.with_suffix(".plan.log").read_text(encoding="utf-8")


def test_an_account_that_cannot_be_read_costs_no_plan(trt: Simulation, onnx: Path, tmp_path: Path) -> None:
    trt.fails["EngineInspector.get_engine_information"] = '{"Layers": [{"Name": "a "quoted" name"}]}'
    info = build_engine(onnx, tmp_path / "part.plan", BuildOptions(ranges=RANGES))
    assert "the engine inspector's account cannot be read: no layer is known" in info.warnings
    unknown = Executed("unknown (the engine inspector does not name it)", "none")
    assert executed_layers(tmp_path / "part.plan") == {"a.qkv": unknown}


def test_progress(trt: Simulation, onnx: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    build_engine(onnx, tmp_path / "part.plan", BuildOptions(ranges=RANGES), lambda *step: seen.append(step))
    own = [("Building Engine", step, 2) for step in range(3)] if trt.version != "8.6.0" else []
    assert seen == [("parse", 0, 0), ("build", 0, 0), *own, ("inspect", 0, 0)]


def test_who_watches_can_end_a_build(trt: Simulation, onnx: Path, tmp_path: Path) -> None:
    def interrupt(phase: str, step: int, steps: int) -> None:
        if phase in ("Building Engine", "inspect"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(onnx, tmp_path / "part.plan", BuildOptions(ranges=RANGES), interrupt)
    assert not (tmp_path / "part.plan.json").exists()
    assert len(trt.values("cancelled")) == (trt.version != "8.6.0"), "it does not wait for the end where it can"


@pytest.mark.usefixtures("interrupts")
def test_an_interrupt_that_the_bindings_swallow_ends_a_build(
    trt: Simulation, onnx: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trt.interrupted = True
    with pytest.raises(KeyboardInterrupt):
        build_engine(onnx, tmp_path / "part.plan", BuildOptions(ranges=RANGES))
    assert not (tmp_path / "part.plan").exists()
    assert len(trt.values("cancelled")) == (trt.version != "8.6.0"), "it does not wait for the end where it can"
    assert "Ctrl-C again ends at once" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_who_takes_interrupts_otherwise_is_left_alone(trt: Simulation, onnx: Path, tmp_path: Path) -> None:
    trt.interrupted = True
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        build_engine(onnx, tmp_path / "part.plan", BuildOptions(ranges=RANGES))
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_refused_node_is_named(trt: Simulation, onnx: Path, tmp_path: Path) -> None:
    trt.fails["OnnxParser.parse_from_file"] = False
    trt.says["OnnxParser.parse_from_file"] = [("ERROR", 'output: "652"\nname: "Range_271"\nop_type: "Range"\n')]
    with pytest.raises(BadInput, match=rf"TensorRT {trt.version} does not take node Range_271 \(Range\): Invalid Node"):
        build_engine(onnx, tmp_path / "part.plan")
    assert "Range_271" in (tmp_path / "part.plan.log").read_text(encoding="utf-8")


def test_out_of_memory(trt: Simulation, onnx: Path, tmp_path: Path) -> None:
    trt.fails["Builder.build_serialized_network"] = None
    trt.says["Builder.build_serialized_network"] = [("ERROR", "2: Error Code 2: OutOfMemory (no further information)")]
    plan = tmp_path / "part.plan"
    plan.with_name("part.plan.json").write_text("of an older plan", encoding="utf-8")
    with pytest.raises(MachineLacks, match=r"part\.onnx: the GPU's memory is not enough"):
        build_engine(onnx, plan, BuildOptions(ranges=RANGES))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part.onnx", "part.plan.log"]


@pytest.mark.parametrize(("kind", "file"), [("Builder", "part.onnx"), ("Runtime", "part.plan")])
def test_a_builder_or_runtime_that_does_not_start(
    trt: Simulation, onnx: Path, tmp_path: Path, kind: str, file: str
) -> None:
    trt.fails[kind] = None
    trt.says[kind] = [("WARNING", "CUDA initialization failure with error: 35. Please check")]
    with pytest.raises(MachineLacks, match=f"{file}: CUDA does not start"):
        build_engine(onnx, tmp_path / "part.plan", BuildOptions(ranges=RANGES))
    assert not (tmp_path / "part.plan.json").exists()


def test_what_is_missing(trt: Simulation, onnx: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="input labels has a dynamic side 'batch' without a range"):
        build_engine(onnx, tmp_path / "part.plan", BuildOptions(ranges={}))
    with pytest.raises(BadInput, match=r"none\.onnx is missing"):
        build_engine(tmp_path / "none.onnx", tmp_path / "part.plan")


@pytest.mark.parametrize(
    ("options", "strongly_typed", "quantized", "expected"),
    [
        (BuildOptions(), False, False, ("FP16",)),
        (BuildOptions(), False, True, ("FP16", "INT8", "OBEY_PRECISION_CONSTRAINTS")),
        (BuildOptions(fp16=False), False, True, ("INT8",)),
        (BuildOptions(fp16=False), False, False, ()),
        (BuildOptions(float32=("node",)), False, False, ("FP16", "OBEY_PRECISION_CONSTRAINTS")),
        (BuildOptions(float32=("node",)), True, False, ()),
        (BuildOptions(), True, True, ()),
        (BuildOptions(version_compatible=True), True, False, ("VERSION_COMPATIBLE",)),
        (BuildOptions(refittable=True, hardware_compatible=True), True, False, ("REFIT",)),
    ],
)
def test_flags(options: BuildOptions, strongly_typed: bool, quantized: bool, expected: tuple[str, ...]) -> None:
    assert wanted_flags(options, strongly_typed=strongly_typed, quantized=quantized) == expected


def test_profiles() -> None:
    ranges = {"batch": (1, 1, 8), "prompts": (1, 4, 16)}
    assert profile_shapes("point_coords", ("batch", "prompts", 2, 2), ranges) == (
        (1, 1, 2, 2),
        (1, 4, 2, 2),
        (8, 16, 2, 2),
    )
