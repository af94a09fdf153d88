"""`samq-export place`: which blocks of an image encoder run in INT8 on this GPU, as measured.

Every block is built and timed alone in each form, blocks of one structure once. Its inputs are what the float encoder
computes before it for one image. A form is out of the question when the engine's output lies farther from the float
block's than its graph, computed on the CPU, explains: beyond that there is FP16's rounding, and otherwise an error.

Blocks alone do not tell all, for Q/DQ in one may cost another its fusions. So the whole encoder is built too, placed so
and in FP16, and every block stays in FP16 where that is as fast.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from samq.calib.parts import IMAGE_ENCODER
from samq.calib.processor import SamProcessor
from samq.calib.sources import take
from samq.engines import tensorrt
from samq.engines.tensorrt_plan import BuildOptions
from samq.errors import MachineLacks, SamqError, UsageError
from samq.export.placement import (
    MOST_EXACT_FIRST,
    RANKS,
    Figure,
    Figures,
    Form,
    Placement,
    Whole,
    all_in_fp16,
    fastest,
    is_faster,
    load_placement,
)
from samq.export.tensorrt_rewrites import REWRITES
from samq.export.tensorrt_targets import TensorRtTarget
from samq.quant.config import Recipe, load_recipe
from samq.tools.blocks import (
    Block,
    Values,
    build_block,
    float_tokens,
    lowered_blocks,
    lowered_encoder,
    on_cpu,
    run_block,
)
from samq.tools.job import Job, open_evaluation
from samq.tools.metrics import relative_error
from samq.tools.outdir import OutputDir
from samq.tools.progress import Reporter
from samq.tools.targets import target_at_hand

HALF_ERROR = 5e-3  # relative; what FP16 may do to the output of one block
MARGIN = 1.1  # codes that flip with the last bits of FP16 may add to the quantization's own error


class Seen(NamedTuple):
    """A block in one form: its name, the digest of what takes the same time, and the relative error of its graph."""

    name: str
    form: Form
    digest: str
    error: float


@dataclass(frozen=True)
class Place:
    """What to measure, and on what.

    Args:
        onnx: folder of the canonical parts, exported with static shapes.
        target: what the TensorRT at hand takes.
        gpu: the driver's name of the GPU.
        tensorrt: version of TensorRT.
        forms: to measure, "fp16" first.
        rewrites: of the graph, see `samq.export.tensorrt_rewrites`.
        options: of the builder.
        budget: see `samq.export.placement.fastest`.
        jobs: blocks built at once; each is timed with the GPU to itself.
    """

    onnx: Path
    target: TensorRtTarget
    gpu: str
    tensorrt: str
    forms: Sequence[Form]
    rewrites: Collection[str]
    options: BuildOptions
    budget: float = 0.0
    jobs: int = 1

    def run(self, pixels: NDArray[np.float32], path: Path, reporter: Reporter) -> Placement:
        """Measure what the file at `path` does not hold yet; what is measured stands there at once.

        Args:
            pixels: [1, 3, S, S], the image that the blocks see.

        Raises:
            UsageError: the file holds what was measured elsewhere.
            SamqError: a block cannot be built or run in FP16.
        """
        before = self._earlier(path)
        earlier = before.blocks
        known = {
            figure.structure: figure
            for forms in earlier.values()
            for figure in forms.values()
            if figure.milliseconds is not None
        }
        values = float_tokens(self.onnx, pixels)
        seen: list[Seen] = []
        for form in self.forms:
            blocks = [
                (block, relative_error(on_cpu(block.graph, values), values[block.output]))
                for block in lowered_blocks(self.onnx, self.target, form, self.rewrites, self.options)
            ]
            seen += [Seen(block.name, form, block.digest, error) for block, error in blocks]
            new: dict[str, tuple[Block, float]] = {}
            for block, error in blocks:
                if block.digest not in known:
                    new.setdefault(block.digest, (block, error))
            for block, figure in self._measured(list(new.values()), form, values):
                known[block.digest] = figure
                reporter.say(f"{block.name} {form}: {told(figure)}")
                self._save(figures_of(seen, known), earlier, before.whole, path)
        found = figures_of(seen, known)
        for name, figures in found.items():
            if figures["fp16"].refused:
                reporter.warn(f"{name} computes something else in FP16: {figures['fp16'].refused}")
        kept = {name: forms for name, forms in earlier.items() if name in found}
        placement = self._save(found, kept, before.whole, path)
        if set(placement.layers.values()) == {"fp16"}:
            return placement
        return self._proven(placement, values, path, reporter)

    def _proven(self, placement: Placement, values: Values, path: Path, reporter: Reporter) -> Placement:
        """What the whole encoder says of a placement; every block in FP16 where it is not faster so.

        Args:
            placement: with the figures of whole encoders that are known.

        Raises:
            SamqError: it cannot be built or run in FP16.
        """
        half, whole = all_in_fp16(placement), dict(placement.whole)
        forms: dict[Literal["fp16", "placed"], Placement] = {"fp16": half, "placed": placement}
        with reporter.track("the whole encoder", len(forms)) as step:
            for name, form in forms.items():
                encoder = lowered_encoder(self.onnx, self.target, form, self.rewrites, self.options)
                before = whole.get(name)
                if before is None or before.milliseconds is None or before.structure != encoder.digest:
                    whole[name] = _figure_of_whole(encoder, values, must=name == "fp16")
                reporter.say(f"whole encoder {name}: {told(whole[name])}")
                half.model_copy(update={"whole": whole}).save(path)
                step()
        chosen, built = half, whole["placed"].milliseconds is not None
        if built and is_faster(whole["placed"], whole["fp16"]):
            chosen = placement
        else:
            why = "is not faster so than in FP16" if built else "cannot be built so"
            reporter.warn(f"the whole encoder {why}: every block is placed in FP16")
        chosen = chosen.model_copy(update={"whole": whole})
        chosen.save(path)
        return chosen

    def _save(self, found: Figures, earlier: Figures, whole: Whole, path: Path) -> Placement:
        """Write all that was measured; every block is in FP16 there until the whole encoder has spoken.

        Args:
            earlier: what the file held, other forms among it.
            whole: what is known of whole encoders.

        Returns:
            The fastest of what this run is about.
        """
        kept = {name: {**earlier.get(name, {}), **found.get(name, {})} for name in earlier | found}
        placement = fastest(found, self.gpu, self.tensorrt, self.budget)
        placement = placement.model_copy(update={"blocks": kept, "whole": whole})
        all_in_fp16(placement).save(path)
        return placement

    def _measured(
        self, blocks: Sequence[tuple[Block, float]], form: Form, values: Values
    ) -> Iterator[tuple[Block, Figure]]:
        """Figures of blocks: as many as `jobs` are built at once, and then timed one after the other.

        Args:
            blocks: each with the relative error of what its graph computes.

        Raises:
            SamqError: one fails in FP16, without which there is nothing to compare with.
        """
        for start in range(0, len(blocks), self.jobs):
            batch = blocks[start : start + self.jobs]
            with tempfile.TemporaryDirectory() as folder:
                plans = self._plans([block for block, _ in batch], Path(folder))
                for (block, error), plan in zip(batch, plans, strict=True):
                    yield block, _figure(block, plan, form, values, error)

    def _plans(self, blocks: Sequence[Block], folder: Path) -> list[Callable[[], Path]]:
        """For each block what gives its plan, or raises what its build raised.

        A build that failed for what others took of the machine is done again alone. What TensorRT times beside other
        builds is not kept for later ones.
        """
        alone: list[Callable[[], Path]] = [
            partial(build_block, block, folder, tensorrt.build_engine) for block in blocks
        ]
        if self.jobs == 1:
            return alone
        with ThreadPoolExecutor(self.jobs) as pool:
            beside = [replace(block, options=replace(block.options, timing_cache=None)) for block in blocks]
            futures = [pool.submit(build_block, block, folder, tensorrt.build_apart) for block in beside]
        return [
            once_more if isinstance(future.exception(), MachineLacks) else future.result
            for future, once_more in zip(futures, alone, strict=True)
        ]

    def _earlier(self, path: Path) -> Placement:
        """What the file holds.

        Raises:
            UsageError: it was measured elsewhere, or is no placement.
        """
        if not path.exists():
            return Placement()
        placement = load_placement(path)
        if (placement.gpu, placement.tensorrt) != (self.gpu, self.tensorrt):
            measured = f"{placement.gpu or 'an unknown GPU'} with TensorRT {placement.tensorrt or 'unknown'}"
            raise UsageError(f"{path} was measured on {measured}; give another file as --out")
        return placement


def place(
    out: OutputDir,
    path: Path,
    reporter: Reporter,
    *,
    forms: Collection[Form] = (),
    without: Collection[str] = (),
    options: BuildOptions | None = None,
    budget: float = 0.0,
    jobs: int = 1,
    eval_data: str | None = None,
) -> Placement:
    """Measure the blocks of an exported job on the GPU at hand.

    Args:
        path: the placement's file; what it holds already is not measured again.
        forms: to measure, none for all that differ for the job's recipe.
        without: rewrites to leave out, to see what they gain.
        jobs: blocks built at once.
        eval_data: where to take the image from, None for the job's own evaluation or calibration images.

    Raises:
        UsageError: the job was exported with dynamic shapes, or an option does not fit.
        MachineLacks: there is no GPU or no TensorRT.
        BadInput: the job is not exported, its images cannot be read, or TensorRT cannot build a block in FP16.
    """
    out.require("export")
    unknown = ", ".join(sorted(set(without) - set(REWRITES)))
    if unknown:
        raise UsageError(f"{unknown}: no rewrite of the graph; choose from {', '.join(REWRITES)}")
    rewrites = [name for name in REWRITES if name not in without]
    size = _image_size(out)
    recipe = load_recipe(str(out.path / "config.yaml"))
    chosen = forms_for(recipe, forms, budget)
    target = target_at_hand()
    version, gpu = tensorrt.about()
    options = options or BuildOptions()
    work = Place(out.path / "onnx", target, gpu.name, version, chosen, rewrites, options, budget, jobs)
    return work.run(_image(out, recipe, eval_data, size), path, reporter)


def _image_size(out: OutputDir) -> int:
    """Side of the encoder's input in pixels.

    Raises:
        UsageError: the encoder was exported with dynamic shapes.
    """
    (pixels,) = ir.load(out.path / "onnx" / f"{IMAGE_ENCODER}.onnx").graph.inputs
    sides = [] if pixels.shape is None else [side for side in pixels.shape if isinstance(side, int)]
    if len(sides) != 4:
        raise UsageError(
            f"{out.path} was exported with dynamic shapes, and blocks are measured with static ones; "
            "run `samq-export export --target trt8` (trt10, trt11) first"
        )
    return sides[-1]


def _image(out: OutputDir, recipe: Recipe, eval_data: str | None, size: int) -> NDArray[np.float32]:
    """Pixels [1, 3, S, S] of one of the job's images.

    Raises:
        UsageError: it has none.
        BadInput: they cannot be read.
    """
    job = Job.from_json(out.job)
    if eval_data is not None:
        job = replace(job, eval_data=eval_data)
    data = open_evaluation(job, recipe, out.detail("quantize", "calibration_fingerprint"))
    source = data.calibration if data.evaluation is None else data.evaluation
    if source is None:
        raise UsageError(f"the blocks need an image to work on, and there are none: {data.origin}")
    processor = SamProcessor.from_checkpoint(out.path / "weights", size)
    (sample,) = take(source, 1, job.seed)
    return processor(sample.image).pixel_values[None]


def figures_of(seen: Iterable[Seen], known: Mapping[str, Figure]) -> Figures:
    """What is known of blocks, by digest, each with an error of its own."""
    blocks: Figures = {}
    for block in seen:
        if block.digest in known:
            own = known[block.digest].model_copy(update={"error": float(f"{block.error:.3g}")})
            blocks.setdefault(block.name, {})[block.form] = own
    return blocks


def forms_for(recipe: Recipe, asked: Collection[Form] = (), budget: float = 0.0) -> list[Form]:
    """The forms to measure for a recipe: those asked for, or all that differ but mlp; FP16 always, and first.

    Args:
        budget: see `samq.export.placement.fastest`; without one, no branch is narrowed unasked.

    Raises:
        UsageError: one that was asked for does not exist for the recipe.
    """
    has_branches = any(own.wgts.low_rank is not None for own in recipe.variants()) and not recipe.weight_only
    possible: tuple[Form, ...] = ("fp16", "mlp", "branch", *RANKS, "fold") if has_branches else ("fp16", "mlp", "int8")
    wrong = ", ".join(sorted(set(asked) - set(possible)))
    if wrong:
        kind = "with" if has_branches else "without"
        raise UsageError(f"{wrong}: the forms of a recipe {kind} low-rank branches are {', '.join(possible)}")
    chosen = set(asked) or {*possible} - {"mlp"} - ({*RANKS} if budget == 0 else set())
    return [form for form in possible if form == "fp16" or form in chosen]


def told(figure: Figure) -> str:
    """A figure in words."""
    if figure.milliseconds is None:
        return f"not built: {figure.refused}"
    return f"{figure.milliseconds:.4f} ms" + (f", refused: {figure.refused}" if figure.refused else "")


def table(placement: Placement) -> list[str]:
    """A Markdown table: milliseconds and error of each block in each form, and the form chosen; and the whole encoder.

    Where there are branches, also what each is worth over folding all of it: the squared error that it removes a
    microsecond, times 10⁶.
    """
    forms = [form for form in MOST_EXACT_FIRST if any(form in figures for figures in placement.blocks.values())]
    branches = [form for form in forms if form in ("branch", *RANKS)] if "fold" in forms else []
    worth = [f"{form}, error² · 10⁶ / µs" for form in branches]
    rows = [["block", *(f"{form}, ms (error)" for form in forms), *worth, "chosen"]]
    rows.append(["---"] * len(rows[0]))
    for block, figures in placement.blocks.items():
        cells = [_cell(figures.get(form)) for form in forms] + [_worth(figures, form) for form in branches]
        rows.append([block, *cells, placement.form_of_block(f"{block}.")])
    whole = [f"Whole encoder {name}: {told(figure)}." for name, figure in placement.whole.items()]
    return [*(f"| {' | '.join(row)} |" for row in rows), *([""] if whole else []), *whole]


def _worth(figures: Mapping[Form, Figure], form: Form) -> str:
    branch, fold = figures.get(form), figures.get("fold")
    if branch is None or fold is None or branch.structure == fold.structure:
        return ""
    if branch.milliseconds is None or fold.milliseconds is None or branch.error is None or fold.error is None:
        return ""
    microseconds = 1e3 * (branch.milliseconds - fold.milliseconds)
    return f"{1e6 * (fold.error**2 - branch.error**2) / microseconds:.3g}" if microseconds > 0 else "free"


def _cell(figure: Figure | None) -> str:
    if figure is None or figure.milliseconds is None:
        return "fails" if figure else ""
    return f"{figure.milliseconds:.4f} ({figure.error:.2g})" + (" refused" if figure.refused else "")


def _figure_of_whole(encoder: Block, values: Values, *, must: bool) -> Figure:
    """Time of a whole encoder, or why there is none.

    Raises:
        SamqError: it fails, and must not.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = run_block(encoder, build_block(encoder, Path(folder), tensorrt.build_engine), values)
        except SamqError as failure:
            if must:
                raise
            return Figure(refused=str(failure), structure=encoder.digest)
    return Figure(milliseconds=round(found.median, 4), spread=round(found.spread, 4), structure=encoder.digest)


def _figure(block: Block, plan: Callable[[], Path], form: Form, values: Values, error: float) -> Figure:
    """Time of a block, or why there is none.

    Args:
        plan: gives the block's plan, or raises what its build raised.
        error: relative error of what the block's graph computes.

    Raises:
        SamqError: it fails in FP16, without which there is nothing to compare with.
    """
    try:
        found = run_block(block, plan(), values)
    except SamqError as failure:
        if form == "fp16":
            raise
        return Figure(refused=str(failure), structure=block.digest)
    executed, most = relative_error(found.output, values[block.output]), MARGIN * error + HALF_ERROR
    fits = executed <= most  # which NaN is not
    return Figure(
        milliseconds=round(found.median, 4),
        spread=round(found.spread, 4),
        refused="" if fits else f"its error is {executed:.3g}, and quantization explains {most:.3g}",
        structure=block.digest,
    )
