"""What a row of the table is: a model to quantize, a method to do it, and what comes out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import Sam2Model

from samq.quant.config import load_recipe
from samq.quant.plan import LayerPlan, group_for, make_plan

DEMO, HOSTILE = "demo", "hostile"
MODELS = (DEMO, HOSTILE)
OURS = "samq"
W4A8, W4, W8A8, BRANCH = "W4A8", "W4", "W8A8", "W4A8 and a low-rank branch"
FORMS = (W4A8, BRANCH, W4, W8A8)
OUR_ROW = {W4A8: "w4a8", BRANCH: "svdquant", W4: "w4only", W8A8: "w8a8"}
"""Form → our method that a peer's is compared with, unless the peer's row says otherwise."""
GROUPS = {W4A8: 128, BRANCH: 128, W4: 64}
"""Form → weights that share a scale in samq's presets, where that divides a layer's inputs."""
STATIC, TOKEN, FLOAT = "static, per tensor", "dynamic, per token", "float"
"""How activations are quantized."""
PEER_SCALE_BITS = 16
"""Of every scale of a peer, and of every number in its branches, as in checkpoints; peers simulate them in FP32."""


@dataclass(frozen=True)
class Subject:
    """A model to quantize, and what to calibrate it on.

    Args:
        name: one of `MODELS`.
        model: float, on the CPU; not to be changed.
        pixels: calibration images, each [1, 3, S, S].
    """

    name: str
    model: Sam2Model
    pixels: Sequence[Tensor]


@dataclass(frozen=True)
class Made:
    """A quantized model.

    Args:
        model: as PyTorch simulates it.
        bits: what codes, scales, zero-points, channel scales and branches of the quantized layers take, per weight; of
            the layers that samq's presets quantize, those that a config leaves float count as FP16.
        note: what a reader should know, else "".
    """

    model: Sam2Model
    bits: float
    note: str = ""


@dataclass(frozen=True)
class Method:
    """A row.

    Args:
        key: its name on the command line and in the record.
        title: its name in the table.
        form: one of `FORMS`.
        who: whose it is, `OURS` or the name of a package.
        make: quantizes a subject; may raise anything if it is a peer's.
        inputs: how activations are quantized, as `STATIC`.
        against: our row that it is compared with, None for that of its form.
        recipe: of a method of ours, what decides it, as YAML.
    """

    key: str
    title: str
    form: str
    who: str
    make: Callable[[Subject], Made]
    inputs: str = STATIC
    against: str | None = None
    recipe: str = ""

    @property
    def rival(self) -> str:
        """Our row that this one is compared with."""
        return self.against or OUR_ROW[self.form]


def layers_to_quantize(model: Sam2Model) -> list[LayerPlan]:
    """The linear layers that samq's presets quantize, all in the image encoder; peers get the same ones."""
    return [plan for plan in make_plan(model, load_recipe("int4_w4a8")) if plan.skip is None]


def group_of(plan: LayerPlan, form: str) -> int:
    """Weights that share a scale: as many as in samq's presets, or the next smaller number that divides the inputs."""
    return group_for(plan.in_features, GROUPS[form], weight_only=False)[0]


def rank_within(plans: Sequence[LayerPlan], share: float) -> int:
    """The largest rank, one for all layers, at which branches take `share` of the layers' FP16 bytes."""
    weights = sum(plan.in_features * plan.out_features for plan in plans)
    return int(share * weights / sum(plan.in_features + plan.out_features for plan in plans))


def bits_per_weight(plans: Sequence[LayerPlan], bits: float) -> float:
    """Bits that layers store by the number of their weights."""
    return bits / sum(plan.in_features * plan.out_features for plan in plans)
