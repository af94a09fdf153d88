"""TensorRT in a process of its own, for an interpreter that has TensorRT, numpy and cuda-python and nothing else.

    python -m samq.engines.tensorrt_worker JOB.json RESULT.json     one job, then the end
    python -m samq.engines.tensorrt_worker --serve                  calls, one JSON line each, until stdin ends

A job is `{"plan": path}` with any of `"onnx": path, "options": {…}` (build it), `"feeds": npz, "outputs": npz` (run
it), `"repeats": n` (time it on the feeds), `"cuda_graph": bool`. Its result is `{"info": the sidecar,
"milliseconds": […]}`, without what was not asked for.

Served calls are `{"call": name, …arguments}` with the names of `CALLS`. Each is answered by any number of
`{"progress": [phase, step, steps]}` and one `{"result": …}` or `{"error": one line, "kind": class of `samq.errors`}`.
"""

from __future__ import annotations

import json
import os
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from samq.engines.cuda import find_device
from samq.engines.tensorrt_build import build_engine
from samq.engines.tensorrt_log import load_tensorrt, version_of
from samq.engines.tensorrt_plan import BuildOptions
from samq.engines.tensorrt_progress import Progress, silent
from samq.engines.tensorrt_refit import refit_engine
from samq.engines.tensorrt_run import TensorRtEngine
from samq.errors import BadInput, SamqError, UsageError
from samq.files import write_json, written_whole

Engines = dict[str, TensorRtEngine]
USAGE = "tensorrt_worker: give JOB.json and RESULT.json, or --serve"


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        if given == ["--serve"]:
            _serve(sys.stdin, _own_stdout())
        elif len(given) == 2:
            write_json(Path(given[1]), run_job(_read_job(Path(given[0]))))
        else:
            raise UsageError(USAGE)
    except SamqError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def run_job(job: Mapping[str, Any], progress: Progress = silent) -> dict[str, Any]:
    """Build, run and time as the job asks; see the module.

    Raises:
        SamqError: as the parts of the job do.
    """
    plan = Path(job["plan"])
    result: dict[str, Any] = {}
    if "onnx" in job:
        options = BuildOptions.from_json(job.get("options", {}))
        result["info"] = asdict(build_engine(Path(job["onnx"]), plan, options, progress))
    if "feeds" in job:
        engine = TensorRtEngine(plan, cuda_graph=job.get("cuda_graph"))
        feeds = load_arrays(Path(job["feeds"]))
        if "outputs" in job:
            save_arrays(Path(job["outputs"]), engine.run(feeds))
        if "repeats" in job:
            result["milliseconds"] = engine.time(feeds, int(job["repeats"]))
        engine.close()
    return result


def load_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Arrays of an .npz file by name.

    Raises:
        BadInput: it is missing or no such file.
    """
    try:
        with zipfile.ZipFile(path), np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise BadInput(f"{path}: holds no arrays ({error}); write it with numpy.savez") from error


def save_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays by name to an .npz file, whole or not at all."""
    with written_whole(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # numpy's stub takes any keyword for its own


def _read_job(path: Path) -> dict[str, Any]:
    try:
        job = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: is no job ({error}); write one as JSON") from error
    if not isinstance(job, dict) or not isinstance(job.get("plan"), str):
        raise BadInput(f'{path}: is no job; it needs at least {{"plan": path}}')
    return job


def _own_stdout() -> TextIO:
    """The answers' way out; whatever libraries print to stdout goes to stderr from now on."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def _serve(calls: TextIO, answers: TextIO) -> None:
    engines: Engines = {}

    def answer(value: Mapping[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    def progress(phase: str, step: int, steps: int) -> None:
        answer({"progress": [phase, step, steps]})

    for line in calls:
        call = json.loads(line)
        try:
            answer({"result": CALLS[call["call"]](engines, call, progress)})
        except SamqError as error:
            answer({"error": str(error), "kind": type(error).__name__})


def _about(engines: Engines, call: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    version, device = version_of(load_tensorrt()), find_device()
    return {"tensorrt": version, "gpu": asdict(device)}


def _build(engines: Engines, call: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    return run_job({key: call[key] for key in ("plan", "onnx", "options")}, progress)


def _refit(engines: Engines, call: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    return asdict(refit_engine(Path(call["plan"]), Path(call["onnx"]), Path(call["new"]), progress))


def _open(engines: Engines, call: Mapping[str, Any], progress: Progress) -> str:
    key = str(len(engines))
    engines[key] = TensorRtEngine(Path(call["plan"]), cuda_graph=call["cuda_graph"])
    return key


def _run(engines: Engines, call: Mapping[str, Any], progress: Progress) -> None:
    save_arrays(Path(call["outputs"]), engines[call["engine"]].run(load_arrays(Path(call["feeds"]))))


def _time(engines: Engines, call: Mapping[str, Any], progress: Progress) -> list[float]:
    return engines[call["engine"]].time(load_arrays(Path(call["feeds"])), int(call["repeats"]), int(call["warm_ups"]))


def _kernels(engines: Engines, call: Mapping[str, Any], progress: Progress) -> list[dict[str, Any]]:
    return [asdict(kernel) for kernel in engines[call["engine"]].kernels(load_arrays(Path(call["feeds"])))]


def _close(engines: Engines, call: Mapping[str, Any], progress: Progress) -> None:
    engines[call["engine"]].close()


CALLS: Mapping[str, Callable[[Engines, Mapping[str, Any], Progress], Any]] = {
    "about": _about,
    "build": _build,
    "refit": _refit,
    "open": _open,
    "run": _run,
    "time": _time,
    "kernels": _kernels,
    "close": _close,
}

if __name__ == "__main__":
    sys.exit(main())
