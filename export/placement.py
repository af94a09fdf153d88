"""Where INT8 pays: which layers run in INT8, with how much of their low-rank branch, and which in FP16.

A placement is a YAML file that `samq-export place` measures, and that can be read, edited, reused and committed:

    gpu: NVIDIA H100 80GB HBM3          # where it was measured; only `layers` is needed
    tensorrt: 8.6.0
    layers:                             # the first pattern that a layer's name matches decides, * for anything
      vision_encoder.backbone.blocks.12.*: fp16
      "*": int8
    blocks:                             # what was measured
      vision_encoder.backbone.blocks.12:
        fp16: {milliseconds: 0.341, spread: 0.001}
        int8: {milliseconds: 0.784, spread: 0.002}
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from samq.files import write_text
from samq.quant.config_file import load_yaml

Form = Literal["fp16", "int8", "branch", "branch-32", "branch-16", "branch-8", "fold", "mlp"]
RANKS: dict[Form, int] = {"branch-32": 32, "branch-16": 16, "branch-8": 8}
"""Forms that keep the first components of a branch, those that remove most, and fold the others."""
MOST_EXACT_FIRST: tuple[Form, ...] = ("fp16", "mlp", "branch", *RANKS, "int8", "fold")
MLP = "*.mlp.*"  # layers that form mlp runs in INT8; those around the attention stay FP16, so that it stays fused
SHORTEST = 1e-4  # milliseconds; below that, differences are none


class Figure(BaseModel):
    """One block in one form, built and run alone."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    milliseconds: Annotated[float | None, Field(description="median of the runs; null where it is not built")] = None
    spread: Annotated[float, Field(description="interquartile range of the runs, in milliseconds")] = 0.0
    error: Annotated[float | None, Field(description="of the graph's output y: ‖y − float y‖ / ‖float y‖")] = None
    refused: Annotated[str, Field(description="why the form is out of the question, or empty")] = ""
    structure: Annotated[str, Field(description="digest of graph and builder options that the time holds for")] = ""


Figures = dict[str, dict[Form, Figure]]
"""Block → form → what was measured."""

Whole = dict[Literal["fp16", "placed"], Figure]
"""What was measured of the whole encoder."""


class Placement(BaseModel):
    """The form that each layer takes on TensorRT."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    gpu: Annotated[str, Field(description="where it was measured: the driver's name of the GPU, or a part of it")] = ""
    like: Annotated[tuple[str, ...], Field(description="others of the same processor, which get it too")] = ()
    tensorrt: Annotated[str, Field(description="version that it was measured with")] = ""
    layers: Annotated[
        dict[str, Form],
        Field(
            description="pattern of layer names → fp16, int8 (branches as --low-rank says), branch, branch-8 (8 of its "
            "components, the others folded), fold or mlp"
        ),
    ] = {}
    blocks: Annotated[Figures, Field(description="block → form → what was measured")] = {}
    whole: Annotated[
        Whole, Field(description="the whole encoder, in FP16 and as the blocks alone would have it placed")
    ] = {}

    def form(self, layer: str) -> Form:
        """The form of a layer: any but mlp, which is int8 or fp16 for a layer; int8 where no pattern matches."""
        form = self.form_of_block(layer)
        if form == "mlp":
            return "int8" if fnmatchcase(layer, MLP) else "fp16"
        return form

    def form_of_block(self, name: str) -> Form:
        """The form of the first pattern that matches `name`, a layer's or `<block>.`; int8 where none does."""
        return next((form for pattern, form in self.layers.items() if fnmatchcase(name, pattern)), "int8")

    def save(self, path: Path) -> Path:
        """Write the file; `load_placement` reads it back equal."""
        content = self.model_dump(exclude_defaults=True)
        write_text(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120))
        return path


EVERYWHERE = Placement()
SHIPPED = Path(__file__).parent / "placements"


def load_placement(path: Path) -> Placement:
    """Read a placement.

    Raises:
        UsageError: the file cannot be read or holds none; the message names line and key.
    """
    return load_yaml(path, Placement)


def fastest(blocks: Figures, gpu: str, tensorrt: str, budget: float = 0.0) -> Placement:
    """For each block the form that is faster than the more exact ones by more than the spread; FP16 for all others.

    With a budget, time is then spent where it removes most error: of all changes to a more exact form, the one that
    removes most squared error a millisecond goes first, as long as it fits.

    Args:
        blocks: what was measured.
        budget: time over that of the fastest forms, as a share of it.
    """
    candidates = {block: _candidates(forms) for block, forms in blocks.items()}
    chosen = {block: _fastest(forms) for block, forms in candidates.items() if forms}
    left = budget * sum(_time(candidates[block][form]) for block, form in chosen.items())
    while changes := [
        change
        for block, form in chosen.items()
        for change in _changes(block, candidates[block], form)
        if change.milliseconds <= left
    ]:
        best = max(changes, key=lambda change: change.error_removed / change.milliseconds)
        chosen[best.block] = best.form
        left -= best.milliseconds
    layers: dict[str, Form] = {f"{block}.*": form for block, form in chosen.items() if form != "fp16"}
    return Placement(gpu=gpu, tensorrt=tensorrt, layers=layers | _all_others(blocks), blocks=blocks)


def all_in_fp16(placement: Placement) -> Placement:
    """The same, with every block in FP16."""
    return placement.model_copy(update={"layers": _all_others(placement.blocks)})


def is_faster(figure: Figure, than: Figure) -> bool:
    """By more than the larger interquartile range of the two."""
    return _time(figure) + max(figure.spread, than.spread) < _time(than)


def _all_others(blocks: Figures) -> dict[str, Form]:
    return {f"{block.rpartition('.')[0]}.*": "fp16" for block in blocks}


@dataclass(frozen=True)
class _Change:
    """One block in a slower and more exact form."""

    block: str
    form: Form
    milliseconds: float
    error_removed: float


def _changes(block: str, forms: dict[Form, Figure], chosen: Form) -> Iterator[_Change]:
    now = forms[chosen]
    for form, figure in forms.items():
        if figure.error is not None and now.error is not None and figure.error < now.error:
            milliseconds = max(_time(figure) - _time(now), SHORTEST)
            yield _Change(block, form, milliseconds, now.error**2 - figure.error**2)


def _candidates(forms: dict[Form, Figure]) -> dict[Form, Figure]:
    """Forms that can be built and compute what they should, from the most exact one to the least."""
    return {
        form: forms[form]
        for form in MOST_EXACT_FIRST
        if form in forms and forms[form].milliseconds is not None and not forms[form].refused
    }


def _fastest(forms: dict[Form, Figure]) -> Form:
    best, *others = forms
    for form in others:
        if is_faster(forms[form], forms[best]):
            best = form
    return best


def _time(figure: Figure) -> float:
    assert figure.milliseconds is not None
    return figure.milliseconds


def shipped_for(gpu: str, tensorrt: str) -> Placement:
    """The placement that samq ships for a GPU and TensorRT's major version; everything in INT8 where there is none.

    Args:
        gpu: as the driver calls it, such as "NVIDIA H100 80GB HBM3".
        tensorrt: version, such as "8.6.0".
    """
    for path in sorted(SHIPPED.glob("*.yaml")):
        placement = load_placement(path)
        is_its = any(name in gpu for name in (placement.gpu, *placement.like))
        if is_its and placement.tensorrt.partition(".")[0] == tensorrt.partition(".")[0]:
            return placement
    return EVERYWHERE
