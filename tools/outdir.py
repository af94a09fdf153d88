"""The output directory: what is in it, which stages are done, and whose work it is.

manifest.json       stages done, sha256 of each artifact, the job's fingerprint
config.yaml         the resolved recipe
weights/            quantized.safetensors, config.json, layers.json
onnx/               canonical Q/DQ parts; fp32/ and fp16/ hold the baseline's
engines/<target>/   lowered parts
report/             report.json, report.md
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from samq.errors import BadInput, UsageError
from samq.files import is_temporary, sha256_of, temporaries, write_json

MANIFEST = "manifest.json"
OURS = ("config.yaml", "weights", "onnx", "engines", "report", MANIFEST)  # the manifest goes last
STAGES = ("quantize", "export", "build", "validate")


@dataclass
class OutputDir:
    """An output directory that belongs to one job.

    Args:
        path: the directory.
        job: what was asked for, as JSON values; enough to go on from here.
        fingerprint: hex digest of configuration, checkpoint, calibration data and code.
        stages: stage → {"artifacts": {relative path: sha256}, "seconds": float, …}.
    """

    path: Path
    job: dict[str, Any]
    fingerprint: str
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)

    @staticmethod
    def open(path: Path) -> OutputDir:
        """The output directory of an earlier run.

        Raises:
            BadInput: there is none, or its manifest is unreadable.
        """
        manifest = path / MANIFEST
        if not manifest.is_file():
            raise BadInput(f"{path} is no output directory of samq; run `samq-export quantize` or `run` first")
        try:
            content = json.loads(manifest.read_text(encoding="utf-8"))
            if not all(isinstance(stage["artifacts"], dict) for stage in content["stages"].values()):
                raise ValueError("a stage without artifacts")
            return OutputDir(path, dict(content["job"]), str(content["fingerprint"]), content["stages"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(f"{manifest} is unreadable ({error!r}); run again with --force") from error

    @staticmethod
    def claim(path: Path, job: dict[str, Any], fingerprint: str, force: bool) -> OutputDir:
        """The directory for a job: a new one, or the one in which the same job stopped.

        The manifest is written at once, so that a job that is killed before its first stage is done is known again.
        With `force`, what samq wrote into the directory is removed first. Files that others put there stay.

        Raises:
            UsageError: the directory holds something else and `force` is not given.
            BadInput: the directory's manifest is unreadable and `force` is not given.
            MachineLacks: the directory cannot be written to.
        """
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path} is a file; choose another --output-dir")
        if path.is_dir():
            if (path / MANIFEST).is_file():
                _remove_leftovers(path)
                if not force:
                    earlier = OutputDir.open(path)
                    if earlier.fingerprint == fingerprint:
                        return OutputDir(path, job, fingerprint, earlier.stages)
                    raise UsageError(
                        f"{path} holds the results of another job (config, checkpoint, data or version differ);"
                        " choose another --output-dir or overwrite it with --force"
                    )
                for name in OURS:
                    _remove(path / name)
            elif any(path.iterdir()) and not force:
                raise UsageError(f"{path} is not empty and not samq's; choose another --output-dir or give --force")
        claimed = OutputDir(path, job, fingerprint)
        claimed.save()
        return claimed

    def done(self, stage: str) -> bool:
        """The stage is recorded and all its artifacts are as they were written."""
        entry = self.stages.get(stage)
        return entry is not None and all(
            (self.path / name).is_file() and sha256_of(self.path / name) == digest
            for name, digest in entry["artifacts"].items()
        )

    def require(self, stage: str) -> None:
        """Insist that a stage and those before it are done.

        Raises:
            BadInput: one is not, or an artifact was changed since.
        """
        for needed in STAGES[: STAGES.index(stage) + 1]:
            if not self.done(needed):
                state = "was changed or is missing a file" if needed in self.stages else "is not there yet"
                raise BadInput(f"{self.path}: the result of `{needed}` {state}; run `samq-export {needed}` first")

    def record(self, stage: str, artifacts: Iterable[Path], seconds: float, **details: Any) -> None:
        """Note a finished stage in the manifest; later stages are no longer valid."""
        digests = {str(path.relative_to(self.path)): sha256_of(path) for path in sorted(artifacts)}
        self.stages[stage] = {"artifacts": digests, "seconds": round(seconds, 3), **details}
        for later in STAGES[STAGES.index(stage) + 1 :]:
            self.stages.pop(later, None)
        self.save()

    def save(self) -> None:
        """Write the manifest."""
        write_json(self.path / MANIFEST, {"fingerprint": self.fingerprint, "job": self.job, "stages": self.stages})


def _remove_leftovers(path: Path) -> None:
    """Remove what killed writes of samq left, and nothing else."""
    folders = [path / name for name in OURS if (path / name).is_dir()]
    leftovers = [file for folder in folders for file in temporaries(folder)]
    leftovers += [file for name in OURS for file in path.glob(f".{name}.*") if is_temporary(file)]
    for file in leftovers:
        _remove(file)


def _remove(target: Path) -> None:
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    else:
        target.unlink(missing_ok=True)
