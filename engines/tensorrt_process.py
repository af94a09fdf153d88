"""The other end of `samq.engines.tensorrt_worker`: TensorRT of another interpreter, as if it were this one's."""

from __future__ import annotations

import json
import subprocess
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

import samq
from samq import errors
from samq.engines.base import Arrays
from samq.engines.cuda import Device
from samq.engines.kernels import Kernel
from samq.engines.tensorrt_plan import BuildOptions, PlanInfo, load_info
from samq.engines.tensorrt_progress import Progress, silent
from samq.engines.tensorrt_run import WARM_UPS
from samq.engines.tensorrt_worker import load_arrays, save_arrays
from samq.errors import MachineLacks, SamqError

# samq alone goes on the other interpreter's path: the packages beside it are not for its version of Python.
_START = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); from samq.engines.tensorrt_worker import main; sys.exit(main())"
)


class Worker:
    """A worker process, kept until `close` or the end of this one.

    Args:
        python: an interpreter with TensorRT, or a script that sets its paths and starts it with all arguments.

    Raises:
        MachineLacks: it cannot be started.
    """

    def __init__(self, python: str) -> None:
        self.python = python
        self._folder = tempfile.TemporaryDirectory(prefix="samq-tensorrt-")
        self.folder = Path(self._folder.name)
        (self.folder / "samq").symlink_to(Path(samq.__file__).parent, target_is_directory=True)
        command = [python, "-c", _START, str(self.folder), "--serve"]
        with (self.folder / "stderr").open("wb") as said:
            try:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True, encoding="utf-8"
                )
            except OSError as error:
                raise MachineLacks(
                    f"{python} cannot be started ({error.strerror}); name another interpreter"
                ) from error
        self._finalizer = weakref.finalize(self, _end, self._process)

    def call(self, name: str, progress: Progress = silent, **arguments: Any) -> Any:
        """Result of one call.

        Raises:
            SamqError: what the call raised there, as it would have been raised here.
            MachineLacks: the process has ended.
        """
        answer = self._answer_to({"call": name, **arguments}, progress)
        if "error" in answer:
            raise _error(answer)
        return answer["result"]

    def _answer_to(self, call: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
        """The process ends where its answer is not waited for, or that would be taken for the next call's."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            with suppress(OSError):  # it has ended, and so do its answers
                self._process.stdin.write(json.dumps(call) + "\n")
                self._process.stdin.flush()
            for line in self._process.stdout:
                answer = self._read(line)
                if "progress" not in answer:
                    return answer
                progress(*answer["progress"])
        except BaseException:
            self._process.kill()
            raise
        raise self._ended()

    def _read(self, line: str) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError as error:
            said = f"{self.python} prints {line.strip()!r}"
            raise MachineLacks(f"{said}, where only TensorRT's answers may stand; let it print to stderr") from error
        return answer

    def _ended(self) -> MachineLacks:
        status = self._process.wait()
        said = (self.folder / "stderr").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        reason = said[-1] if said else "it said nothing"
        return MachineLacks(f"{self.python}: the TensorRT process ended with status {status} ({reason})")

    @property
    def has_ended(self) -> bool:
        """It answers no more calls."""
        return self._process.poll() is not None

    def about(self) -> tuple[str, Device]:
        """Version of its TensorRT, and its GPU."""
        answer = self.call("about")
        gpu = answer["gpu"]
        return answer["tensorrt"], Device(gpu["name"], tuple(gpu["capability"]), gpu["memory_mib"])

    def build(
        self, onnx_path: Path, plan_path: Path, options: BuildOptions | None = None, progress: Progress = silent
    ) -> PlanInfo:
        """As `samq.engines.tensorrt_build.build_engine`."""
        given = asdict(options or BuildOptions())
        answer = self.call("build", progress, onnx=_absolute(onnx_path), plan=_absolute(plan_path), options=given)
        return PlanInfo.from_json(answer["info"])

    def refit(self, plan_path: Path, onnx_path: Path, new_path: Path, progress: Progress = silent) -> PlanInfo:
        """As `samq.engines.tensorrt_refit.refit_engine`."""
        paths = {"plan": plan_path, "onnx": onnx_path, "new": new_path}
        answer = self.call("refit", progress, **{name: _absolute(path) for name, path in paths.items()})
        return PlanInfo.from_json(answer)

    def close(self) -> None:
        """End the process now."""
        self._finalizer()
        self._folder.cleanup()


class WorkerEngine:
    """A plan that a worker runs; otherwise as `samq.engines.tensorrt_run.TensorRtEngine`."""

    def __init__(self, worker: Worker, path: Path, *, cuda_graph: bool | None = None) -> None:
        self.worker, self.path = worker, path
        self.info = load_info(path)
        self.inputs: Sequence[str] = [tensor.name for tensor in self.info.inputs]
        self.outputs: Sequence[str] = [tensor.name for tensor in self.info.outputs]
        self.shapes: Mapping[str, Sequence[int | str]] = {tensor.name: tensor.shape for tensor in self.info.inputs}
        self.largest: Mapping[str, int] = self.info.largest
        self._key = worker.call("open", plan=_absolute(path), cuda_graph=cuda_graph)

    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """Outputs by name; `feeds` may hold more than the inputs."""
        outputs = self.worker.folder / "outputs.npz"
        self.worker.call("run", engine=self._key, feeds=self._written(feeds), outputs=str(outputs))
        return load_arrays(outputs)

    def time(self, feeds: Arrays, repeats: int = 100, warm_ups: int = WARM_UPS) -> list[float]:
        """Milliseconds of each run, by CUDA events, without the way to the worker."""
        written = self._written(feeds)
        times = self.worker.call("time", engine=self._key, feeds=written, repeats=repeats, warm_ups=warm_ups)
        return [float(value) for value in times]

    def kernels(self, feeds: Arrays) -> tuple[Kernel, ...]:
        """The kernels of one run, launched one by one."""
        rows = self.worker.call("kernels", engine=self._key, feeds=self._written(feeds))
        return tuple(Kernel(**row) for row in rows)

    def close(self) -> None:
        """Give the GPU's memory back now."""
        self.worker.call("close", engine=self._key)

    def _written(self, feeds: Arrays) -> str:
        path = self.worker.folder / "feeds.npz"
        save_arrays(path, {name: feeds[name] for name in self.inputs if name in feeds})
        return str(path)


def _absolute(path: Path) -> str:
    return str(path.resolve())


def _error(answer: Mapping[str, str]) -> SamqError:
    kind = getattr(errors, answer["kind"], SamqError)
    assert issubclass(kind, SamqError)
    error: SamqError = kind(answer["error"])
    return error


def _end(process: subprocess.Popen[str]) -> None:
    """The worker ends when nothing more can come."""
    if process.stdin is not None and not process.stdin.closed:
        with suppress(BrokenPipeError):  # it has ended already
            process.stdin.close()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()
