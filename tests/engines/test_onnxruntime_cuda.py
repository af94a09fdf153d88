"""The CUDA engine: what it says without a GPU, its buffers (tried on the CPU), and, on a GPU, itself."""

from __future__ import annotations

import ctypes
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from exported import canonical, float_model, largest_error, quantized, skeleton
from lowered import SIZES
from lowered import feeds as prompts_of
from onnx import TensorProto, helper
from small_model import pixels, recipe_of

from samq.calib.parts import IMAGE_ENCODER, MASK_DECODER
from samq.calib.prompts import boxes
from samq.engines import onnxruntime_cuda
from samq.engines.base import Executed
from samq.engines.kernels import by_kind
from samq.engines.onnxruntime import OnnxRuntimeEngine
from samq.engines.onnxruntime_cuda import (
    CPU,
    CUDA,
    NO_GRAPH,
    Bound,
    CudaOptions,
    DeviceIO,
    OnDevice,
    OnnxRuntimeCudaEngine,
    Overwritten,
    cuda_session,
    executed_by,
    executed_on_gpu,
    keeps_graphs_apart,
    timed,
)
from samq.engines.predictor import Predictor, prompt_feeds
from samq.errors import BadInput, MachineLacks, SamqError
from samq.export.lower_onnxruntime_cuda import lower_for_onnxruntime_cuda
from samq.export.parts import float_part, save_part
from samq.export.trace import StaticShape, trace


def why_no_gpu() -> str:
    """What keeps this machine from running the engine; empty where nothing does."""
    try:
        onnxruntime_cuda.require_cuda()
    except MachineLacks as error:
        return str(error)
    return ""


NO_GPU = why_no_gpu()
on_gpu = pytest.mark.skipif(bool(NO_GPU), reason=NO_GPU)
without_cuda = pytest.mark.skipif(CUDA in ort.get_available_providers(), reason="this onnxruntime has a CUDA provider")

W4 = recipe_of("int4_w4only_rtn")
PIXELS = {"pixel_values": pixels(1, seed=3).numpy()}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small encoder with packed 4-bit weights, lowered for CUDA, dynamic in its batch."""
    path = tmp_path_factory.mktemp("lowered") / "image_encoder.onnx"
    save_part(lower_for_onnxruntime_cuda(canonical(W4, IMAGE_ENCODER), weights="packed").model, path)
    return path


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The float parts with static shapes, lowered for CUDA."""
    folder = tmp_path_factory.mktemp("static")
    paths = folder / "image_encoder.onnx", folder / "mask_decoder.onnx"
    for part, path in zip((IMAGE_ENCODER, MASK_DECODER), paths, strict=True):
        model = float_part(trace(float_model(), part, StaticShape()), float_model(), half=False)
        save_part(lower_for_onnxruntime_cuda(model).model, path)
    return paths


def on_cpu(path: Path, profile: Path | None = None) -> Any:
    """A session on the CPU, for what does not depend on the device."""
    options = ort.SessionOptions()
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    return ort.InferenceSession(str(path), options, providers=[CPU])


@without_cuda
def test_an_onnxruntime_without_cuda_is_told_with_its_fix(encoder: Path) -> None:
    with pytest.raises(MachineLacks, match=r"has no CUDA provider.*pip uninstall.*onnxruntime-gpu") as caught:
        OnnxRuntimeCudaEngine(encoder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("missing", "fix"),
    [("libcublasLt.so.13", "pip install"), ("libcuda.so.1", "a machine with an NVIDIA driver")],
)
def test_libraries_that_do_not_load_are_told_with_their_fix(
    missing: str, fix: str, encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime itself would go on, on the CPU."""

    def load(*_: object, **__: object) -> None:
        raise OSError(f"{missing}: cannot open shared object file: No such file or directory")

    onnxruntime_cuda.require_cuda.cache_clear()
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(ctypes, "CDLL", load)
    with pytest.raises(MachineLacks, match=f"{missing}.*{fix}"):
        OnnxRuntimeCudaEngine(encoder)
    onnxruntime_cuda.require_cuda.cache_clear()


def test_libraries_are_found_in_nvidias_wheels_wherever_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime looks beside itself alone. Here the provider needs cuBLAS, and that cuBLASLt."""
    needs = {"libonnxruntime_providers_cuda.so": "libcublas.so.13", "libcublas.so.13": "libcublasLt.so.13"}
    for name in needs.values():
        file = tmp_path / "nvidia" / "cu13" / "lib" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    loaded: list[str] = []

    def load(path: str, mode: int = 0) -> None:
        name = Path(path).name
        if needs.get(name, loaded) not in (loaded, *loaded):
            raise OSError(f"{needs[name]}: cannot open shared object file: No such file or directory")
        loaded.append(name)

    onnxruntime_cuda.require_cuda.cache_clear()
    monkeypatch.syspath_prepend(str(tmp_path))  # type: ignore[no-untyped-call] # pytest's own
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(ort, "preload_dlls", lambda: None)
    monkeypatch.setattr(ctypes, "CDLL", load)
    onnxruntime_cuda.require_cuda()
    assert loaded[1:] == ["libcublasLt.so.13", "libcublas.so.13", "libonnxruntime_providers_cuda.so"]
    onnxruntime_cuda.require_cuda.cache_clear()


def test_a_session_that_silently_runs_on_the_cpu_is_refused(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime_cuda, "require_cuda", lambda: None)
    monkeypatch.setattr(ort, "InferenceSession", lambda *_, **__: on_cpu_only)
    on_cpu_only = on_cpu_session(encoder)
    with pytest.raises(MachineLacks, match="does not start"):
        cuda_session(encoder, CudaOptions(), cuda_graph=False)


def on_cpu_session(path: Path) -> Any:
    """A real session whose only provider is the CPU's."""
    return ort.capi.onnxruntime_inference_collection.InferenceSession(str(path), providers=[CPU])


@pytest.mark.parametrize("content", [None, b"", b"not onnx"])
def test_a_file_that_is_no_model_is_one_line(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((BadInput, MachineLacks)) as caught:
        OnnxRuntimeCudaEngine(path)
    assert "\n" not in str(caught.value)
    assert content is not None or isinstance(caught.value, BadInput)


WHERE = "; GPU=0 ; hostname=host ; file=cuda_call.cc ; line=5 ; expr=cudaStreamSynchronize(stream);"


@pytest.mark.parametrize(
    ("said", "kind", "line"),
    [
        ("CUDA failure 2: out of memory ", MachineLacks, "a.onnx: the GPU is out of memory; use a smaller batch"),
        ("CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ", MachineLacks, "a.onnx: the GPU is out of memory;"),
        ("CUDA failure 209: no kernel ", MachineLacks, "a.onnx: the GPU fails (CUDA failure 209: no kernel);"),
        ("CUDA failure 700: illegal ", MachineLacks, "a.onnx: the GPU fails (CUDA failure 700: illegal);"),
        ("CUDNN failure 8: CUDNN_STATUS_X ", MachineLacks, "a.onnx: the GPU fails (CUDNN failure 8: CUDNN_STATUS_X);"),
        ("CUDNN_FE failure 11: BACKEND ", MachineLacks, "a.onnx: the GPU fails (CUDNN_FE failure 11: BACKEND);"),
        ("Failed to allocate memory for requested buffer", MachineLacks, "a.onnx: out of memory; use a smaller batch"),
        ("Got invalid dimensions for input", BadInput, "a.onnx: Non-zero status code"),
    ],
)
def test_failures_of_a_run_are_told_by_what_fails(said: str, kind: type[SamqError], line: str) -> None:
    text = f"Non-zero status code returned while running Add node. Status Message: cuda_call.cc:129 {said}{WHERE}\nmore"
    error = onnxruntime_cuda._told_of_gpu(Path("folder/a.onnx"), RuntimeError(text))
    assert type(error) is kind
    assert str(error).startswith(line)
    assert "\n" not in str(error)


def test_a_gpu_that_fails_a_session_is_told(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError(f"CUDA failure 46: all CUDA-capable devices are busy {WHERE}")

    monkeypatch.setattr(onnxruntime_cuda, "require_cuda", lambda: None)
    monkeypatch.setattr(ort, "InferenceSession", refuse)
    with pytest.raises(MachineLacks, match=r"the GPU fails \(CUDA failure 46: all CUDA-capable devices are busy\)"):
        cuda_session(encoder, CudaOptions(), cuda_graph=False)


@pytest.mark.parametrize("asked", [None, True])
def test_a_part_that_cannot_be_recorded_is_launched_kernel_by_kernel(
    asked: bool | None, encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless it was to be recorded."""

    def session(*_: object, providers: list[Any], **__: object) -> Any:
        if providers[0][1]["enable_cuda_graph"] == "1":
            raise RuntimeError("This session cannot use the graph capture feature as requested by the user")
        raise RuntimeError("launched kernel by kernel")

    monkeypatch.setattr(onnxruntime_cuda, "require_cuda", lambda: None)
    monkeypatch.setattr(ort, "InferenceSession", session)
    with pytest.raises(BadInput, match="cannot be recorded" if asked else "launched kernel by kernel"):
        OnnxRuntimeCudaEngine(encoder, CudaOptions(cuda_graph=asked))


def test_options_reach_the_provider() -> None:
    given = CudaOptions(device=1, attention="cudnn").for_provider(cuda_graph=True)
    assert given["device_id"] == given["enable_cuda_graph"] == given["enable_skip_layer_norm_strict_mode"] == "1"
    assert given["sdpa_kernel"] == "8"
    assert "sdpa_kernel" not in CudaOptions().for_provider(cuda_graph=False)


def test_bound_buffers_give_what_a_plain_run_gives(parts: tuple[Path, Path]) -> None:
    device_io = DeviceIO(on_cpu(parts[0]), "cpu")
    expected = OnnxRuntimeEngine(parts[0]).run(PIXELS)
    for feeds in (PIXELS, {"pixel_values": 2 * PIXELS["pixel_values"]}, PIXELS):
        results = device_io.execute(device_io.bind(feeds))
        arrays = {name: np.asarray(value) for name, value in results.items()}
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, expected[name])
        assert results[name].shape == array.shape


def test_dynamic_sides_may_change_from_run_to_run(encoder: Path) -> None:
    device_io, engine = DeviceIO(on_cpu(encoder), "cpu"), OnnxRuntimeEngine(encoder)
    for images in (1, 2, 1):
        feeds = {"pixel_values": pixels(images, seed=images).numpy()}
        results = device_io.execute(device_io.bind(feeds))
        for name, expected in engine.run(feeds).items():
            np.testing.assert_array_equal(np.asarray(results[name]), expected)


@pytest.mark.parametrize(("version", "apart"), [("1.23.2", False), ("1.29.0", False), ("1.30.0", True), ("2.0", True)])
def test_which_runtimes_keep_graphs_apart(version: str, apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "__version__", version)
    assert keeps_graphs_apart() == apart


def graph_of(bound: Bound) -> str:
    """The runtime's name of the graph that a run records or replays."""
    return str(bound.run_options.get_run_config_entry("gpu_graph_id"))


def test_a_runtime_that_mixes_graphs_up_records_one_and_no_dynamic_shapes(
    parts: tuple[Path, Path], encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And replays it until other buffers come."""
    monkeypatch.setattr(ort, "__version__", "1.29.0")
    dynamic = DeviceIO(on_cpu(encoder), "cpu", cuda_graph=True)
    for _ in range(3):
        bound = dynamic.bind(PIXELS)
        dynamic.execute(bound)
        assert graph_of(bound) == NO_GRAPH
    static, decoder = (DeviceIO(on_cpu(path), "cpu", cuda_graph=True) for path in parts)
    assert (dynamic.records, static.records) == (False, True)
    features = static.execute(static.bind(PIXELS))
    prompt = prompts_of(ir.load(parts[1]), SIZES)
    own, others = decoder.bind(prompt), prompt | features
    assert [graph_of(own), graph_of(decoder.bind(prompt))] == ["1", "1"]
    assert [graph_of(decoder.bind(others)), graph_of(decoder.bind(prompt))] == [NO_GRAPH, NO_GRAPH]


def test_dynamic_shapes_that_were_to_be_recorded_are_refused_by_a_runtime_that_cannot(
    encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort, "__version__", "1.29.0")
    monkeypatch.setattr(onnxruntime_cuda, "cuda_session", lambda path, *_, **__: on_cpu(path))
    with pytest.raises(BadInput, match=r"dynamic shapes, which onnxruntime 1\.29\.0 .* install 1\.30 or newer"):
        OnnxRuntimeCudaEngine(encoder, CudaOptions(cuda_graph=True))


def test_shapes_that_come_again_have_buffers_of_their_own(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a recorded graph reads and writes; those that come last have none."""
    monkeypatch.setattr(ort, "__version__", "1.30.0")
    monkeypatch.setattr(onnxruntime_cuda, "MOST_GRAPHS", 2)
    device_io, engine = DeviceIO(on_cpu(encoder), "cpu", cuda_graph=True), OnnxRuntimeEngine(encoder)
    seen: dict[int, list[tuple[int, str]]] = {}
    for run, images in enumerate((1, 2, 3, 1, 2, 3, 1, 2, 3)):
        feeds = {"pixel_values": pixels(images, seed=run).numpy()}
        bound = device_io.bind(feeds)
        results = device_io.execute(bound)
        for name, expected in engine.run(feeds).items():
            np.testing.assert_array_equal(np.asarray(results[name]), expected)
        address = results["image_embeddings"].value().data_ptr()
        seen.setdefault(images, []).append((address, graph_of(bound)))
    graphs = {images: [graph for _, graph in runs] for images, runs in seen.items()}
    assert graphs == {1: ["-1", "1", "1"], 2: ["-1", "2", "2"], 3: ["-1"] * 3}
    assert all(seen[images][1] == seen[images][2] for images in (1, 2))


def test_results_go_from_engine_to_engine_where_they_are(parts: tuple[Path, Path]) -> None:
    encoder_io, decoder_io = (DeviceIO(on_cpu(path), "cpu") for path in parts)
    features = encoder_io.execute(encoder_io.bind(PIXELS))
    prompt = boxes(np.array([[20, 30, 90, 100]], np.float32))
    feeds = prompt_feeds(features, prompt.coords, prompt.labels)  # type: ignore[arg-type]
    found = decoder_io.execute(decoder_io.bind({**feeds, **features}))
    plain = OnnxRuntimeEngine(parts[1]).run({**feeds, **OnnxRuntimeEngine(parts[0]).run(PIXELS)})
    for name, expected in plain.items():
        np.testing.assert_array_equal(np.asarray(found[name]), expected)


def test_a_result_that_a_later_run_overwrote_cannot_be_read(parts: tuple[Path, Path]) -> None:
    device_io = DeviceIO(on_cpu(parts[0]), "cpu")
    first = device_io.execute(device_io.bind(PIXELS))["image_embeddings"]
    assert isinstance(first, OnDevice)
    np.asarray(first)
    device_io.execute(device_io.bind(PIXELS))
    with pytest.raises(Overwritten):
        np.asarray(first)


def test_a_time_for_each_repeat(parts: tuple[Path, Path]) -> None:
    device_io = DeviceIO(on_cpu(parts[0]), "cpu")
    taken = timed(device_io, device_io.bind(PIXELS), 3)
    assert len(taken) == 3
    assert min(taken) > 0


def test_what_ran_is_read_from_the_profile(encoder: Path, tmp_path: Path) -> None:
    execution = executed_by(on_cpu(encoder, tmp_path / "profile"), encoder, CPU)
    layers = {name for name in quantized(W4).codes if name.startswith("vision_encoder.")}
    assert execution.layers.keys() == layers
    assert {executed.operator for executed in execution.layers.values()} == {"MatMulNBits"}
    # which arithmetic the CPU has for FP16 is its own affair
    assert {executed.compute.split(", ")[0] for executed in execution.layers.values()} == {"INT4 weights"}
    assert execution.operators["MultiHeadAttention"] == 5
    assert execution.elsewhere == ()


def test_a_node_is_an_ancestor_once_however_many_ways_lead_there() -> None:
    """Behind 60 residual connections there are 2^60 ways back to the input."""
    nodes = [helper.make_node("Add", [f"x{i}", f"x{i}"], [f"x{i + 1}"], f"add{i}") for i in range(60)]
    producers = {output: node for node in nodes for output in node.output}
    found = list(itertools.islice(onnxruntime_cuda._ancestors("x60", producers), 100))
    assert sorted(node.name for node in found) == sorted(node.name for node in nodes)


def test_layers_that_leave_the_provider_are_named(encoder: Path, tmp_path: Path) -> None:
    execution = executed_by(on_cpu(encoder, tmp_path / "profile"), encoder, CUDA)
    layer = next(name for name in quantized(W4).codes if name.startswith("vision_encoder."))
    assert execution.layers[layer].compute.endswith(", on the CPU")
    assert any("MultiHeadAttention" in node for node in execution.elsewhere)


def test_a_layer_of_several_products_is_told_by_all_of_them(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "x"], ["y"], "qkv/MatMul_0"),
        helper.make_node("Cast", ["y"], ["codes"], "cast", to=TensorProto.UINT8),
        helper.make_node("MatMulInteger", ["codes", "codes"], ["z"], "qkv/MatMul_1"),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 2]) for name in "xy")
    graph = helper.make_graph(nodes, "graph", [x], [y, helper.make_tensor_value_info("z", TensorProto.INT32, [2, 2])])
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    layers = executed_by(on_cpu(path, tmp_path / "profile"), path, CPU).layers
    assert layers == {"qkv": Executed("FP32 GEMM and unknown (MatMulInteger)", "MatMul, MatMulInteger")}


def test_arithmetic_is_told_by_the_type_of_the_inputs(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    save_part(float_part(skeleton(IMAGE_ENCODER), float_model(), half=False), path)
    layers = executed_by(on_cpu(path, tmp_path / "profile"), path, CPU).layers
    assert {executed.compute for executed in layers.values()} == {"FP32 GEMM"}


def test_quantized_activations_of_the_cpu_are_told(encoder: Path, tmp_path: Path) -> None:
    model = onnx.load(encoder)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 4
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    layers = executed_by(on_cpu(path, tmp_path / "profile"), path, CPU).layers
    assert "INT4 weights, INT8 arithmetic" in {executed.compute for executed in layers.values()}


@pytest.mark.parametrize("together", [False, True])
def test_biases_are_added_apart_unless_one_gemm_is_asked_for(
    together: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session of a GPU, made of the same arguments on the CPU."""

    def session_on_cpu(path: str, options: Any, *, disabled_optimizers: list[str], **_: object) -> Any:
        return real_session(path, options, providers=[CPU], disabled_optimizers=disabled_optimizers)

    real_session = ort.InferenceSession
    monkeypatch.setattr(onnxruntime_cuda, "require_cuda", lambda: None)
    monkeypatch.setattr(onnxruntime_cuda, "CUDA", CPU)
    monkeypatch.setattr(ort, "InferenceSession", session_on_cpu)
    path = tmp_path / "model.onnx"
    save_part(float_part(trace(float_model(), IMAGE_ENCODER, StaticShape()), float_model(), half=False), path)
    options = CudaOptions(gemm_bias=together)
    session = cuda_session(path, options, cuda_graph=False, profile=tmp_path / "profile")
    assert ("Gemm" in executed_by(session, path, CPU).operators) == together


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("preset", ["int4_w4only_rtn", "int4_svdquant"])
def test_the_gpu_computes_what_the_cpu_does(preset: str, tmp_path: Path) -> None:
    path = tmp_path / "image_encoder.onnx"
    lowered = lower_for_onnxruntime_cuda(canonical(recipe_of(preset), IMAGE_ENCODER))
    save_part(lowered.model, path)
    found, expected = OnnxRuntimeCudaEngine(path).run(PIXELS), OnnxRuntimeEngine(path).run(PIXELS)
    for name, array in expected.items():
        assert largest_error(found[name], array) < 1e-2
    execution = executed_on_gpu(path)
    assert not [name for name in execution.elsewhere if "MatMul" in name or "Attention" in name]
    executed = {name: execution.layers[name].compute for name in lowered.layers}
    assert executed == {name: layer.compute for name, layer in lowered.layers.items()}
    assert all(compute.endswith("dequantized at load, FP16 GEMM") for compute in executed.values())


@pytest.mark.gpu
@on_gpu
def test_a_pair_on_the_gpu_answers_as_on_the_cpu(parts: tuple[Path, Path]) -> None:
    """Static shapes: both run as CUDA graphs, and the features stay on the GPU."""
    gpu = Predictor(OnnxRuntimeCudaEngine(parts[0], keep=True), OnnxRuntimeCudaEngine(parts[1]))
    cpu = Predictor(*(OnnxRuntimeEngine(path) for path in parts))
    prompt = boxes(np.array([[20, 30, 90, 100]], np.float32))
    for seed in (1, 2):
        image = pixels(1, seed)[0].numpy()
        found = gpu.decode(gpu.encode(image), prompt.coords, prompt.labels)
        expected = cpu.decode(cpu.encode(image), prompt.coords, prompt.labels)
        assert largest_error(found.masks, expected.masks) < 2e-2


@pytest.mark.gpu
@on_gpu
def test_a_decoder_of_any_prompts_is_recorded_for_each_shape(tmp_path: Path) -> None:
    path = tmp_path / "mask_decoder.onnx"
    lowered = lower_for_onnxruntime_cuda(canonical(W4, MASK_DECODER)).model
    save_part(lowered, path)
    replayed, launched = OnnxRuntimeCudaEngine(path), OnnxRuntimeCudaEngine(path, CudaOptions(cuda_graph=False))
    for seed, sizes in enumerate([(1, 2), (4, 1), (1, 2), (4, 1), (2, 3), (1, 2), (4, 1), (2, 3), (2, 3)]):
        given = prompts_of(lowered, SIZES | dict(zip(("prompts", "points"), sizes, strict=True)))
        given["image_embeddings"] *= 1 + seed
        expected = launched.run(given)
        for name, array in replayed.run(given).items():
            assert largest_error(array, expected[name]) < 1e-3
    assert len(replayed._io._graphs) == (3 if keeps_graphs_apart() else 0)


@pytest.mark.gpu
@on_gpu
def test_times_on_the_gpu(parts: tuple[Path, Path]) -> None:
    assert len(OnnxRuntimeCudaEngine(parts[0]).time(PIXELS, 5)) == 5


@pytest.mark.gpu
@on_gpu
def test_kernels_on_the_gpu_are_told_by_kind(parts: tuple[Path, Path]) -> None:
    try:
        found = by_kind(OnnxRuntimeCudaEngine(parts[0], CudaOptions(cuda_graph=False)).kernels(PIXELS))
    except MachineLacks as error:
        pytest.skip(str(error))
    assert "FP16 GEMM" in found
    assert "INT8 GEMM" not in found
