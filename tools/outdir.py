"""The output directory: what is in it, which stages are done, and whose work it is.

manifest.json       stages done with their command, log, time and memory, sha256 of each artifact, the job's fingerprint
config.yaml         the resolved recipe
weights/            quantized.safetensors, config.json, layers.json
onnx/               canonical Q/DQ parts; fp32/ and fp16/ hold the baseline's
engines/<target>/   lowered parts, engines, and how they are run
report/             report.json, prompts.json and examples/, and made of them: report.html, report.md
triton/             model repository, from `samq-export triton`
search/             what `samq-export search` measured, and the configs that it found
placement.yaml      what `samq-export place` measured
bench.json          what `samq-export bench` measured
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from samq.errors import BadInput, UsageError
from samq.files import is_temporary, locked, removed, sha256_of, temporaries, write_json

MANIFEST = "manifest.json"
PLACEMENT = "placement.yaml"
BENCH = "bench.json"
SEARCH = "search"
OURS = (
    "config.yaml",
    "weights",
    "onnx",
    "engines",
    "report",
    "triton",
    SEARCH,
    PLACEMENT,
    BENCH,
    MANIFEST,
)  # the manifest goes last
STAGES = ("quantize", "export", "build", "validate")


@dataclass
class OutputDir:
    """An output directory that belongs to one job.

    Args:
        path: the directory.
        job: what was asked for, as JSON values; enough to go on from here.
        fingerprint: hex digest of configuration, checkpoint, calibration data and code.
        stages: stage → {"artifacts": {relative path: sha256}, …}, with what `samq.tools.watch.Watch` took.
        superseded: relative paths of artifacts that are no stage's any more, another job's or those of stages done
            again. They stay until `quantize` next has something to put there.
    """

    path: Path
    job: dict[str, Any]
    fingerprint: str
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    superseded: tuple[str, ...] = ()

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
            superseded = tuple(map(str, content.get("superseded", ())))
            return OutputDir(path, dict(content["job"]), str(content["fingerprint"]), content["stages"], superseded)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(
                f"{manifest} is unreadable ({error!r}); run `samq-export quantize` again with --force"
            ) from error

    @staticmethod
    def claim(path: Path, job: dict[str, Any], fingerprint: str, force: bool) -> OutputDir:
        """The directory for a job: a new one, or the one in which the same job stopped.

        The manifest is written at once, so that a job that is killed before its first stage is done is known again. A
        directory in which another job has finished nothing is taken over. With `force` the results of the job before,
        its superseded ones and what `bench` measured, and nothing else, go when `make_room` is called.

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
                if force:
                    return OutputDir(path, job, fingerprint, superseded=(*_artifacts_in(path), BENCH))
                earlier = OutputDir.open(path)
                if earlier.fingerprint == fingerprint:
                    return replace(earlier, job=job)
                if earlier.stages:
                    raise UsageError(
                        f"{path} holds the results of another job (config, checkpoint, data or version differ);"
                        " choose another --output-dir or overwrite it with --force"
                    )
            elif _holds_more_than_a_search(path) and not force:
                raise UsageError(f"{path} is not empty and not samq's; choose another --output-dir or give --force")
        claimed = OutputDir(path, job, fingerprint)
        claimed.save()
        return claimed

    def make_room(self) -> None:
        """Remove the results of the job that this one supersedes; to be called when the first new one is at hand.

        Raises:
            MachineLacks: the directory cannot be written to.
        """
        for name in self.superseded:
            path = self.path / name
            if path.resolve().is_relative_to(self.path.resolve()):  # not through a link, nor out of here
                removed(path)
                _remove_empty(path.parent, self.path)
        self.superseded = ()
        self.save()

    def detail(self, stage: str, name: str) -> Any:
        """What a stage noted.

        Raises:
            BadInput: it noted no such thing.
        """
        try:
            return self.stages[stage][name]
        except KeyError as error:
            fix = "run `samq-export quantize` again with --force"
            raise BadInput(f"{self.path / MANIFEST} lacks {name} of `{stage}`; {fix}") from error

    def done(self, stage: str) -> bool:
        """The stage is recorded and all its artifacts are as they were written."""
        return stage in self.stages and all(self._holds(name, digest) for name, digest in self._digests(stage))

    def _digests(self, stage: str) -> list[tuple[str, str]]:
        return list(self.stages[stage]["artifacts"].items())

    def _holds(self, name: str, digest: str) -> bool:
        return (self.path / name).is_file() and sha256_of(self.path / name) == digest

    def require(self, stage: str) -> None:
        """Insist that a stage and those before it are done.

        Raises:
            BadInput: one is not, or an artifact was changed since.
        """
        for needed in STAGES[: STAGES.index(stage) + 1]:
            if not self.done(needed):
                if needed not in self.stages:
                    raise BadInput(f"{self.path}: `{needed}` is not done yet; run `samq-export {needed}` first")
                name = next(name for name, digest in self._digests(needed) if not self._holds(name, digest))
                state = "was changed" if (self.path / name).is_file() else "is missing"
                raise BadInput(
                    f"{self.path / name} {state} since `{needed}`; put it back or run `samq-export {needed}` again "
                    "(another config goes into a file of its own, given as --config)"
                )

    def record(self, stage: str, artifacts: Iterable[Path], **details: Any) -> None:
        """Note a finished stage in the manifest; later stages are no longer valid.

        A file belongs to the stage that wrote it last: `build` lowers again what `export --target` lowered, perhaps in
        other forms.
        """
        digests = {str(path.relative_to(self.path)): sha256_of(path) for path in sorted(artifacts)}
        before = {*self.superseded, *self._artifacts()}
        self.stages[stage] = {"artifacts": digests, **details}
        index = STAGES.index(stage)
        for earlier in STAGES[:index]:
            for name in digests:
                self.stages.get(earlier, {}).get("artifacts", {}).pop(name, None)
        for later in STAGES[index + 1 :]:
            self.stages.pop(later, None)
        self.superseded = tuple(sorted(before - self._artifacts()))
        self.save()

    def _artifacts(self) -> set[str]:
        return {name for stage in self.stages.values() for name in stage["artifacts"]}

    def save(self) -> None:
        """Write the manifest."""
        content = {"fingerprint": self.fingerprint, "job": self.job, "stages": self.stages}
        write_json(self.path / MANIFEST, content | ({"superseded": self.superseded} if self.superseded else {}))


@contextmanager
def alone_in(path: Path, *, reads: bool = False) -> Iterator[None]:
    """Let nobody else work in a directory who asks for it here, where its file system has locks; it is made if need be.

    Args:
        reads: what stages left there is only read, which others may do at the same time.

    Raises:
        UsageError: another one does.
    """
    with ExitStack() as stack:
        try:
            if not path.exists():
                path.mkdir(parents=True)
                stack.callback(_remove_empty, path, path.parent)
            stack.enter_context(locked(path, shared=reads, wait=False))
        except BlockingIOError as error:
            fix = "wait until it is done, or choose another --output-dir"
            raise UsageError(f"another samq-export works in {path}; {fix}") from error
        except OSError:
            pass  # a file, or nowhere to write: who writes there says so
        yield


@contextmanager
def open_alone(path: Path, *, reads: bool = False) -> Iterator[OutputDir]:
    """The output directory of an earlier run, with nobody else at work in it.

    Args:
        reads: as for `alone_in`.

    Raises:
        BadInput: as `OutputDir.open`.
        UsageError: as `alone_in`.
    """
    OutputDir.open(path)  # or a folder would be made where there is none
    with alone_in(path, reads=reads):
        yield OutputDir.open(path)  # as whoever was at work there left it


def _holds_more_than_a_search(path: Path) -> bool:
    """There is something in a directory without a manifest that `samq-export search` did not leave."""
    names = {entry.name for entry in path.iterdir()}
    return bool(names - {SEARCH, "report"} if SEARCH in names else names)


def _artifacts_in(path: Path) -> tuple[str, ...]:
    """What the manifest of a directory lists, or nothing where it is unreadable."""
    try:
        out = OutputDir.open(path)
    except BadInput:
        return ()
    return (*out.superseded, *sorted(out._artifacts()))


def _remove_leftovers(path: Path) -> None:
    """Remove what killed writes of samq left, and nothing else."""
    folders = [path / name for name in OURS if (path / name).is_dir()]
    leftovers = [file for folder in folders for file in temporaries(folder)]
    leftovers += [file for name in OURS for file in path.glob(f".{name}.*") if is_temporary(file)]
    for file in leftovers:
        removed(file)


def _remove_empty(folder: Path, root: Path) -> None:
    """Remove a folder and those above it, up to `root`, as far as they are empty."""
    while folder != root and folder.is_dir() and not any(folder.iterdir()):
        removed(folder)
        folder = folder.parent
