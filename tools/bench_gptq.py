"""Time of GPTQ for all layers of a full-size SAM2.1 with random weights and inputs, beside eager implementations.

    python -m samq.tools.bench_gptq large --device cuda

prints for each implementation the seconds, and the mean of the layers' ‖(W − Ŵ) X‖² / ‖W X‖² as a check that all of
them did the same work: samq as `samq-export quantize` runs it (on a GPU, layers of one shape together) and one layer at
a time; the plain loop over columns; llm-compressor's `quantize_weight` where that is installed, eager and as its recipe
calls it. Second moments of the inputs are made beforehand and are not part of the time, nor is a first run that warms
up. Groups are those of `int4_w4a8`, with one level of scales that clip nothing, which all implementations have.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from samq.quant.config import Recipe, load_recipe
from samq.quant.gptq import factorize, gptq, gptq_together, inverse_cholesky, output_error
from samq.quant.grids import Grid
from samq.quant.plan import LayerPlan, make_plan
from samq.quant.rounding import together
from samq.quant.scales import choose_scales
from samq.tools.prove_parity import BACKBONES, random_sam2
from samq.tools.report.environment import environment

GRID = Grid(4, signed=True)
BLOCK, DAMPING = 128, 0.01
COMMON_DIRECTIONS = 16
WARM_UP_LAYERS = 4
NO_TRITON = "LLMCOMPRESSOR_DISABLE_GPTQ_TRITON"

Run = Callable[["Subject"], dict[str, Tensor]]


@dataclass(frozen=True)
class Subject:
    """Layers by name.

    Args:
        plans: sizes and groups.
        weights: [N, K].
        hessians: [K, K].
    """

    plans: Mapping[str, LayerPlan]
    weights: Mapping[str, Tensor]
    hessians: Mapping[str, Tensor]

    def first(self, count: int) -> Subject:
        """The same of a few layers."""
        plans = dict(list(self.plans.items())[:count])
        weights, hessians = ({name: of[name] for name in plans} for of in (self.weights, self.hessians))
        return Subject(plans, weights, hessians)


def main() -> int:
    """Print the table; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(BACKBONES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device, recipe = torch.device(arguments.device), load_recipe("int4_w4a8")
    facts = environment()
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{facts['cores']} cores, {facts['processor']}"
    subject = _subject(arguments.model, recipe, device)
    print(f"SAM2.1 {arguments.model}, {len(subject.plans)} layers, {machine}, torch {torch.__version__}", flush=True)
    rows: dict[str, Run] = {
        "samq, as in quantize": lambda subject: _samq(subject, recipe, device),
        "samq, layer by layer": _one_by_one,
        "plain loop, layer by layer": _plain_loop,
    }
    peer = _llm_compressor()
    rows |= peer
    for name, run in rows.items():
        run(subject.first(WARM_UP_LAYERS))
        seconds, rounded = _timed(run, subject, device)
        print(f"{name:38} {seconds:8.2f} s   mean relative error {_error(subject, rounded):.5f}", flush=True)
    if not peer:
        print("llm-compressor is not installed: no row")
    return 0


@torch.no_grad()
def _subject(name: str, recipe: Recipe, device: torch.device) -> Subject:
    model = random_sam2(name)
    plans = {plan.name: plan for plan in make_plan(model, recipe) if plan.skip is None}
    weights = {layer: model.get_parameter(f"{layer}.weight").detach().to(device) for layer in plans}
    generator = torch.Generator(device).manual_seed(0)
    hessians = {layer: _second_moments(plan.in_features, generator) for layer, plan in plans.items()}
    return Subject(plans, weights, hessians)


def _second_moments(inputs: int, generator: torch.Generator) -> Tensor:
    """Σ x xᵀ of inputs that have directions in common, as activations have."""
    device = generator.device
    x = torch.randn(2 * inputs, COMMON_DIRECTIONS, generator=generator, device=device)
    x = x @ torch.randn(COMMON_DIRECTIONS, inputs, generator=generator, device=device)
    x += torch.randn(2 * inputs, inputs, generator=generator, device=device)
    return x.T @ x


def _timed(run: Run, subject: Subject, device: torch.device) -> tuple[float, dict[str, Tensor]]:
    started = time.perf_counter()
    rounded = run(subject)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started, rounded


def _error(subject: Subject, rounded: Mapping[str, Tensor]) -> float:
    shares = [
        output_error(weight - rounded[name], subject.hessians[name]) / output_error(weight, subject.hessians[name])
        for name, weight in subject.weights.items()
    ]
    return sum(shares) / len(shares)


@torch.no_grad()
def _samq(subject: Subject, recipe: Recipe, device: torch.device) -> dict[str, Tensor]:
    rounded: dict[str, Tensor] = {}
    for names in together(subject.plans.values(), recipe, device):
        weights, hessians = ([of[name] for name in names] for of in (subject.weights, subject.hessians))
        scales = [choose_scales(subject.weights[n], GRID, subject.plans[n].group_size, norm=None) for n in names]
        factors = [factorize(hessian, DAMPING) for hessian in hessians]
        codes = gptq_together(weights, factors, scales, GRID, BLOCK)
        rounded |= {name: of_layer.dequantize() for name, of_layer in zip(names, codes, strict=True)}
    return rounded


@torch.no_grad()
def _one_by_one(subject: Subject) -> dict[str, Tensor]:
    rounded = {}
    for name, weight in subject.weights.items():
        scales = choose_scales(weight, GRID, subject.plans[name].group_size, norm=None)
        rounded[name] = gptq(weight, subject.hessians[name], scales, GRID, BLOCK, DAMPING).weight.dequantize()
    return rounded


@torch.no_grad()
def _plain_loop(subject: Subject) -> dict[str, Tensor]:
    """The algorithm as its paper has it: a Python loop over the columns of each layer, blocks updated lazily."""
    return {
        name: _plain(weight, subject.hessians[name], subject.plans[name]) for name, weight in subject.weights.items()
    }


def _plain(weight: Tensor, hessian: Tensor, plan: LayerPlan) -> Tensor:
    step, _ = choose_scales(weight, GRID, plan.group_size, norm=None).per_input(plan.in_features)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    inverse, _ = inverse_cholesky(hessian[order][:, order], DAMPING)
    rest, step = weight[:, order], step[:, order]
    found = torch.empty_like(rest)
    for start in range(0, plan.in_features, BLOCK):
        stop = min(start + BLOCK, plan.in_features)
        errors = torch.empty_like(rest[:, start:stop])
        for column in range(start, stop):
            codes = torch.clamp(torch.round(rest[:, column] / step[:, column]), GRID.qmin, GRID.qmax)
            found[:, column] = codes * step[:, column]
            error = (rest[:, column] - found[:, column]) / inverse[column, column]
            rest[:, column:stop] -= torch.outer(error, inverse[column, column:stop])
            errors[:, column - start] = error
        rest[:, stop:] -= errors @ inverse[start:stop, stop:]
    restored = torch.empty_like(found)
    restored[:, order] = found
    return restored


def _llm_compressor() -> dict[str, Run]:
    """llm-compressor's GPTQ on the same layers and scales, none where it is not installed.

    Its recipe rounds layers of one shape together and by its Triton kernel on a GPU; eager, one by one, is what it does
    without. It orders columns by activation as samq does.
    """
    try:
        module = importlib.import_module("llmcompressor.modifiers.gptq.gptq_quantize")
        formats = importlib.import_module("compressed_tensors.quantization")
    except ImportError:
        return {}

    @torch.no_grad()
    def quantize(subject: Subject, names: Sequence[str]) -> dict[str, Tensor]:
        group = subject.plans[names[0]].group_size
        form = formats.QuantizationArgs(
            num_bits=GRID.bits, symmetric=True, strategy="group", group_size=group, actorder="static"
        )
        scales = torch.stack([choose_scales(subject.weights[name], GRID, group, norm=None).step() for name in names])
        weights, hessians = (torch.stack([of[n] for n in names]) for of in (subject.weights, subject.hessians))
        zeros = torch.zeros_like(scales)
        rounded = module.quantize_weight(weights, hessians, scales, zeros, None, form, BLOCK, DAMPING)[0]
        return dict(zip(names, rounded, strict=True))

    def eager(subject: Subject) -> dict[str, Tensor]:
        os.environ[NO_TRITON] = "1"
        rounded = {name: quantize(subject, [name])[name] for name in subject.plans}
        del os.environ[NO_TRITON]
        return rounded

    def as_its_recipe(subject: Subject) -> dict[str, Tensor]:
        alike: dict[tuple[int, ...], list[str]] = {}
        for name, plan in subject.plans.items():
            alike.setdefault((plan.in_features, plan.out_features, plan.group_size), []).append(name)
        return {name: w for names in alike.values() for name, w in quantize(subject, names).items()}

    return {"llm-compressor, eager, layer by layer": eager, "llm-compressor, as in its recipe": as_its_recipe}


if __name__ == "__main__":
    sys.exit(main())
