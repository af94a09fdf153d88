"""A model repository for Triton from a finished output directory.

    sam_image_encoder/  sam_mask_decoder/   the engine: a plan, or an ONNX file with code for the Python backend
    sam/                image and prompts in, masks out: code for the Python backend, which asks the other two
    requirements.txt    what the code needs in the server's Python

Each model has a config.pbtxt and a folder for its version. Its code stands in `samq/` beside its `model.py`: modules
copied from here, so that the server needs no samq.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnxruntime  # type: ignore[import-untyped]

import samq
from samq.calib.processor import SamProcessor
from samq.errors import MachineLacks, UsageError
from samq.files import write_json, write_text
from samq.tools.outdir import OutputDir
from samq.tools.triton.config import SAM, Part, Serving, as_text, part_config, sam_config
from samq.tools.triton.parts import MODELS, ServedEngine, ServedPart, served_engine
from samq.tools.triton.preprocessing import measured

REPOSITORY = "triton"  # in an output directory
REQUIREMENTS = "requirements.txt"
SETTINGS = "settings.json"
CONTENT = {SAM, *MODELS.values(), REQUIREMENTS}

_SERVED = "tools.triton.served"
_BOTH = ("", "errors", "engines", "engines.base", "engines.kernels", "tools", "tools.triton", _SERVED)
_ANSWERING = tuple(f"{_SERVED}.{name}" for name in ("errors", "store"))
PART_CODE = (
    *_BOTH,
    *_ANSWERING,
    *(f"engines.{name}" for name in ("onnxruntime", "onnxruntime_cuda", "onnxruntime_options")),
    f"{_SERVED}.part",
)
SAM_CODE = (
    *_BOTH,
    *_ANSWERING,
    "engines.predictor",
    *(f"{_SERVED}.{name}" for name in ("images", "requests", "service", "sam")),
)

ENTRY = '''"""What Triton's Python backend loads; the code is in samq/ beside this file."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from {module} import TritonPythonModel  # noqa: E402, F401
'''


def lay_out(
    out: OutputDir,
    repository: Path,
    serving: Serving,
    *,
    others: Sequence[OutputDir] = (),
    model_version: int = 1,
) -> ServedEngine:
    """Write the model repository of an output directory, whole or not at all; one that stood there is replaced.

    Args:
        out: with an engine.
        repository: where to.
        serving: what an operator may tune.
        others: output directories with plans of the same graphs for other GPUs.
        model_version: name of the folder in each model.

    Raises:
        BadInput: there is no engine, or a file of it was changed; or Triton cannot do what the image processor does.
        UsageError: `repository` holds something else, or the plans of `others` do not belong to these.
        MachineLacks: tritonclient is not installed, or the disk is full.
    """
    engine = served_engine(out, others, serving)
    encoder, decoder = engine.encoder.config, engine.decoder.config
    image_size = encoder.inputs[0].shape[-1]
    assert isinstance(image_size, int)
    preprocessing = measured(SamProcessor.from_checkpoint(out.path / "weights", image_size))
    shapes = {tensor.name: tensor.shape for tensor in (*decoder.inputs, *decoder.outputs)}
    settings = {
        "preprocessing": asdict(preprocessing),
        "image_encoder": _settings(encoder),
        "mask_decoder": _settings(decoder),
        "multimasks": int(shapes["iou_scores"][-1]) - 1,
        "prompts_at_once": engine.prompts_at_once,
    }
    with _replaced(repository) as folder:
        for part in (engine.encoder, engine.decoder):
            _write_part(folder / part.config.name, part, str(model_version))
        home = folder / SAM
        mask_side = [int(side) for side in shapes["mask_input"][-2:]]
        write_text(home / "config.pbtxt", as_text(sam_config(replace(serving, max_points=engine.points), mask_side)))
        write_json(home / str(model_version) / SETTINGS, settings)
        _write_code(home / str(model_version), SAM_CODE)
        write_text(folder / REQUIREMENTS, _requirements(engine))
    return engine


def _write_part(folder: Path, part: ServedPart, model_version: str) -> None:
    write_text(folder / "config.pbtxt", as_text(part_config(part.config)))
    home = folder / model_version
    home.mkdir()
    for source, name in part.files.items():
        shutil.copyfile(source, home / name)
    if not part.config.plans:
        _write_code(home, PART_CODE)


def _write_code(home: Path, modules: Sequence[str]) -> None:
    """`model.py`, and the modules that it needs; the last one has the model."""
    root = Path(samq.__file__).parent
    for module in modules:
        path = root.joinpath(*module.split(".")) if module else root
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        copy = home / "samq" / path.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    write_text(home / "model.py", ENTRY.format(module=f"samq.{modules[-1]}"))


def _settings(part: Part) -> dict[str, Any]:
    """What `samq.tools.triton.served.sam.ServerModel` takes."""
    inputs = {tensor.name: {"shape": tensor.shape, "dtype": tensor.dtype} for tensor in part.inputs}
    return {"model": part.name, "inputs": inputs, "outputs": [tensor.name for tensor in part.outputs]}


def _requirements(engine: ServedEngine) -> str:
    """The runtime in the version that the engine was checked with."""
    lines = ["numpy>=1.23", "pillow>=11"]
    if not engine.has_plans:
        runtime = "onnxruntime-gpu[cuda,cudnn]" if engine.gpu else "onnxruntime"
        lines += [f"onnx=={version('onnx')}", f"{runtime}=={onnxruntime.__version__}"]
    return "\n".join([*lines, ""])


@contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder`, which takes its place on success; on any error all is as before."""
    if folder.is_file() or (folder.is_dir() and not {path.name for path in folder.iterdir()} <= CONTENT):
        raise UsageError(f"{folder} holds something else than a model repository of samq; choose another --repository")
    with _writing_errors_told(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".part"))
        new, old = staged / "new", staged / "old"
        try:
            new.mkdir()
            yield new
            if folder.is_dir():
                folder.replace(old)
            try:
                new.replace(folder)
            except BaseException:
                if old.is_dir():
                    old.replace(folder)
                raise
        finally:
            shutil.rmtree(staged)


@contextmanager
def _writing_errors_told(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MachineLacks(f"{folder}: cannot be written ({error.strerror}); choose another --repository") from error
