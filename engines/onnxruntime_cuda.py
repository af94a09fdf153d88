"""ONNX Runtime on an NVIDIA GPU: the engine for graphs of `samq.export.lower_onnxruntime_cuda`.

ONNX Runtime answers a CUDA provider that does not load by running on the CPU; here that is an error with its fix.
Inputs and results lie in buffers on the GPU. Kernels are recorded as a CUDA graph and launched as one, for each of the
hundreds of a part costs the host a few microseconds: at once where shapes are static, otherwise when the shapes of the
inputs come a second time.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import io
import itertools
import json
import re
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime as ort  # type: ignore[import-untyped]
from numpy.typing import NDArray

from samq.engines.base import Executed, together
from samq.engines.kernels import Kernel, require_cupti, trace
from samq.engines.onnxruntime import INT8_ACCURACY, first_line, told
from samq.errors import BadInput, MachineLacks, SamqError

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
INSTALL = '`pip uninstall -y onnxruntime onnxruntime-gpu`, then `pip install "onnxruntime-gpu[cuda,cudnn]"`'
WARM_UPS = 3
MOST_GRAPHS = 32  # of a session; shapes that come later are launched kernel by kernel
GRAPHS_APART = (1, 30)  # version, see `keeps_graphs_apart`
NO_GRAPH = "-1"  # the runtime's own word for a run that is neither recorded nor replayed
BIAS_FUSION = "MatMulAddFusion"  # the runtime's own, see `CudaOptions.gemm_bias`

_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}
_GEMMS = ("MatMul", "Gemm", "FusedMatMul", "FusedGemm")
_CODE_BITS = {onnx.TensorProto.UINT4: 4, onnx.TensorProto.UINT8: 8}
_NO_MEMORY = re.compile(r"CUDA failure 2\b|out of memory|STATUS_ALLOC_FAILED")
_GPU_FAILS = re.compile(r"[A-Z_]+ failure -?\d+: [^;\n]*|CUDA error[^;\n]*")
_ARITHMETIC = {"float": "FP32", "float16": "FP16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class CudaOptions:
    """How the CUDA provider runs a graph.

    Args:
        device: number of the GPU.
        cuda_graph: record and replay the kernels; None for wherever all of them run on the GPU.
        attention: kernel of fused attention, "default" for the provider's own order of preference.
        gemm_bias: let the runtime make one Gemm of a MatMul and its bias, as it does unasked. CUDA runs two GEMMs for
            it, one of which spreads the bias (math/gemm.cc), and an Add is faster (docs/onnxruntime-cuda.md).
    """

    device: int = 0
    cuda_graph: bool | None = None
    attention: Literal["default", "flash", "efficient", "cudnn", "unfused"] = "default"
    gemm_bias: bool = False

    def for_provider(self, *, cuda_graph: bool) -> dict[str, str]:
        """The provider's own options.

        SkipLayerNormalization is always strict, which means the sums of LayerNormalization: in float32.
        """
        options = {
            "device_id": str(self.device),
            "enable_cuda_graph": str(int(cuda_graph)),
            "enable_skip_layer_norm_strict_mode": "1",
        }
        if self.attention != "default":
            options["sdpa_kernel"] = str({"flash": 1, "efficient": 2, "cudnn": 8, "unfused": 16}[self.attention])
        return options


class Overwritten(RuntimeError):
    """A result on the device was read after its engine had run again (a bug of the caller)."""


class CannotBeRecorded(BadInput):
    """A part of the model cannot be recorded as a CUDA graph."""


class OnDevice:
    """A result that stays on the device, for another engine's `run` or for `np.asarray`.

    It lives in its engine's buffer: after the engine's next run, reading it raises `Overwritten`.
    """

    def __init__(self, value: Any, io: DeviceIO) -> None:
        self._value, self._io, self._run = value, io, io.runs

    @property
    def shape(self) -> tuple[int, ...]:
        """Sides."""
        return tuple(self._value.shape())

    def value(self) -> Any:
        """The runtime's own value.

        Raises:
            Overwritten: the buffer holds the result of a later run.
        """
        if self._run != self._io.runs:
            raise Overwritten("this result was overwritten by a later run of its engine; copy it before that")
        return self._value

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        array: NDArray[Any] = np.asarray(self.value().numpy(), dtype=dtype)
        return array


Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Bound:
    """A session's inputs and outputs, bound to buffers: what `DeviceIO.execute` runs.

    Args:
        shapes: of the inputs, where the shapes of the outputs are not known yet.
    """

    binding: Any
    run_options: Any
    shapes: Shapes | None = None


class DeviceIO:
    """Buffers on a device for the inputs and outputs of a session.

    Args:
        session: an `onnxruntime.InferenceSession`.
        device: "cuda" or "cpu".
        number: which of them.
        cuda_graph: the session replays graphs; each set of buffers has one of its own. With a runtime that does not
            keep them apart there is one, of static shapes, and none as soon as other buffers come.
    """

    def __init__(self, session: Any, device: str, number: int = 0, *, cuda_graph: bool = False) -> None:
        self.session, self.device, self.number, self.cuda_graph = session, device, number, cuda_graph
        self.inputs: Sequence[str] = [value.name for value in session.get_inputs()]
        self.outputs: Sequence[str] = [value.name for value in session.get_outputs()]
        self.runs = 0
        self._many, self._spoiled = cuda_graph and keeps_graphs_apart(), False
        self._dtypes = {value.name: _DTYPES[value.type] for value in session.get_inputs()}
        self._result_dtypes = {value.name: _DTYPES[value.type] for value in session.get_outputs()}
        self._fed: dict[tuple[str, tuple[int, ...]], Any] = {}
        self._results: dict[Shapes, dict[str, Any]] = {}
        self._graphs: dict[tuple[Shapes, tuple[int, ...]], int] = {}
        if all(is_static(value.shape) for value in (*session.get_inputs(), *session.get_outputs())):
            shapes = tuple(tuple(value.shape) for value in session.get_inputs())
            self._keep(shapes, [value.shape for value in session.get_outputs()])

    @property
    def records(self) -> bool:
        """Runs may be recorded: the shapes are known, or those that come again may be kept."""
        return self.cuda_graph and (self._many or bool(self._results))

    def bind(self, feeds: Mapping[str, Any]) -> Bound:
        """Copy arrays to the device, and bind them, results of other engines, and the outputs."""
        binding = self.session.io_binding()
        values = {name: self._on_device(name, feeds[name]) for name in self.inputs}
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        shapes = tuple(tuple(value.shape()) for value in values.values())
        results = self._results.get(shapes, {})
        for name in self.outputs:
            if name in results:
                binding.bind_ortvalue_output(name, results[name])
            else:
                binding.bind_output(name, self.device, self.number)
        options = ort.RunOptions()
        if self.cuda_graph:
            graph = self._graph_of(shapes, values.values()) if results else NO_GRAPH
            options.add_run_config_entry("gpu_graph_id", graph)
        return Bound(binding, options, None if results else shapes)

    def execute(self, bound: Bound) -> dict[str, OnDevice]:
        """Run, wait for the device, and give the results, which the next call may overwrite."""
        self.session.run_with_iobinding(bound.binding, bound.run_options)
        bound.binding.synchronize_outputs()
        self.runs += 1
        results = bound.binding.get_outputs()
        shapes = bound.shapes
        if self._many and shapes is not None and shapes not in self._results and len(self._results) < MOST_GRAPHS:
            self._keep(shapes, [value.shape() for value in results])
        return {name: OnDevice(value, self) for name, value in zip(self.outputs, results, strict=True)}

    def _on_device(self, name: str, fed: Any) -> Any:
        if isinstance(fed, OnDevice):
            return fed.value()
        array: NDArray[Any] = np.ascontiguousarray(fed, dtype=self._dtypes[name])
        buffer = self._fed.get((name, array.shape))
        if buffer is None:
            buffer = self._buffer(array.shape, array.dtype)
            if not self._many:
                self._fed = {(other, shape): kept for (other, shape), kept in self._fed.items() if other != name}
            if len(self._fed) < MOST_GRAPHS * len(self.inputs):
                self._fed[name, array.shape] = buffer
        buffer.update_inplace(array)
        return buffer

    def _keep(self, shapes: Shapes, of_results: Sequence[Sequence[int]]) -> None:
        """Buffers for the results of inputs of these shapes, where a graph that is recorded puts them."""
        named = zip(self.outputs, of_results, strict=True)
        self._results[shapes] = {name: self._buffer(shape, self._result_dtypes[name]) for name, shape in named}

    def _graph_of(self, shapes: Shapes, values: Collection[Any]) -> str:
        """Number of the graph that reads these buffers; another engine's may come back in another shape."""
        key = shapes, tuple(value.data_ptr() for value in values)
        if key not in self._graphs and len(self._graphs) == (MOST_GRAPHS if self._many else 1):
            self._spoiled = not self._many
            return NO_GRAPH
        return NO_GRAPH if self._spoiled else str(self._graphs.setdefault(key, len(self._graphs) + 1))

    def _buffer(self, shape: Sequence[int], dtype: Any) -> Any:
        return ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype, self.device, self.number)


class OnnxRuntimeCudaEngine:
    """One part of the model as an ONNX Runtime session on a GPU.

    Args:
        path: a lowered ONNX file.
        options: see `CudaOptions`.
        keep: let `run` give `OnDevice` results, which a decoder takes without a copy.

    Raises:
        BadInput: the file is missing, corrupt or not runnable.
        MachineLacks: no CUDA provider, none of its libraries, or no GPU; the message says which.
    """

    def __init__(self, path: Path, options: CudaOptions | None = None, *, keep: bool = False) -> None:
        self.path, self.options, self.keep = path, options or CudaOptions(), keep
        if not path.is_file():
            raise BadInput(f"{path} is missing; run `samq-export build` first")
        replays = self.options.cuda_graph is not False
        try:
            session = cuda_session(path, self.options, cuda_graph=replays)
        except CannotBeRecorded:
            if self.options.cuda_graph:
                raise
            replays = False
            session = cuda_session(path, self.options, cuda_graph=replays)
        self._io = DeviceIO(session, "cuda", self.options.device, cuda_graph=replays)
        if self.options.cuda_graph and not self._io.records:
            raise CannotBeRecorded(
                f"{path.name} has dynamic shapes, which onnxruntime {ort.__version__} cannot record as CUDA graphs; "
                f"install {'.'.join(map(str, GRAPHS_APART))} or newer, or export with --static-shapes"
            )
        self.inputs, self.outputs = self._io.inputs, self._io.outputs
        self.shapes: Mapping[str, Sequence[int | str]] = {v.name: v.shape for v in self._io.session.get_inputs()}

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs by name: arrays, or `OnDevice` (`keep`). `feeds` holds either, and may hold more than the inputs."""
        try:
            results = self._io.execute(self._io.bind(feeds))
            return dict(results) if self.keep else {name: np.asarray(value) for name, value in results.items()}
        except Overwritten:
            raise
        except Exception as error:
            raise _told_of_gpu(self.path, error) from error

    def time(self, feeds: Mapping[str, Any], repeats: int) -> list[float]:
        """Milliseconds of each of `repeats` runs after a warm-up, inputs and results on the GPU throughout.

        Host time from the call until the device has finished; copies to and from the host are not in it.
        """
        try:
            self._io.execute(self._io.bind(feeds))  # what comes again is recorded
            return timed(self._io, self._io.bind(feeds), repeats)
        except Overwritten:
            raise
        except Exception as error:
            raise _told_of_gpu(self.path, error) from error

    def kernels(self, feeds: Mapping[str, Any]) -> tuple[Kernel, ...]:
        """The kernels of one run; of an engine without a CUDA graph.

        Raises:
            BadInput, MachineLacks: the run fails, or nothing records its kernels, see `samq.engines.kernels`.
        """
        require_cupti()
        self.run(feeds)  # cuDNN's search, and what is loaded at the first launch, are no part of a run
        return trace(lambda: self.run(feeds))


def keeps_graphs_apart() -> bool:
    """A graph may be replayed after other runs of its session.

    Before, Concat and Split of a replayed graph read the addresses of the run before (microsoft/onnxruntime#32121).
    """
    version = tuple(int(number) for number in ort.__version__.split(".")[:2])
    return version >= GRAPHS_APART


def timed(device_io: DeviceIO, bound: Bound, repeats: int) -> list[float]:
    """Milliseconds of each of `repeats` runs after `WARM_UPS`."""
    taken = []
    for repeat in range(WARM_UPS + repeats):
        started = time.perf_counter()
        device_io.execute(bound)
        if repeat >= WARM_UPS:
            taken.append(1000 * (time.perf_counter() - started))
    return taken


def cuda_session(path: Path, options: CudaOptions, *, cuda_graph: bool, profile: Path | None = None) -> Any:
    """A session on the GPU.

    Args:
        profile: where the runtime writes its profile, see `executed_on_gpu`.

    Raises:
        BadInput, MachineLacks: see `OnnxRuntimeCudaEngine`.
    """
    require_cuda()
    session_options = _session_options(profile)
    providers = [(CUDA, options.for_provider(cuda_graph=cuda_graph)), CPU]
    left_out = [] if options.gemm_bias else [BIAS_FUSION]
    try:
        session = ort.InferenceSession(
            str(path), session_options, providers=providers, enable_fallback=0, disabled_optimizers=left_out
        )
    except Exception as error:  # the binding raises classes of its own, all of them directly below Exception
        raise _refused(path, error) from error
    if CUDA not in session.get_providers():
        raise MachineLacks("ONNX Runtime's CUDA provider loads but does not start; see whether `nvidia-smi` does")
    return session


@cache
def require_cuda() -> None:
    """Load the CUDA provider's library, and before it those that pip installed for it; once.

    Raises:
        MachineLacks: this onnxruntime has no CUDA provider, a library is missing, or there is no driver.
    """
    if CUDA not in ort.get_available_providers():
        raise MachineLacks(f"onnxruntime {ort.__version__} has no CUDA provider; {INSTALL}")
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it misses, which is told below
        ort.preload_dlls()
    folder = Path(ort.__file__).parent / "capi"
    try:  # ONNX Runtime would keep the reason to itself
        for name in ("shared", "cuda"):
            _load(str(folder / f"libonnxruntime_providers_{name}.so"), set())
    except OSError as error:
        reason = first_line(error)
        fix = "run on a machine with an NVIDIA driver" if "libcuda.so" in reason else INSTALL
        raise MachineLacks(f"ONNX Runtime's CUDA provider does not load ({reason}); {fix}") from error


def _load(library: str, tried: set[str]) -> None:
    """Load a library, and before it those that it lacks and that NVIDIA's wheels have, wherever they are installed.

    Args:
        tried: names of libraries that were loaded for it.

    Raises:
        OSError: it does not load.
    """
    while True:
        try:
            ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
            return
        except OSError as error:
            lacking = str(error).partition(":")[0]
            found = None if lacking in tried else _packaged(lacking)
            if found is None:
                raise
            tried.add(lacking)
            _load(found, tried)


def _packaged(library: str) -> str | None:
    """The file of a library in NVIDIA's wheels; `onnxruntime.preload_dlls` knows those beside itself alone."""
    spec = importlib.util.find_spec("nvidia")
    roots = [] if spec is None or spec.submodule_search_locations is None else spec.submodule_search_locations
    return next((str(path) for root in roots for path in Path(root).glob(f"**/lib/{library}")), None)


def _refused(path: Path, error: Exception) -> SamqError:
    """What an exception at the making of a session means to the user."""
    text = first_line(error)
    if "graph capture" in str(error):
        return CannotBeRecorded(
            f"{path}: not every operator runs on the GPU, so a CUDA graph cannot be recorded ({text})"
        )
    return _gpu_failure(path, error) or BadInput(f"{path}: ONNX Runtime does not take it ({text}); build it again")


def _told_of_gpu(path: Path, error: Exception) -> SamqError:
    """What an exception of a run means to the user."""
    return _gpu_failure(path, error) or told(path, error)


def _gpu_failure(path: Path, error: Exception) -> MachineLacks | None:
    """What a failure of the GPU or of its libraries means to the user; None where an exception tells of none."""
    if _NO_MEMORY.search(str(error)):
        return MachineLacks(f"{path.name}: the GPU is out of memory; use a smaller batch or --image-size")
    found = _GPU_FAILS.search(str(error))
    if found is None:
        return None
    fix = "see that `nvidia-smi` works, then run the same command again"
    return MachineLacks(f"{path.name}: the GPU fails ({found[0].strip()}); {fix}")


def is_static(shape: Sequence[int | str | None]) -> bool:
    """Every side is a number."""
    return all(isinstance(side, int) for side in shape)


def _session_options(profile: Path | None) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return options


@dataclass(frozen=True)
class Execution:
    """What a session executed, from the runtime's own profile of one run.

    Args:
        layers: by name.
        operators: how often each operator ran, copies between host and device (Memcpy…) included.
        elsewhere: nodes that did not run on the asked provider, with their operator.
    """

    layers: Mapping[str, Executed]
    operators: Mapping[str, int]
    elsewhere: tuple[str, ...]


def executed_on_gpu(path: Path, options: CudaOptions | None = None) -> Execution:
    """What ONNX Runtime executes on the GPU, from a profiled run on zeros; dynamic sides are 1.

    Args:
        path: a graph whose GEMM nodes are called `<layer>/MatMul…`.

    Raises:
        BadInput, MachineLacks: see `OnnxRuntimeCudaEngine`.
    """
    with tempfile.TemporaryDirectory() as folder:
        session = cuda_session(path, options or CudaOptions(), cuda_graph=False, profile=Path(folder) / "profile")
        return executed_by(session, path, CUDA)


def executed_by(session: Any, path: Path, provider: str) -> Execution:
    """What a profiling session executes on zeros; see `executed_on_gpu`.

    Args:
        session: made with profiling enabled, from the file at `path`.
        provider: that every node is expected on.
    """
    session.run(None, {value.name: _zeros(value) for value in session.get_inputs()})
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    ran = [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
    graph = onnx.load(path, load_external_data=False).graph
    attributes = {
        node.name: {attribute.name: attribute.i for attribute in node.attribute}
        for node in graph.node
        if node.op_type == "MatMulNBits"
    }
    unpacked = _unpacked(graph, {event["name"].removesuffix("_kernel_time") for event in ran})
    gemms: defaultdict[str, list[Executed]] = defaultdict(list)
    elsewhere = []
    for event in ran:
        name, details = event["name"].removesuffix("_kernel_time"), event["args"]
        on_provider = details["provider"] == provider
        if not on_provider:
            elsewhere.append(f"{name} ({details['op_name']})")
        layer, _, role = name.partition("/")
        if role.startswith("MatMul") and details["op_name"] != "Cast":  # those that the runtime inserts borrow names
            compute = unpacked.get(name, "") + _compute(details, attributes.get(name, {}))
            gemms[layer].append(Executed(compute if on_provider else f"{compute}, on the CPU", details["op_name"]))
    operators = Counter(event["args"]["op_name"] for event in ran)
    layers = {layer: together(found) for layer, found in gemms.items()}
    return Execution(layers, dict(operators), tuple(elsewhere))


def _unpacked(graph: onnx.GraphProto, ran: Collection[str]) -> dict[str, str]:
    """For each MatMul of a weight that the file holds in codes, when those were dequantized.

    Args:
        ran: names of the nodes that a run executed.
    """
    producers = {output: node for node in graph.node for output in node.output}
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    told = {}
    for node in graph.node:
        chain = list(_ancestors(node.input[1], producers)) if node.op_type == "MatMul" else []
        bits = {_CODE_BITS[types[name]] for link in chain for name in link.input if types.get(name) in _CODE_BITS}
        if bits:
            when = "at every run" if any(link.name in ran for link in chain) else "at load"
            told[node.name] = f"INT{max(bits)} weights, dequantized {when}, "
    return told


def _ancestors(tensor: str, producers: Mapping[str, onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """All nodes that a tensor is computed from, each once: residual connections have more paths than can be walked."""
    waiting, seen = [tensor], set[int]()
    while waiting:
        node = producers.get(waiting.pop())
        if node is not None and id(node) not in seen:
            yield node
            seen.add(id(node))
            waiting += node.input


def _compute(details: Mapping[str, Any], attributes: Mapping[str, int]) -> str:
    """The arithmetic of one GEMM, in the words of `samq.engines.onnxruntime`."""
    kinds = itertools.chain.from_iterable(details.get("input_type_shape", []))
    arithmetic = _ARITHMETIC.get(next(kinds, ""), "unknown")
    if details["op_name"] == "MatMulNBits":
        quantizes = details["provider"] == CPU and attributes.get("accuracy_level", 0) == INT8_ACCURACY
        return f"INT{attributes['bits']} weights, {'INT8' if quantizes else arithmetic} arithmetic"
    return f"{arithmetic} GEMM" if details["op_name"] in _GEMMS else f"unknown ({details['op_name']})"


def _zeros(value: Any) -> NDArray[Any]:
    return np.zeros([side if isinstance(side, int) else 1 for side in value.shape], _DTYPES[value.type])
