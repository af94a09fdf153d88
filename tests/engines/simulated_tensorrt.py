"""TensorRT and CUDA simulated on the host, so that building and running can be tested without a GPU.

Every object has the members of its class in one version's API list, and no others: what the code touches beyond them is
an AttributeError, as with the real bindings. The device's memory is the host's. A "graph" is a JSON file:

    {"inputs": [[name, shape, type, names of sides]], "layers": [[name, type, ONNX node, type of the output]],
     "weights": {layer/role: values}, "folded": [weights that a refitter lacks], "merged": [weights that go together]}

and an engine computes y = 2·x + labels + sum(weights), x [batch, 3] HALF, labels [batch, 1] INT32, y FLOAT.
"""

from __future__ import annotations

import ctypes
import json
import math
import signal
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

DATA = Path(__file__).parents[1] / "data" / "trt_api"
VERSIONS = ("8.6.0", "10.3.0", "10.16.1.11", "11.4.0.106")
API: dict[str, dict[str, list[str]]] = {
    version: json.loads((DATA / f"{version}.json").read_text(encoding="utf-8")) for version in VERSIONS
}
GRAPH = {
    "inputs": [["labels", [-1, 1], "INT32", ["batch", ""]], ["x", [-1, 3], "HALF", ["batch", ""]]],
    "layers": [
        ["a.qkv/QuantizeLinear", "QUANTIZE", "a.qkv/QuantizeLinear", "INT8"],
        ["a.qkv/MatMul", "MATRIX_MULTIPLY", "a.qkv/MatMul", "FLOAT"],
        ["(Unnamed Layer* 2) [Unary]", "UNARY", "angles/Sin", "FLOAT"],
        ["angles/Constant", "CONSTANT", "angles/Constant", "FLOAT"],
        ["angles/Shape", "SHAPE", "angles/Shape", "INT32"],
        ["b/Add", "ELEMENTWISE", "b/Add", "FLOAT"],
        ["y", "ELEMENTWISE", "y", "FLOAT"],
    ],
}
STATIC = {**GRAPH, "inputs": [["labels", [2, 1], "INT32", ["", ""]], ["x", [2, 3], "HALF", ["", ""]]]}
WEIGHTS = {
    **GRAPH,
    "layers": [
        *GRAPH["layers"],
        ["table", "CONSTANT", "table", "FLOAT"],
        ["c", "CONVOLUTION", "c", "FLOAT"],
        ["d", "DECONVOLUTION", "d", "FLOAT"],
    ],
    "weights": {
        "angles/Constant/CONSTANT": [1], "table/CONSTANT": [2], "c/KERNEL": [3, 4], "c/BIAS": [5], "d/KERNEL": [6],
        "d/BIAS": [],
    },
    "folded": ["angles/Constant/CONSTANT"],
    "merged": ["c/KERNEL", "c/BIAS"],
}  # fmt: skip
ROLES = {
    "CONSTANT": ("IConstantLayer", {"CONSTANT": "weights"}),
    "CONVOLUTION": ("IConvolutionLayer", {"KERNEL": "kernel", "BIAS": "bias"}),
    "DECONVOLUTION": ("IDeconvolutionLayer", {"KERNEL": "kernel", "BIAS": "bias"}),
}
TYPES = {"HALF": np.float16, "INT32": np.int32, "FLOAT": np.float32}


class Named(int):
    """A member of an enumeration."""

    name: str

    def __new__(cls, value: int, name: str) -> Named:
        member = super().__new__(cls, value)
        member.name = name
        return member


class Host(bytes):
    """IHostMemory."""

    @property
    def nbytes(self) -> int:
        return len(self)


class Simulation:
    """One version of TensorRT, as the module `tensorrt`, with a record of what was done.

    Attributes:
        done: (Class.member, arguments or value) of everything that was called or set.
        fails: Class.member → what it gives instead of its result; a Builder, Runtime or Refitter itself cannot be had.
        says: what is logged by the calls of a Class.member.
        cannot_read: timings that 8.6 answers by an error in the log: it reads the others alone, and combines none.
        does_not_fit: timings that no builder takes.
        interrupted: Ctrl-C is pressed while the logger is called, and lost there.
    """

    def __init__(self, version: str) -> None:
        self.version, self.members = version, API[version]
        self.done: list[tuple[str, Any]] = []
        self.fails: dict[str, Any] = {}
        self.says: dict[str, list[tuple[str, str]]] = {}
        self.cannot_read: bytes | None = None
        self.does_not_fit: bytes | None = None
        self.interrupted = False
        self.logger: Any = None

    def __getattr__(self, name: str) -> Any:
        if name == "__version__":
            return self.version
        if name not in self.members:
            raise AttributeError(f"TensorRT {self.version} has no {name}")
        if name in [kind for kind, _ in ROLES.values()]:
            return SimpleNamespace(kind=name)
        if name == "ILogger":
            return type("ILogger", (), {m: m for m in self.members["ILogger"] if m.isupper()})
        if name == "IProgressMonitor":
            return object
        make = getattr(self, f"_{name}", None)
        return (
            make if make is not None else SimpleNamespace(**{m: Named(i, m) for i, m in enumerate(self.members[name])})
        )

    def values(self, name: str) -> list[Any]:
        """Arguments of all calls, or values of all settings, of a Class.member."""
        return [value for done, value in self.done if done == name]

    def make(self, kind: str, **members: Any) -> Any:
        return Simulated(self, kind, members)

    def log(self, name: str) -> None:
        for severity, text in self.says.get(name, []):
            self.logger.log(severity, text)

    def _start(self, kind: str, logger: Any) -> None:
        self.logger = logger
        self.log(kind)
        if kind in self.fails:
            raise TypeError("pybind11::init(): factory function returned nullptr")

    def _Builder(self, logger: Any) -> Any:
        self._start("Builder", logger)
        network: dict[str, Any] = {}
        return self.make(
            "Builder",
            create_network=lambda flags: self._network(network),
            create_builder_config=self._config,
            create_optimization_profile=lambda: self.make("IOptimizationProfile", set_shape=lambda *shapes: None),
            build_serialized_network=self._built,
        )

    def _network(self, content: dict[str, Any]) -> Any:
        network = self.make("INetworkDefinition", get_input=lambda i: self._tensor(*network.content["inputs"][i]))
        object.__setattr__(network, "content", content)
        output = self.make("ITensor", name="y", dtype=self.DataType.FLOAT)
        network.known.update(
            get_layer=lambda i: self._layer(content, *content["layers"][i]), num_outputs=1, get_output=lambda i: output
        )
        return network

    def _tensor(self, name: str, shape: list[int], dtype: str, sides: list[str]) -> Any:
        wanted = getattr(self.DataType, dtype)
        return self.make("ITensor", name=name, shape=shape, dtype=wanted, get_dimension_name=lambda i: sides[i])

    def _layer(self, content: dict[str, Any], name: str, kind: str, node: str, dtype: str, *reads: str) -> Any:
        output = self.make(
            "ITensor",
            name=f"{name}_out",
            dtype=getattr(self.DataType, dtype),
            is_network_output=name == "y",
            shape=content.get("shape", []),
        )
        requests = {"precision": None, "set_output_type": lambda index, dtype: None}
        layer = self.make(
            "ILayer",
            name=name,
            type=getattr(self.LayerType, kind),
            metadata=f"[ONNX Layer: {node}]",
            num_inputs=len(reads),
            get_input=lambda index: self.make("ITensor", name=reads[index]),
            num_outputs=1,
            get_output=lambda index: output,
            **{member: value for member, value in requests.items() if member in self.members["ILayer"]},
        )
        roles = ROLES.get(kind, ("", {}))[1]
        weights = {
            m: np.array(content.get("weights", {}).get(f"{name}/{role}", []), np.float32) for role, m in roles.items()
        }
        object.__setattr__(layer, "own", weights)
        return layer

    def _config(self) -> Any:
        sources = len(self.members["TacticSource"])
        return self.make(
            "IBuilderConfig",
            set_flag=lambda flag: None,
            set_memory_pool_limit=lambda pool, size: None,
            get_tactic_sources=lambda: (1 << sources) - 1,
            set_tactic_sources=lambda mask: True,
            add_optimization_profile=lambda profile: 0,
            create_timing_cache=self._timing_cache,
            set_timing_cache=self._takes,
            **{name: None for name in ("progress_monitor",) if name in self.members["IBuilderConfig"]},
        )

    def _takes(self, cache: Any, ignore_mismatch: bool) -> bool:
        fits: bool = cache.content != self.does_not_fit
        if not fits:
            self.logger.log("ERROR", "API Usage Error (CUDA device property of the cache is different)")
        return fits

    def _timing_cache(self, content: bytes) -> Any:
        """Timings are letters, `!` those of the build itself; what is of another driver is read, and not combined."""

        def is_read(timings: bytes) -> bool:
            if self.cannot_read is None or self.cannot_read not in timings:
                return True
            self.logger.log("ERROR", "1: [myelinCache.h::deserializeFromBuffer::52] Error Code 1: Myelin")
            return False

        held = [content if is_read(content) else content.replace(self.cannot_read or b"", b"")]

        def combine(other: Any, ignore_mismatch: bool) -> bool:
            fits = (ignore_mismatch or b"another" not in other.content) and all(map(is_read, (other.content, *held)))
            held.extend([other.content] if fits else [])
            return fits

        cache = self.make("ITimingCache", combine=combine, serialize=lambda: Host(_letters(b"".join(held) + b"!")))
        object.__setattr__(cache, "content", held[0])
        return cache

    def _OnnxParser(self, network: Any, logger: Any) -> Any:
        def parse_from_file(path: str) -> bool:
            self.log("OnnxParser.parse_from_file")
            network.content.update(json.loads(Path(path).read_text(encoding="utf-8")))
            for kind in ("inputs", "layers"):
                network.known[f"num_{kind}"] = len(network.content[kind])
            return True

        error = self.make("ParserError", desc=lambda: "Invalid Node - Range_271")
        return self.make("OnnxParser", parse_from_file=parse_from_file, num_errors=1, get_error=lambda i: error)

    def _built(self, network: Any, config: Any) -> Host | None:
        monitor = config.known.get("progress_monitor")
        if self.interrupted:
            with suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        if monitor is not None:
            monitor.phase_start("Building Engine", None, 2)
            going = all(monitor.step_complete("Building Engine", step) for step in range(2))
            monitor.phase_finish("Building Engine")
            if not going:
                self.done.append(("cancelled", None))
                return None
        return Host(json.dumps(network.content).encode())

    def _Runtime(self, logger: Any) -> Any:
        self._start("Runtime", logger)
        return self.make("Runtime", deserialize_cuda_engine=lambda plan: self._engine(json.loads(bytes(plan))))

    def _engine(self, content: dict[str, Any]) -> Any:
        tensors = {name: (shape, dtype, "INPUT") for name, shape, dtype, _ in content["inputs"]}
        tensors["y"] = (tensors["x"][0], "FLOAT", "OUTPUT")
        limits = {-1: (1, 2, 4)}
        layer = {"Name": "a.qkv/MatMul", "LayerType": "gemm", "Inputs": [{"Format/Datatype": "Int8"}], "Outputs": []}
        engine = self.make(
            "ICudaEngine",
            num_io_tensors=len(tensors),
            get_tensor_name=lambda i: list(tensors)[i],
            get_tensor_shape=lambda name: tensors[name][0],
            get_tensor_dtype=lambda name: self.make("DataType", name=tensors[name][1]),
            get_tensor_mode=lambda name: getattr(self.TensorIOMode, tensors[name][2]),
            get_tensor_profile_shape=lambda name, i: [
                [limits[s][kind] if s < 0 else s for s in tensors[name][0]] for kind in range(3)
            ],
            create_engine_inspector=lambda: self.make(
                "EngineInspector", get_engine_information=lambda kind: json.dumps({"Layers": [layer]})
            ),
            create_execution_context=lambda: self._context(content),
            serialize=lambda: Host(json.dumps(content).encode()),
        )
        object.__setattr__(engine, "content", content)
        return engine

    def _Refitter(self, engine: Any, logger: Any) -> Any:
        self._start("Refitter", logger)
        content, given = engine.content, {}
        takes = [key for key in content["weights"] if key not in content["folded"]]

        def told(keys: Iterable[str]) -> tuple[list[str], list[Any]]:
            pairs = [key.rpartition("/") for key in keys]
            return [layer for layer, _, _ in pairs], [getattr(self.WeightsRole, role) for _, _, role in pairs]

        def set_weights(layer: str, role: Any, weights: NDArray[Any]) -> bool:
            given[f"{layer}/{role.name}"] = weights.tolist()
            return True

        def missing() -> list[str]:
            merged = content["merged"]
            return [key for key in merged if key not in given] if set(merged) & set(given) else []

        def refit() -> bool:
            content["weights"].update(given)
            return not missing()

        refitter = self.make(
            "Refitter",
            get_all=lambda: told(takes),
            get_missing=lambda: told(missing()),
            set_weights=set_weights,
            refit_cuda_engine=refit,
        )
        object.__setattr__(refitter, "takes", lambda new: given.update({key: new[key] for key in takes}))
        return refitter

    def _OnnxParserRefitter(self, refitter: Any, logger: Any) -> Any:
        def refit_from_file(path: str) -> bool:
            refitter.takes(json.loads(Path(path).read_text(encoding="utf-8"))["weights"])
            return True

        error = self.make("ParserError", desc=lambda: "an initializer is missing")
        return self.make("OnnxParserRefitter", refit_from_file=refit_from_file, num_errors=1, get_error=lambda i: error)

    def _context(self, content: dict[str, Any]) -> Any:
        shapes: dict[str, tuple[int, ...]] = {}
        addresses: dict[str, int] = {}

        def execute(stream: int) -> bool:
            x, labels, y = (
                view(addresses[name], shape_of(name), TYPES[kind])
                for name, kind in (("x", "HALF"), ("labels", "INT32"), ("y", "FLOAT"))
            )
            y[:] = 2 * x.astype(np.float32) + labels + sum(map(sum, content.get("weights", {}).values()))
            return True

        def shape_of(name: str) -> tuple[int, ...]:
            return shapes["x" if name == "y" else name]

        return self.make(
            "IExecutionContext",
            set_input_shape=lambda name, shape: shapes.__setitem__(name, tuple(shape)) or True,  # type: ignore[func-returns-value]
            get_tensor_shape=shape_of,
            set_tensor_address=lambda name, address: addresses.__setitem__(name, address) or True,  # type: ignore[func-returns-value]
            execute_async_v3=execute,
        )


class Simulated:
    """An object of a class; see `Simulation`."""

    def __init__(self, simulation: Simulation, kind: str, known: dict[str, Any]) -> None:
        unlisted = set(known) - set(simulation.members[kind])
        assert not unlisted, f"the simulation itself gives {kind} what it has not: {unlisted}"
        for name, value in (("simulation", simulation), ("kind", kind), ("known", known)):
            object.__setattr__(self, name, value)

    simulation: Simulation
    kind: str
    known: dict[str, Any]
    own: dict[str, Any]
    content: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        if name not in self.simulation.members[self.kind]:
            raise AttributeError(f"{self.kind} of TensorRT {self.simulation.version} has no {name}")
        value = self.known[name]
        if not callable(value) or name == "progress_monitor":
            return value

        def recorded(*arguments: Any) -> Any:
            called = f"{self.kind}.{name}"
            self.simulation.done.append((called, arguments))
            if called in self.simulation.fails:
                self.simulation.log(called)
                return self.simulation.fails[called]
            return value(*arguments)

        return recorded

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":  # the bindings are told what a layer is
            object.__setattr__(self, "kind", value.kind)
            self.known.update(self.own)
            return
        if name not in self.simulation.members[self.kind]:
            raise AttributeError(f"{self.kind} of TensorRT {self.simulation.version} has no {name}")
        self.simulation.done.append((f"{self.kind}.{name}", value))
        self.known[name] = value


def _letters(timings: bytes) -> bytes:
    """Every letter once, in order of appearance."""
    return bytes(dict.fromkeys(timings))


def view(address: int, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """An array on memory at an address."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)


class SimulatedCuda:
    """`cuda.bindings.runtime` on the host's memory, with one GPU; streams run at once, and keep what is recorded.

    Attributes:
        memory: live allocations by address.
        recorded: launches since a capture began, or None outside of one.
    """

    def __init__(self, capability: tuple[int, int] = (9, 0), name: bytes = b"NVIDIA H100 80GB HBM3\0\0") -> None:
        self.memory: dict[int, Any] = {}
        self.statuses: dict[str, int] = {}
        self.graphs = self.launches = 0
        self.properties = SimpleNamespace(name=name, major=capability[0], minor=capability[1], totalGlobalMem=80 << 30)
        names = ("Success", "MemoryAllocation", "InsufficientDriver", "NoDevice", "Unknown")
        self.cudaError_t = SimpleNamespace(**{f"cudaError{n}" if i else "cudaSuccess": i for i, n in enumerate(names)})
        self.cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
        self.cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
        self.cudaStreamNonBlocking = 1
        self.versions = {"cudaDriverGetVersion": 12040, "cudaRuntimeGetVersion": 12090}

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        if not name.startswith("cuda"):
            raise AttributeError(name)

        def function(*arguments: Any) -> tuple[Any, ...]:
            status = self.statuses.get(name, 0)
            answer = None if status else self._answer(name, *arguments)
            return (status,) if answer is None and not status else (status, answer)

        return function

    def _answer(self, name: str, *arguments: Any) -> Any:
        if name == "cudaMalloc":
            memory = ctypes.create_string_buffer(arguments[0])
            self.memory[ctypes.addressof(memory)] = memory
            return ctypes.addressof(memory)
        if name == "cudaFree":
            del self.memory[arguments[0]]
        elif name == "cudaMemcpyAsync":
            ctypes.memmove(arguments[0], arguments[1], arguments[2])
        elif name == "cudaGraphInstantiate":
            self.graphs += 1
        elif name == "cudaGraphLaunch":
            self.launches += 1
        return {
            "cudaGetDeviceCount": 1,
            "cudaGetDevice": 0,
            "cudaGetDeviceProperties": self.properties,
            "cudaGetErrorString": b"something is wrong",
            "cudaStreamCreateWithFlags": 7,
            "cudaEventCreate": 8,
            "cudaEventElapsedTime": 1.5,
            "cudaStreamEndCapture": 9,
            "cudaGraphInstantiate": 10,
            **self.versions,
        }.get(name)
