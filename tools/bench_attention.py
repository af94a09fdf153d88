"""What integer queries and keys would cost the mask decoder, whose attention samq leaves in floating point.

    python -m samq.tools.bench_attention [--models demo hostile] [--scenes 50] [--calibration 16]

rounds the queries and the keys of all attentions of the decoder while a float model runs in PyTorch, and prints one
table. Each projection has one static grid for all that it puts out, found on calibration images, as far as
    max        the values reach
    99.99 %    of them do, or 99.9 %
    mse        makes the least error (all of these: `samq.quant.calibrators`)
It has a zero-point; without, as TensorRT has it, is "symmetric". "folded" is behind the sign fold of `samq.quant.signs`
in those attentions whose keys are bimodal, and left out where none are. FP16 rounds as engines for GPUs do. Weights,
other activations and the products themselves stay FP32, so such an attention would lose at least this.

box, click: mIoU / that of the float demo model, with a 95 % bootstrap interval over held-out scenes. agreement: mean
IoU of all masks with the float demo model's. fold gains: agreement over the row before, paired by scenes. The hostile
model computes what the demo model does, and is held against that, too.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch
from torch import Tensor
from transformers import Sam2Model

from samq.calib.calibrate import run_images
from samq.calib.checkpoint import load_checkpoint
from samq.calib.histogram import Histogram
from samq.calib.sources import open_source, take
from samq.quant.calibrators import Range, mse_range, percentile_range, whole_range
from samq.quant.config import USUAL_PERCENTILE
from samq.quant.grids import Grid, Scales, round_to_grid
from samq.quant.scales import choose_scales
from samq.quant.signs import bimodal_signs, decoder_attentions, fold_signs
from samq.tools.arguments import count
from samq.tools.bench_accuracy.bootstrap import ratio
from samq.tools.bench_accuracy.method import DEMO, MODELS
from samq.tools.bench_accuracy.scenes import (
    AGREEMENT,
    MEASURES,
    PackedMasks,
    Scene,
    Scores,
    masks_of,
    read_scenes,
    score,
)
from samq.tools.demo.dataset import CALIBRATION_IMAGES, CHECKPOINT, HELD_OUT, IMAGES, SCENES
from samq.tools.demo.hostile import Listener, hearing, make_hostile, projections
from samq.tools.markdown_table import line, table
from samq.tools.simulation import torch_predictor

NONE = "—"
HEADER = ("model", "queries and keys", "range", "folded", *MEASURES, "fold gains")
MAX, MSE = "max", "mse"
PERCENTILES = {f"{percentile} %": percentile for percentile in (USUAL_PERCENTILE, 99.9)}
ENDS = (MAX, *PERCENTILES, MSE)
FORMS = ((Grid(8, signed=True), MAX), *product((Grid(8, signed=False), Grid(4, signed=False)), ENDS))


class Exam:
    """Held-out scenes, and how a model answers that is right by definition.

    Args:
        model: float; not changed.
        scenes: with prompts and true masks.
    """

    def __init__(self, model: Sam2Model, scenes: Sequence[Scene]) -> None:
        predictor = torch_predictor(model)
        self._scenes = scenes
        self._baseline = PackedMasks(masks_of(predictor, scene) for scene in scenes)
        self._exact = score(self._baseline, self._baseline, scenes)

    def scores(self, model: Sam2Model, listeners: Mapping[str, Listener]) -> Scores:
        """What a model is worth while listeners change what its projections put out."""
        predictor = torch_predictor(model)
        with hearing(projections(model), listeners):
            return score((masks_of(predictor, scene) for scene in self._scenes), self._baseline, self._scenes)

    def cells(self, scores: Scores, unfolded: Scores | None) -> list[str]:
        """The measures of a row, and how much more it agrees than the one without the fold."""
        shown = [_shown(scores[measure], self._exact[measure]) for measure in MEASURES]
        if unfolded is None:
            return [*shown, NONE]
        gains = [after - before for after, before in zip(scores[AGREEMENT], unfolded[AGREEMENT], strict=True)]
        return [*shown, _shown(gains, self._exact[AGREEMENT], "+.4f")]


@dataclass(frozen=True)
class Calibrated:
    """A model, and what its projections put out on the calibration images.

    Args:
        model: float.
        histograms: by the name of the projection.
    """

    model: Sam2Model
    histograms: Mapping[str, Histogram]

    def rounding(self, grid: Grid, ends: str) -> dict[str, Listener]:
        """For each projection, what rounds its outputs."""
        return {
            name: partial(rounded, grid=grid, scales=scales_of(grid, ends_of(histogram, grid, ends)))
            for name, histogram in self.histograms.items()
        }


def main(arguments: list[str] | None = None) -> int:
    """Print the table; returns 0."""
    parser = argparse.ArgumentParser(
        prog="bench_attention", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--scenes", type=count(SCENES), default=50, help="held-out scenes (default: %(default)s)")
    parser.add_argument(
        "--calibration", type=count(CALIBRATION_IMAGES), default=16, help="images (default: %(default)s)"
    )
    given = parser.parse_args(arguments)
    checkpoint = load_checkpoint(str(CHECKPOINT))
    images = take(open_source(IMAGES), given.calibration)
    pixels = [torch.from_numpy(checkpoint.processor(sample.image).pixel_values)[None] for sample in images]
    exam = Exam(checkpoint.model, read_scenes(open_source(HELD_OUT), checkpoint.processor, given.scenes))
    print(table(HEADER, []), end="")
    for name in given.models:
        model = checkpoint.model if name == DEMO else make_hostile(checkpoint.model)
        for cells in rows(model, pixels, exam):
            print(line([name, *cells]), flush=True)
    return 0


def rows(model: Sam2Model, pixels: Sequence[Tensor], exam: Exam) -> Iterator[list[str]]:
    """The rows of a model, as they are measured.

    Args:
        pixels: calibration images, each [1, 3, S, S].
    """
    names = projections(model)
    for title, listener in (("FP32", _as_it_is), ("FP16", _in_half)):
        yield [title, NONE, NONE, *exam.cells(exam.scores(model, dict.fromkeys(names, listener)), None)]
    plain, (folded, folds) = calibrated(model, pixels), with_signs_folded(model, pixels)
    behind_fold = calibrated(folded, pixels)
    for grid, ends in FORMS:
        title = f"INT{grid.bits}{', symmetric' if grid.signed else ''}"
        scores = exam.scores(model, plain.rounding(grid, ends))
        yield [title, ends, NONE, *exam.cells(scores, None)]
        if folds:
            shown = exam.cells(exam.scores(folded, behind_fold.rounding(grid, ends)), scores)
            yield [title, ends, f"{folds} of {len(decoder_attentions(model))}", *shown]


@torch.no_grad()
def calibrated(model: Sam2Model, pixels: Sequence[Tensor]) -> Calibrated:
    """Count what the projections of a model put out on images."""
    histograms = {name: Histogram() for name in projections(model)}
    with hearing(projections(model), {name: histogram.add for name, histogram in histograms.items()}):
        run_images(model, pixels, with_decoder=True)
    return Calibrated(model, histograms)


@torch.no_grad()
def with_signs_folded(model: Sam2Model, pixels: Sequence[Tensor]) -> tuple[Sam2Model, int]:
    """A copy with the sign fold in those attentions, and their number, whose keys of the first image are bimodal."""
    folded, folds = copy.deepcopy(model), 0
    attentions = decoder_attentions(folded)
    keys: dict[str, list[Tensor]] = {name: [] for name in attentions}
    layers = {name: attention.k_proj for name, attention in attentions.items()}
    with hearing(layers, {name: heard.append for name, heard in keys.items()}):
        run_images(folded, pixels[:1], with_decoder=True)
    for name, attention in attentions.items():
        signs = bimodal_signs(torch.cat([heard.flatten(0, -2) for heard in keys[name]]))
        fold_signs(attention, signs)
        folds += bool((signs < 0).any())
    return folded, folds


def ends_of(histogram: Histogram, grid: Grid, ends: str) -> Range:
    """How far a projection's grid reaches, by one of ENDS."""
    if ends in PERCENTILES:
        return percentile_range(histogram, PERCENTILES[ends], symmetric=grid.signed)
    if ends == MSE:
        return mse_range(histogram, lambda candidate: _step(grid, scales_of(grid, candidate)))
    return whole_range(histogram)


def scales_of(grid: Grid, ends: Range) -> Scales:
    """One scale, and a zero-point unless the grid is signed, with which it reaches from end to end."""
    return choose_scales(torch.tensor([ends]), grid, group_size=2, norm=None)


def rounded(x: Tensor, grid: Grid, scales: Scales) -> Tensor:
    """Quantize and dequantize a tensor of any shape, all of it with one scale."""
    whole = replace(scales, group_size=x.numel())
    return round_to_grid(x.reshape(1, -1), whole, grid).dequantize().view(x.shape)


def _step(grid: Grid, scales: Scales) -> tuple[float, float, float]:
    """Scale, lowest and highest multiple of it."""
    zero_point = 0.0 if scales.zero_point is None else float(scales.zero_point)
    return float(scales.scale), grid.qmin - zero_point, grid.qmax - zero_point


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _in_half(x: Tensor) -> Tensor:
    return x.half().float()


def _shown(above: Sequence[float], below: Sequence[float], form: str = ".4f") -> str:
    estimate = ratio(above, below)
    return f"{estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"


if __name__ == "__main__":
    sys.exit(main())
