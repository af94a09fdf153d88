"""Running a TensorRT plan in this process: memory and a stream of cuda-python, buffers allocated once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from samq.engines import cuda
from samq.engines.base import Arrays
from samq.engines.kernels import Kernel, require_cupti, trace
from samq.engines.tensorrt_log import WARNING, captured, failure, load_tensorrt, new_runtime, version_of
from samq.engines.tensorrt_network import describe_tensors
from samq.engines.tensorrt_plan import PlanTensor, load_info
from samq.errors import BadInput, MachineLacks

if TYPE_CHECKING:
    import tensorrt as trt

WARM_UPS = 20


class TensorRtEngine:
    """One part of the model as a TensorRT plan on the GPU.

    Args:
        path: a plan with its sidecar, from `samq.engines.tensorrt_build.build_engine`.
        cuda_graph: record the launches once for each shape, and replay them; None for wherever shapes are static and
            the launches can be recorded.

    Attributes:
        info: the plan's sidecar.
        warnings: what TensorRT remarked while it loaded the plan.

    Raises:
        MachineLacks: no TensorRT, no GPU, not enough of its memory, or the plan does not fit GPU or version.
        BadInput: plan or sidecar is missing or corrupt.
    """

    def __init__(self, path: Path, *, cuda_graph: bool | None = None) -> None:
        self.path, self._insists = path, cuda_graph is True
        self.info = load_info(path)
        self.inputs: Sequence[str] = [tensor.name for tensor in self.info.inputs]
        self.outputs: Sequence[str] = [tensor.name for tensor in self.info.outputs]
        self.shapes: Mapping[str, Sequence[int | str]] = {tensor.name: tensor.shape for tensor in self.info.inputs}
        self.largest: Mapping[str, int] = self.info.largest
        static = all(isinstance(side, int) for shape in self.shapes.values() for side in shape)
        self.cuda_graph = static if cuda_graph is None else cuda_graph
        api = load_tensorrt()
        misfit = self.info.misfit(cuda.find_device(), version_of(api))
        if misfit is not None:
            raise MachineLacks(f"{path}: {misfit}")
        with captured() as (logger, log):
            self._runtime: trt.Runtime = new_runtime(api, logger, log, path)
            self._runtime.engine_host_code_allowed = self.info.options.version_compatible
            engine: trt.ICudaEngine | None = self._runtime.deserialize_cuda_engine(path.read_bytes())
            if engine is None:
                raise failure(path, log)
            self._engine: trt.ICudaEngine = engine
            inputs, outputs = describe_tensors(api, engine)
            if [[tensor.name for tensor in tensors] for tensors in (inputs, outputs)] != [self.inputs, self.outputs]:
                raise BadInput(f"{path}: its inputs and outputs are not those of its sidecar; build the engine again")
            context: trt.IExecutionContext | None = engine.create_execution_context()
            if context is None:
                raise failure(path, log)
            self._context: trt.IExecutionContext = context
            self.warnings = tuple(log.of(WARNING))
        self._stream = cuda.stream()
        self._dtypes = {tensor.name: np.dtype(tensor.dtype) for tensor in (*inputs, *outputs)}
        self._limits = {tensor.name: self._limits_of(tensor) for tensor in self.info.inputs}
        self._buffers: dict[str, cuda.Owned] = {}
        self._graph: cuda.Owned | None = None
        self._captured: tuple[tuple[int, ...], ...] = ()
        self._allocate()

    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """Outputs by name, in the engine's own types; `feeds` may hold more than the inputs, in any number type.

        Raises:
            BadInput: an input is missing or has another shape.
            MachineLacks: the GPU fails.
        """
        arrays = self._upload(feeds)
        self._launch_all()
        answers = {name: np.empty(self._shape_of(name), self._dtypes[name]) for name in self.outputs}
        for name, array in answers.items():
            cuda.download(self._buffers[name].handle, array, self._stream)
        self._synchronize()
        del arrays  # they had to live until here
        return answers

    def time(self, feeds: Arrays, repeats: int = 100, warm_ups: int = WARM_UPS) -> list[float]:
        """Milliseconds of each of `repeats` runs, by CUDA events; inputs and outputs stay on the device.

        Raises:
            BadInput: an input is missing or has another shape.
            MachineLacks: the GPU fails.
        """
        arrays = self._upload(feeds)
        for _ in range(max(1, warm_ups)):
            self._launch_all()
        self._synchronize()
        del arrays
        return cuda.elapsed(self._launch_all, repeats, self._stream)

    def kernels(self, feeds: Arrays) -> tuple[Kernel, ...]:
        """The kernels of one run, launched one by one.

        Raises:
            BadInput: an input is missing or has another shape.
            MachineLacks: the GPU fails, or nothing records its kernels, see `samq.engines.kernels`.
        """
        require_cupti()
        arrays = self._upload(feeds)
        self._enqueue()  # what is loaded at the first launch is no part of a run
        self._synchronize()
        del arrays

        def run() -> None:
            self._enqueue()
            self._synchronize()

        return trace(run)

    def close(self) -> None:
        """Give the GPU's memory back now; the engine cannot run any more."""
        if hasattr(self, "_context"):
            del self._context, self._engine, self._runtime
        for owned in (*self._buffers.values(), self._graph, self._stream):
            if owned is not None:
                owned.close()
        self._buffers, self._graph = {}, None

    def _limits_of(self, tensor: PlanTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Smallest and largest shape of an input."""
        if all(isinstance(side, int) for side in tensor.shape):
            fixed = tuple(int(side) for side in tensor.shape)
            return fixed, fixed
        smallest, _, largest = self._engine.get_tensor_profile_shape(tensor.name, 0)
        return tuple(smallest), tuple(largest)

    def _allocate(self) -> None:
        """Memory for the largest shapes, known to the context for good."""
        for name, (_, largest) in self._limits.items():
            self._context.set_input_shape(name, largest)
        for name in (*self.inputs, *self.outputs):
            shape = self._shape_of(name)
            if min(shape, default=0) < 0:
                raise BadInput(f"{self.path.name}: the size of {name} depends on values; export it without such sides")
            self._buffers[name] = cuda.allocate(int(np.prod(shape)) * self._dtypes[name].itemsize)
            self._context.set_tensor_address(name, int(self._buffers[name].handle))

    def _shape_of(self, name: str) -> tuple[int, ...]:
        """The tensor's shape for the inputs' present ones."""
        return tuple(self._context.get_tensor_shape(name))

    def _upload(self, feeds: Arrays) -> list[NDArray[Any]]:
        """Check, convert and copy the inputs; returns what must live until the stream is synchronized."""
        arrays = []
        for name in self.inputs:
            if name not in feeds:
                raise BadInput(f"{self.path.name}: input {name} is missing")
            array = np.ascontiguousarray(feeds[name], self._dtypes[name])
            self._check_shape(name, array.shape)
            self._context.set_input_shape(name, array.shape)
            cuda.upload(array, self._buffers[name].handle, self._stream)
            arrays.append(array)
        return arrays

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        smallest, largest = self._limits[name]
        fits = len(shape) == len(largest) and all(a <= s <= b for a, s, b in zip(smallest, shape, largest, strict=True))
        if not fits:
            takes = f"{list(largest)}" if smallest == largest else f"{list(smallest)} to {list(largest)}"
            raise BadInput(f"{self.path.name}: {name} is {list(shape)}, and the engine takes {takes}")

    def _launch_all(self) -> None:
        if not self.cuda_graph:
            self._enqueue()
            return
        shapes = tuple(self._shape_of(name) for name in self.inputs)
        if self._graph is None or shapes != self._captured:
            self._enqueue()  # a new shape settles what is launched, and must not do so while launches are recorded
            self._synchronize()
            try:
                self._graph, self._captured = cuda.capture(self._enqueue, self._stream), shapes
            except MachineLacks as error:
                if self._insists:
                    raise
                self.cuda_graph = False
                self.warnings = (*self.warnings, f"launches are not recorded: {error}")
                self._enqueue()
                return
        cuda.call("cudaGraphLaunch", self._graph.handle, self._stream.handle)

    def _enqueue(self) -> None:
        with captured() as (_, log):
            if not self._context.execute_async_v3(int(self._stream.handle)):
                raise failure(self.path, log)

    def _synchronize(self) -> None:
        cuda.call("cudaStreamSynchronize", self._stream.handle)
