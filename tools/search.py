"""`samq-export search`: a form for each layer, under a budget of bytes or a least relative mIoU.

1. Every quantized layer's effect on the masks, alone in each form (`samq.quant.sensitivity`), on calibration images.
2. The configurations that lose least for their bytes, if effects add up (`samq.tools.search_front`).
3. Some of them, the config itself and each form everywhere are really quantized and measured on evaluation images.

Everything measured stands in `search/search.json` at once; the same command goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr  # type: ignore[import-untyped]
from torch import Tensor

from samq.calib.checkpoint import Checkpoint
from samq.calib.sources import ImageSource, take
from samq.errors import AccuracyGateMissed, BadInput, UsageError
from samq.files import sha256_of, write_json, write_text
from samq.quant.config import Recipe
from samq.quant.plan import LayerPlan, make_plan, require_layers
from samq.quant.quantize import Quantized, quantize
from samq.quant.sensitivity import layer_effects
from samq.tools.evaluate import evaluate
from samq.tools.job import Data, Job, fingerprint
from samq.tools.outdir import MANIFEST, SEARCH, OutputDir
from samq.tools.progress import Reporter
from samq.tools.report.page import report_page
from samq.tools.report.pareto import FILE as PARETO
from samq.tools.report.reading import FOLDER as REPORT_FOLDER
from samq.tools.report.reading import REPORT
from samq.tools.report.writing import PAGE
from samq.tools.search_forms import FLOAT, check_candidates, recipe_of, uniform
from samq.tools.search_front import Choice, Option, front_of, within
from samq.tools.search_measure import Accuracy, accuracy_of
from samq.tools.search_plot import front_as_svg
from samq.tools.simulation import torch_predictor
from samq.tools.stages import pixel_batches

STATE, BEST, PLOT = "search.json", "best.yaml", "pareto.svg"
MIX = "mix-"  # what configurations of the front are called, followed by their bytes
GRID = 17  # configurations of the front among which a least accuracy is sought, evenly spaced in bytes


@dataclass(frozen=True)
class Goal:
    """What is sought: one of the two.

    Args:
        max_bytes: of all weights of the model, as `--dry-run` counts them.
        least: relative mIoU; without annotations, agreement with the float model's masks.
    """

    max_bytes: int | None
    least: float | None


@dataclass(frozen=True)
class Asked:
    """A search.

    Args:
        job: model, data and seed.
        name: of the config.
        base: the config itself.
        candidates: forms, see `samq.tools.search_forms`.
        goal: what is sought.
        images: calibration images on which effects are measured.
        points: configurations of the front to measure, besides those that the goal needs.
    """

    job: Job
    name: str
    base: Recipe
    candidates: Sequence[str]
    goal: Goal
    images: int
    points: int


class State:
    """What was measured so far, on disk at any time."""

    def __init__(self, path: Path, mark: str, content: dict[str, Any]) -> None:
        self.path, self.mark = path, mark
        self.effects: dict[str, dict[str, dict[str, float]]] = content.get("effects", {})
        self.measured: dict[str, dict[str, Any]] = content.get("measured", {})

    @staticmethod
    def open(path: Path, mark: str, force: bool) -> State:
        """What an earlier search of the same kind left, or nothing.

        Args:
            mark: of checkpoint, config, data and code.
            force: start anew where another search left something.

        Raises:
            UsageError: another search did, and `force` is not given.
        """
        if not path.is_file():
            return State(path, mark, {})
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["fingerprint"] == mark:
                return State(path, mark, content)
        except (OSError, ValueError, KeyError, TypeError) as error:
            if not force:
                raise BadInput(f"{path} is unreadable ({error!r}); search again with --force") from error
        if not force:
            raise UsageError(
                f"{path} holds another search (config, checkpoint, data or version differ); "
                "choose another --output-dir or start anew with --force"
            )
        return State(path, mark, {})

    def save(self) -> None:
        """Write all of it."""
        write_json(self.path, {"fingerprint": self.mark, "effects": self.effects, "measured": self.measured})


def search(
    out: Path, asked: Asked, checkpoint: Checkpoint, data: Data, reporter: Reporter, force: bool
) -> dict[str, Any]:
    """Search, and write `search/` and `report/pareto.*`; returns what was found.

    Raises:
        UsageError: the search cannot be made, or the budget is too small for any configuration.
        AccuracyGateMissed: no configuration is accurate enough.
    """
    check_candidates(asked.candidates, asked.base)
    require_layers(make_plan(checkpoint.model, asked.base, asked.job.parts))
    if data.calibration is None:
        raise UsageError(
            f"a search measures on calibration images, which {asked.name} does not use; take a GPTQ preset"
        )
    if data.evaluation is None:
        raise UsageError(f"a search needs evaluation images: evaluation data is {data.origin}")
    state = State.open(out / SEARCH / STATE, _mark(asked, checkpoint, data), force)
    return _Searching(out, asked, checkpoint, data.calibration, data.evaluation, state, reporter).run()


def _mark(asked: Asked, checkpoint: Checkpoint, data: Data) -> str:
    """Hex digest of what decides effects and figures; goals and candidates are not among it."""
    evaluation = None if data.evaluation is None else data.evaluation.fingerprint()
    job = fingerprint(asked.job, asked.base, checkpoint.fingerprint, data)
    decisive = [job, evaluation, asked.job.num_eval_samples, asked.images]
    return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()


@dataclass(frozen=True)
class Point:
    """One configuration that was measured.

    Args:
        config: its name.
        recipe: the configuration.
        bytes: of all weights of the model.
        loss: what the effects of its layers add up to; None where a layer's form was not among the candidates.
        accuracy: of its masks.
    """

    config: str
    recipe: Recipe
    bytes: int
    loss: float | None
    accuracy: Accuracy

    def as_json(self) -> dict[str, Any]:
        """Its figures."""
        return {"config": self.config, "bytes": self.bytes, "loss": self.loss, **asdict(self.accuracy)}


@dataclass(frozen=True)
class _Searching:
    out: Path
    asked: Asked
    checkpoint: Checkpoint
    calibration: ImageSource
    evaluation: ImageSource
    state: State
    reporter: Reporter

    def run(self) -> dict[str, Any]:
        layers, sizes, rest = self._sizes()
        self._require_room(sizes, rest)
        options = self._options(layers, sizes)
        front = [choice for choice in front_of(options) if set(choice.forms.values()) != {FLOAT}]
        goal, base = self.asked.goal, self.asked.base
        largest = max(sum(of_layers.values()) for form, of_layers in sizes.items() if form != FLOAT)
        chosen = _spread([choice for choice in front if choice.bytes <= largest], self.asked.points)
        if goal.max_bytes is not None:
            budget = within(options, goal.max_bytes - rest)
            if budget is not None and set(budget.forms.values()) != {FLOAT}:
                chosen.append(budget)
        points = [self._measured(self.asked.name, base, None)]
        for form in self.asked.candidates:
            if form != FLOAT:
                loss = sum(option.loss for of_layer in options.values() for option in of_layer if option.form == form)
                points.append(self._measured(form, uniform(base, form), loss))
        points += [self._mix(choice, rest) for choice in chosen]
        if goal.least is not None:
            points += self._bisected(_spread(front, GRID), rest, goal.least)
        return self._finish(list({point.recipe.to_yaml(): point for point in reversed(points)}.values())[::-1])

    def _sizes(self) -> tuple[list[str], dict[str, dict[str, int]], int]:
        """The layers to decide about; form → layer → bytes; and the bytes of all other layers."""
        base = {plan.name: plan for plan in self._plans(self.asked.base)}
        layers = [name for name, plan in base.items() if plan.skip is None]
        sizes = {}
        for form in self.asked.candidates:
            if form == FLOAT:
                sizes[form] = {name: base[name].fp16_bytes for name in layers}
            else:
                plans = self._plans(uniform(self.asked.base, form))
                sizes[form] = {plan.name: plan.planned_bytes for plan in plans if plan.skip is None}
        return layers, sizes, sum(plan.planned_bytes for plan in base.values() if plan.skip is not None)

    def _require_room(self, sizes: dict[str, dict[str, int]], rest: int) -> None:
        """Insist that the budget has room for the smallest configuration, before anything is measured.

        Raises:
            UsageError: it has not.
        """
        budget = self.asked.goal.max_bytes
        least = rest + sum(map(min, zip(*(of_layers.values() for of_layers in sizes.values()), strict=True)))
        if budget is not None and budget < least:
            raise UsageError(f"--max-bytes {budget}: the smallest of these configurations takes {least}")

    def _options(self, layers: list[str], sizes: dict[str, dict[str, int]]) -> dict[str, list[Option]]:
        """The options of each layer."""
        options: dict[str, list[Option]] = {name: [] for name in layers}
        for form, of_layers in sizes.items():
            losses = dict.fromkeys(layers, 0.0) if form == FLOAT else self._effects(form, layers)
            for name in layers:
                options[name].append(Option(form, of_layers[name], losses[name]))
        return options

    def _plans(self, recipe: Recipe) -> list[LayerPlan]:
        return make_plan(self.checkpoint.model, recipe, self.asked.job.parts)

    def _effects(self, form: str, layers: list[str]) -> dict[str, float]:
        """The loss of each layer in one form; from the state where it is known."""
        if form not in self.state.effects:
            recipe = uniform(self.asked.base, form)
            made = self._quantized(form, recipe)
            count = min(self.asked.images, len(self.calibration))
            with self.reporter.track(f"effect of {len(layers)} layers as {form}", count * len(layers)) as step:
                found = layer_effects(self.checkpoint.model, made, layers, self._pixels(count, 1), step)
            self.state.effects[form] = {name: asdict(effect) for name, effect in found.items()}
            self.state.save()
            self._accuracy(form, recipe, made)
        return {name: effect["loss"] for name, effect in self.state.effects[form].items()}

    def _quantized(self, name: str, recipe: Recipe) -> Quantized:
        torch.manual_seed(self.asked.job.seed)
        count = min(recipe.calib.num_samples, len(self.calibration))
        steps = -(-count // recipe.calib.batch_size) + sum(plan.skip is None for plan in self._plans(recipe))
        with self.reporter.track(f"quantize {name} on {count} images", steps) as step:
            batches = self._pixels(count, recipe.calib.batch_size)
            return quantize(self.checkpoint.model, recipe, batches, self.asked.job.parts, lambda _: step())

    def _pixels(self, count: int, size: int) -> Iterator[Tensor]:
        return pixel_batches(self.calibration, self.checkpoint.processor, count, size, self.asked.job.seed, [])

    def _mix(self, choice: Choice, rest: int) -> Point:
        name = f"{MIX}{choice.bytes + rest}"
        point = self._measured(name, recipe_of(self.asked.base, choice.forms), choice.loss)
        write_text(self.out / SEARCH / f"{name}.yaml", point.recipe.to_yaml())
        return point

    def _measured(self, name: str, recipe: Recipe, loss: float | None) -> Point:
        """Figures of one configuration."""
        size = sum(plan.planned_bytes for plan in self._plans(recipe))
        return Point(name, recipe, size, loss, self._accuracy(name, recipe))

    def _accuracy(self, name: str, recipe: Recipe, made: Quantized | None = None) -> Accuracy:
        """The accuracy of one configuration; from the state where it is known.

        Args:
            made: what it made of the model, where that is at hand.
        """
        key = hashlib.sha256(recipe.to_yaml().encode()).hexdigest()
        if key not in self.state.measured:
            made = made or self._quantized(name, recipe)
            count = min(self.asked.job.num_eval_samples, len(self.evaluation))
            with self.reporter.track(f"masks of {name}, {count} images", count) as step:
                samples = take(self.evaluation, count, self.asked.job.seed)
                models = torch_predictor(self.checkpoint.model), torch_predictor(made.model)
                records = evaluate(*models, samples, self.checkpoint.processor, step)
            if not records:
                raise BadInput(f"{self.evaluation.description} brings no prompt; give other --eval-data")
            self.state.measured[key] = asdict(accuracy_of(records))
            self.state.save()
        return Accuracy(**self.state.measured[key])

    def _bisected(self, front: list[Choice], rest: int, least: float) -> list[Point]:
        """What was measured on the way to the smallest configuration that is accurate enough."""
        low, high, found = 0, len(front), []
        while low < high:
            middle = (low + high) // 2
            found.append(self._mix(front[middle], rest))
            if found[-1].accuracy.miou_relative >= least:
                high = middle
            else:
                low = middle + 1
        return found

    def _finish(self, points: list[Point]) -> dict[str, Any]:
        """Write what was found.

        Raises:
            AccuracyGateMissed: nothing is accurate enough; the front is written all the same.
        """
        goal = self.asked.goal
        best = _best(points, goal)
        figures = [point.as_json() for point in points]
        report = self.out / REPORT_FOLDER
        tried = [{key: point[key] for key in ("config", "bytes", "miou_relative")} for point in figures]
        write_json(report / PARETO, {"points": tried})
        write_text(report / PLOT, front_as_svg(figures, None if best is None else best.config))
        _refresh_page(self.out)
        if best is None:
            nearest = max(points, key=lambda point: point.accuracy.miou_relative)
            raise AccuracyGateMissed(
                f"relative mIoU is {nearest.accuracy.miou_relative:.4f} at most ({nearest.config}), "
                f"below --min-relative-miou {goal.least}"
            )
        path = self.out / SEARCH / BEST
        write_text(path, best.recipe.to_yaml())
        return {
            "best": best.as_json(),
            "config": str(path),
            "points": figures,
            "rank_correlation": self._rank_correlation(),
        }

    def _rank_correlation(self) -> float | None:
        """Spearman's, of the soft masks' distances with what the hard masks lose, over all layers and forms."""
        effects = [effect for of_layers in self.state.effects.values() for effect in of_layers.values()]
        correlation = spearmanr(*([effect[key] for effect in effects] for key in ("loss", "disagreement"))).statistic
        return None if math.isnan(correlation) else round(float(correlation), 4)


def _best(points: list[Point], goal: Goal) -> Point | None:
    """The smallest one that is accurate enough, or the one within the budget that agrees best; None if none is.

    Agreement with the float model's masks decides there, for a few images tell it with less noise than mIoU.
    """
    if goal.least is not None:
        enough = [point for point in points if point.accuracy.miou_relative >= goal.least]
        return min(enough, key=lambda point: (point.bytes, -point.accuracy.miou_relative), default=None)
    assert goal.max_bytes is not None
    fitting = [point for point in points if point.bytes <= goal.max_bytes]
    return max(fitting, key=lambda point: point.accuracy.agreement)


def _spread(front: Sequence[Choice], count: int) -> list[Choice]:
    """At most `count` configurations of a front, both ends among them, evenly spaced in bytes."""
    first, last = front[0].bytes, front[-1].bytes
    wanted = [first + (last - first) * index / max(1, count - 1) for index in range(count)]
    nearest = [min(front, key=lambda choice: abs(choice.bytes - size)) for size in wanted]
    return list({choice.bytes: choice for choice in nearest}.values())


def _refresh_page(out: Path) -> None:
    """Show the search in the report, where there is one; the manifest knows the new page."""
    page = out / REPORT_FOLDER / PAGE
    if not (out / REPORT_FOLDER / REPORT).is_file() or not (out / MANIFEST).is_file():
        return
    write_text(page, report_page(out))
    job = OutputDir.open(out)
    for stage in job.stages.values():
        name = str(page.relative_to(out))
        if name in stage["artifacts"]:
            stage["artifacts"][name] = sha256_of(page)
    job.save()


def as_text(found: dict[str, Any]) -> str:
    """What was found, as a table for a terminal."""
    lines = [f"{'config':<20} {'bytes':>12} {'relative mIoU':>22} {'agreement':>10}"]
    for point in sorted(found["points"], key=lambda point: int(point["bytes"])):
        error = "" if point["standard_error"] is None else f" ± {point['standard_error']:.4f}"
        mark = " ← best" if point["config"] == found["best"]["config"] else ""
        reached = f"{point['miou_relative']:.4f}{error}"
        lines.append(f"{point['config']:<20} {point['bytes']:>12,} {reached:>22} {point['agreement']:>10.4f}{mark}")
    correlation = found["rank_correlation"]
    if correlation is not None:
        lines.append(f"Soft and hard masks order the effects of layers alike: Spearman's correlation {correlation:.2f}")
    return "\n".join([*lines, f"Done: {found['config']}; give it to `run` as --config"])
