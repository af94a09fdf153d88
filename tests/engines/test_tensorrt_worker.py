"""The worker as a real process, without TensorRT, and the engine that speaks with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import samq
from samq.engines import tensorrt
from samq.engines.cuda import Device
from samq.engines.kernels import Kernel
from samq.engines.tensorrt_plan import BuildOptions
from samq.engines.tensorrt_process import Worker, WorkerEngine
from samq.engines.tensorrt_worker import CALLS, load_arrays, run_job, save_arrays
from samq.errors import BadInput, MachineLacks, UsageError

ROOT = Path(samq.__file__).parents[1]

# A module in the place of TensorRT: it is noisy, and it is not there.
ABSENT = """
import os
os.write(1, b"noise of a library\\n")
raise ModuleNotFoundError("No module named 'tensorrt'", name="tensorrt")
"""

# Runs the worker where nothing can be imported but the standard library, numpy and samq.
BARE = """
import sys

class Bare:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in {*sys.stdlib_module_names, "numpy", "samq"}:
            raise ImportError(f"{name} is not on a bare machine")

sys.meta_path.insert(0, Bare())
import samq.engines.tensorrt_worker, samq.engines.tensorrt_process
print(*sorted(name for name in sys.modules if name.startswith("samq.")))
"""


@pytest.fixture
def python(tmp_path: Path) -> str:
    """An interpreter without TensorRT, whatever is installed here: a script that gives this one a path of its own."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "tensorrt.py").write_text(ABSENT, encoding="utf-8")
    return script(tmp_path / "python", f'#!/bin/sh\nPYTHONPATH={folder} exec {sys.executable} "$@"\n')


def script(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def run_worker(python: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    start = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    start += "from samq.engines.tensorrt_worker import main; sys.exit(main())"
    return subprocess.run([python, "-c", start, *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_the_worker_needs_nothing_but_numpy() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "samq.engines.tensorrt_run" in done.stdout.split()


def test_a_job_without_tensorrt_is_one_line_and_exit_code_5(python: str, tmp_path: Path) -> None:
    onnx, job, result = tmp_path / "part.onnx", tmp_path / "job.json", tmp_path / "result.json"
    onnx.write_bytes(b"")
    job.write_text(json.dumps({"onnx": str(onnx), "plan": str(tmp_path / "part.plan")}), encoding="utf-8")
    done = run_worker(python, str(job), str(result))
    assert done.returncode == 5
    assert done.stderr.startswith("error: TensorRT is not installed; run `pip install samq[tensorrt]`")
    assert done.stderr.count("\n") == 1
    assert not result.exists()


@pytest.mark.parametrize(
    ("arguments", "job", "code", "text"),
    [
        ((), None, 2, "give JOB.json and RESULT.json, or --serve"),
        (("job.json", "result.json"), None, 6, "job.json: is no job"),
        (("job.json", "result.json"), "{", 6, "job.json: is no job"),
        (("job.json", "result.json"), "[]", 6, "it needs at least"),
        (("job.json", "result.json"), '{"plan": "p", "onnx": "none.onnx"}', 6, "none.onnx is missing"),
        (("job.json", "result.json"), '{"plan": "p", "onnx": "o", "options": {"x": 1}}', 2, "build options"),
        (("job.json", "result.json"), '{"plan": "none.plan", "feeds": "x.npz"}', 6, "none.plan is missing"),
    ],
)
def test_wrong_jobs_are_one_line(
    python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: Any, job: str | None, code: int, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if job is not None:
        Path("job.json").write_text(job, encoding="utf-8")
    done = run_worker(python, *arguments)
    assert (done.returncode, done.stderr.count("\n")) == (code, 1)
    assert text in done.stderr


def test_a_worker_raises_here_what_was_raised_there(python: str, tmp_path: Path) -> None:
    """One process answers call after call; what libraries print does not come between the answers."""
    worker = Worker(python)
    onnx = tmp_path / "part.onnx"
    onnx.write_bytes(b"")
    for _ in range(2):
        with pytest.raises(MachineLacks, match="TensorRT is not installed"):
            worker.about()
    with pytest.raises(MachineLacks, match="TensorRT is not installed"):
        worker.build(onnx, tmp_path / "part.plan", BuildOptions(workspace_mib=64))
    with pytest.raises(BadInput, match=r"none\.onnx is missing"):
        worker.build(tmp_path / "none.onnx", tmp_path / "part.plan")
    with pytest.raises(BadInput, match=r"none\.plan is missing"):
        worker.refit(tmp_path / "none.plan", onnx, tmp_path / "new.plan")
    with pytest.raises(UsageError, match="unexpected keyword argument 'more'"):
        worker.call("build", onnx=str(onnx), plan="p", options={"more": 1})
    folder = worker.folder
    worker.close()
    assert not folder.exists()


def test_the_environment_names_the_interpreter(python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMQ_TENSORRT_PYTHON", python)
    with pytest.raises(MachineLacks, match="TensorRT is not installed"):
        tensorrt.about()
    tensorrt._STARTED.pop(python).close()
    monkeypatch.setenv("SAMQ_TENSORRT_PYTHON", str(tmp_path / "nothing"))
    with pytest.raises(MachineLacks, match=r"nothing cannot be started \(No such file or directory\)"):
        tensorrt.about()


def test_a_process_that_ended_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash costs the call that it happened in, and no other."""
    answer = {"result": {"tensorrt": "8.6.0", "gpu": {"name": "Orin", "capability": [8, 7], "memory_mib": 1}}}
    fragile = script(
        tmp_path / "fragile",
        f"#!{sys.executable}\nimport os, pathlib, sys\nsys.stdin.readline()\n"
        f"been = pathlib.Path({str(tmp_path / 'been')!r})\n"
        "if not been.exists():\n    been.touch()\n    os.abort()\n"
        f"print({json.dumps(answer)!r}, flush=True)\nsys.stdin.readline()\n",
    )
    monkeypatch.setenv("SAMQ_TENSORRT_PYTHON", fragile)
    with pytest.raises(MachineLacks, match="the TensorRT process ended with status -6"):
        tensorrt.about()
    assert tensorrt.about() == ("8.6.0", Device("Orin", (8, 7), 1))
    tensorrt._STARTED.pop(fragile).close()


def speaks(tmp_path: Path, *lines: str) -> Worker:
    """A worker that says something whatever it is asked."""
    text = "\n".join(("import sys", "sys.stdin.readline()", *lines))
    return Worker(script(tmp_path / "speaks", f"#!{sys.executable}\n{text}\n"))


def test_progress_comes_through(tmp_path: Path) -> None:
    told = ['{"progress": ["parse", 0, 0]}', '{"progress": ["Building Engine", 1, 2]}', '{"result": 7}']
    worker, seen = speaks(tmp_path, *(f"print({line!r}, flush=True)" for line in told)), []
    assert worker.call("build", lambda *step: seen.append(step)) == 7
    assert seen == [("parse", 0, 0), ("Building Engine", 1, 2)]
    worker.close()


class Opened(WorkerEngine):
    """An engine of a worker that has it open, its plan being elsewhere."""

    def __init__(self, worker: Worker) -> None:
        self.worker, self.inputs, self._key = worker, ("x",), "0"


def test_kernels_come_through(tmp_path: Path) -> None:
    kernels = (Kernel("mha0", 2, 3.5), Kernel("nvjet_hsh", 1, 0.5))

    class Launches:
        def kernels(self, feeds: dict[str, Any]) -> tuple[Kernel, ...]:
            assert feeds["x"].tolist() == [1, 2]
            return kernels

    save_arrays(tmp_path / "feeds.npz", {"x": np.array([1, 2])})
    call = {"engine": "0", "feeds": str(tmp_path / "feeds.npz")}
    answer = CALLS["kernels"]({"0": Launches()}, call, lambda *step: None)  # type: ignore[dict-item]
    worker = speaks(tmp_path, f"print({json.dumps({'result': answer})!r}, flush=True)")
    assert Opened(worker).kernels({"x": np.array([1, 2])}) == kernels
    worker.close()


def test_who_watches_ends_the_worker(tmp_path: Path) -> None:
    worker = speaks(tmp_path, """print('{"progress": ["parse", 0, 0]}', flush=True)""", "sys.stdin.read()")

    def interrupt(phase: str, step: int, steps: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        worker.call("build", interrupt)
    with pytest.raises(MachineLacks, match="ended with status -9"):
        worker.call("about")
    worker.close()


@pytest.mark.usefixtures("interrupts")
def test_an_interrupt_ends_the_worker_that_has_not_answered(tmp_path: Path) -> None:
    worker = speaks(tmp_path, "import os, signal, time", "os.kill(os.getppid(), signal.SIGINT)", "time.sleep(60)")
    with pytest.raises(KeyboardInterrupt):
        worker.call("build")
    with pytest.raises(MachineLacks, match="ended with status -9"):
        worker.call("about")
    worker.close()


def test_a_script_that_prints_among_the_answers_is_told(tmp_path: Path) -> None:
    worker = speaks(tmp_path, "print('Loading module cuda/12', flush=True)", "sys.stdin.read()")
    with pytest.raises(MachineLacks, match=r"prints 'Loading module cuda/12', where only .* print to stderr"):
        worker.call("about")
    assert worker._process.wait() == -9
    worker.close()


def test_a_worker_that_dies_tells_its_last_words(tmp_path: Path) -> None:
    worker = speaks(
        tmp_path, "import os", "print('first', file=sys.stderr)", "os.write(2, b'last words')", "os.abort()"
    )
    with pytest.raises(MachineLacks, match=r"the TensorRT process ended with status -6 \(last words\)"):
        worker.call("run")
    worker.close()


def test_arrays_read_as_they_were_written(tmp_path: Path) -> None:
    arrays = {"x": np.arange(6, dtype=np.float16).reshape(2, 3), "labels": np.array([[1, -10]], np.int64)}
    save_arrays(tmp_path / "x.npz", arrays)
    read = load_arrays(tmp_path / "x.npz")
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)


@pytest.mark.parametrize("content", [None, b"", b"no arrays", b"PK\x03\x04", b"\x93NUMPY\x01\x00"])
def test_files_without_arrays_are_one_line(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(BadInput, match=r"x\.npz: holds no arrays") as caught:
        load_arrays(tmp_path / "x.npz")
    assert "\n" not in str(caught.value)


def test_a_job_of_nothing_gives_nothing() -> None:
    assert run_job({"plan": "p"}) == {}
