"""A checkpoint that is hard to quantize and computes the same: outlier channels for a model that grew none.

    python -m samq.tools.demo.hostile DIR [--model-path DIR] [--seed 0] [--strength 100]

Large pretrained transformers have a few channels, the same in layer after layer and for every token, that are 20 to
100 times as large as the others and without which the model is lost (Dettmers et al., arXiv 2208.07339), each far from
zero on one side (Wei et al., arXiv 2304.09145). SAM's decoder also has queries of ±170 beside ±1, and keys whose
channels lie in two clouds of opposite sign (Lv et al., PTQ4SAM, arXiv 2405.03144). A small trained model has none of
it. It is put in here by changes that cancel, in exact arithmetic without any effect on the output. With x [K] what a
linear layer (W, b) reads, s > 0 and c constants for each channel:

    scale      (s x) · (W diag(s)⁻¹)ᵀ = x Wᵀ        x from a LayerNorm (gain and bias), attention values (rows of v, as
                                                    softmax mixes tokens only) or ReLU; GELU does not let it pass
    offset     (x + c) Wᵀ + (b − W c) = x Wᵀ + b    x from the LayerNorm of an MLP, or attention values, as the rows of
                                                    softmax sum to one; not from the LayerNorm of an attention: behind
                                                    it windows are padded with zeros, which have no offset
    exchange   (s q) · (k / s) = q · k              queries and keys of the decoder
    two-sided  q · (k + c) = q · k + q · c          keys of the decoder, c = ± for each channel: the same for all keys
                                                    of a query, so that softmax does not see it

Where outliers come, and how far offsets reach, follows from the weights alone but for queries and keys, which are
measured on a few of the demo's images. The keys of an attention get one deviation in all channels and lie KEY_OFFSET of
it from zero, its queries get a deviation of about one, with outliers that reach ±170 at the usual strength.

A per-tensor activation grid then spends its codes on a few channels, and the weights that read these channels become so
small beside the rest of their group that hardly a code is left for them.
"""

from __future__ import annotations

import argparse
import copy
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import Sam2Model
from transformers.models.sam2.modeling_sam2 import Sam2Attention

from samq.calib.calibrate import run_images
from samq.calib.checkpoint import load_checkpoint
from samq.calib.processor import SamProcessor
from samq.calib.sources import open_source
from samq.calib.statistics import InputStatistics
from samq.errors import MachineLacks, SamqError, UsageError
from samq.quant.signs import decoder_attentions
from samq.quant.sites import FoldSite, fold_sites
from samq.quant.smooth import fold_scale
from samq.tools.demo.dataset import CHECKPOINT, IMAGES

STRENGTH = 100.0
SHARE = 0.02  # of the channels are outliers, one at least
WEAKEST = 0.65  # factors are strength to a power between this and one: 20 to 100
OFFSET = 6.0  # of an outlier channel, in its standard deviations as the weights alone let expect
KEY_OFFSET = 6.0  # of every channel of a key, in its deviations as they are measured
QUERY_PEAK = 1.7  # the largest query of an attention, in strengths
MEASURED = 4  # of the demo's images
LEAST_DEVIATION = 0.01  # of the largest one in a projection
PREPROCESSING = "preprocessor_config.json"

Listener = Callable[[Tensor], Tensor | None]
"""Hears an output; None leaves it as it is."""


@dataclass(frozen=True)
class Outliers:
    """The outlier channels of one activation.

    Args:
        channels: [n] their indices.
        factors: [n] ≥ 1, by which they are scaled.
        signs: [n] ±1, the side of zero to which they are moved.
    """

    channels: Tensor
    factors: Tensor
    signs: Tensor


@dataclass(frozen=True)
class Draw:
    """The script's random choices.

    Args:
        strength: the largest factor, ≥ 1.
        generator: decides all else.
    """

    strength: float
    generator: torch.Generator

    def outliers(self, importance: Tensor) -> Outliers:
        """The SHARE most important of [K] channels, with random factors and signs."""
        count = max(1, round(SHARE * len(importance)))
        powers = WEAKEST + (1 - WEAKEST) * torch.rand(count, generator=self.generator)
        return Outliers(importance.topk(count).indices, self.strength**powers, self.signs(count))

    def signs(self, count: int) -> Tensor:
        """[count] of ±1."""
        return 2.0 * torch.randint(2, (count,), generator=self.generator) - 1.0


@dataclass(frozen=True)
class Spread:
    """How what a projection puts out lies on the measured images.

    Args:
        mean, deviation: [N] of each channel; one that hardly changes has LEAST_DEVIATION.
        largest: [N] magnitude.
    """

    mean: Tensor
    deviation: Tensor
    largest: Tensor

    @staticmethod
    def of(statistics: InputStatistics) -> Spread:
        """A projection's, from statistics of what it puts out."""
        deviation = statistics.sample.std(0)
        least = max(LEAST_DEVIATION * float(deviation.max()), torch.finfo(torch.float32).tiny)
        return Spread(statistics.mean().float(), deviation.clamp(min=least), statistics.absmax())


@torch.no_grad()
def make_hostile(model: Sam2Model, seed: int = 0, strength: float = STRENGTH) -> Sam2Model:
    """A copy of a float model on the CPU that computes the same, with outlier channels.

    Args:
        model: not changed.
        seed: of factors and signs; which channels become outliers follows from the weights, and of queries from what
            they are on the measured images.
        strength: the largest factor; 1 leaves offsets, and keys of one deviation.

    Raises:
        UsageError: the strength is below 1.
    """
    if not strength >= 1:
        raise UsageError(f"--strength {strength:g}: it is the largest factor of an outlier, so give 1 or more")
    hostile = copy.deepcopy(model)
    draw = Draw(strength, torch.Generator().manual_seed(seed))
    spreads = measure(model)
    sites = fold_sites(hostile)
    chosen = _outliers_of(hostile, sites, draw)
    for site, outliers in zip(sites, chosen, strict=True):
        if may_have_offset(hostile, site):
            offset_channels(hostile, site, outliers)
    for site, outliers in zip(sites, chosen, strict=True):
        scale_channels(hostile, site, outliers)
    for name, attention in decoder_attentions(hostile).items():
        queries, keys = spreads[f"{name}.q_proj"], spreads[f"{name}.k_proj"]
        offset_keys(attention, draw.signs(attention.internal_dim), keys)
        exchange(attention, exchange_factors(queries, keys, draw))
    return hostile


def measure(model: Sam2Model) -> dict[str, Spread]:
    """Spread of the queries and keys of the decoder's attentions, by the name of their projection.

    The demo's images come in the model's size, with the prompts of calibration (`samq.calib.calibrate.run_images`).
    """
    layers = projections(model)
    found = {
        name: InputStatistics.empty(layer.out_features, with_hessian=False, device=layer.weight.device)
        for name, layer in layers.items()
    }
    side: int = model.config.prompt_encoder_config.image_size  # type: ignore[union-attr]
    processor = SamProcessor.from_checkpoint(CHECKPOINT, side)
    source = open_source(IMAGES)
    pixels = (torch.from_numpy(processor(source[index].image).pixel_values)[None] for index in range(MEASURED))
    with hearing(layers, {name: statistics.add for name, statistics in found.items()}):
        run_images(model, pixels, with_decoder=True)
    return {name: Spread.of(statistics) for name, statistics in found.items()}


def projections(model: Sam2Model) -> dict[str, nn.Linear]:
    """The linear layers that put out queries and keys of the decoder's attentions, by name."""
    found: dict[str, nn.Linear] = {}
    for name, attention in decoder_attentions(model).items():
        found |= {f"{name}.q_proj": attention.q_proj, f"{name}.k_proj": attention.k_proj}
    return found


@contextmanager
def hearing(layers: Mapping[str, nn.Module], listeners: Mapping[str, Listener]) -> Iterator[None]:
    """Inside the `with` block, what each layer puts out goes to its listener, and is replaced by what that returns."""
    handles = []
    try:
        for name, layer in layers.items():
            handles.append(layer.register_forward_hook(_telling(listeners[name])))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _telling(listener: Listener) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
    return lambda _, inputs, output: listener(output)


def scale_channels(model: nn.Module, site: FoldSite, outliers: Outliers) -> None:
    """Multiply outlier channels by their factors; the columns of all layers that read them are divided."""
    divisors = torch.ones(site.rows[1] - site.rows[0])
    divisors[outliers.channels] = 1 / outliers.factors
    fold_scale(model, site, divisors)


def may_have_offset(model: nn.Module, site: FoldSite) -> bool:
    """Each token that the site's layers read has passed its source, so that an offset of the source is on all of them.

    An activation that clips, and the zeros with which windows are padded, forbid it.
    """
    is_norm_of_mlp = isinstance(site.source_in(model), nn.LayerNorm) and site.layers[0].endswith("mlp.proj_in")
    return site.heads is not None or is_norm_of_mlp


@torch.no_grad()
def offset_channels(model: nn.Module, site: FoldSite, outliers: Outliers) -> None:
    """Add OFFSET deviations to outlier channels; the biases of all layers that read them take it away."""
    source, rows = site.source_in(model), site.rows[0] + outliers.channels
    offset = OFFSET * outliers.signs * _deviations(source)[rows]
    source.bias[rows] += offset
    for layer in site.layers_in(model):
        layer.bias.sub_(layer.weight[:, outliers.channels] @ offset)


@torch.no_grad()
def offset_keys(attention: Sam2Attention, signs: Tensor, keys: Spread) -> None:
    """Move the mean of each channel of the keys to KEY_OFFSET deviations on its side; signs [internal_dim] are ±1."""
    attention.k_proj.bias.add_(KEY_OFFSET * signs * keys.deviation - keys.mean)


def exchange_factors(queries: Spread, keys: Spread, draw: Draw) -> Tensor:
    """Factors [internal_dim] that give the keys' channels one deviation, and the queries' about one, besides outliers.

    These are the channels that matter most to the products of queries and keys.
    """
    importance = queries.deviation * keys.deviation
    factors = keys.deviation / importance.median()
    outliers = draw.outliers(importance)
    channels, shares = outliers.channels, outliers.factors / outliers.factors.max()
    enlarged = QUERY_PEAK * draw.strength * shares / (queries.largest * factors)[channels]
    factors[channels] *= enlarged.clamp(min=1)
    return factors


@torch.no_grad()
def exchange(attention: Sam2Attention, factors: Tensor) -> None:
    """Multiply the channels of the queries by factors [internal_dim] > 0, and divide those of the keys by them."""
    for layer, scale in ((attention.q_proj, factors), (attention.k_proj, 1 / factors)):
        layer.weight.mul_(scale[:, None])
        layer.bias.mul_(scale)


def _outliers_of(model: nn.Module, sites: list[FoldSite], draw: Draw) -> list[Outliers]:
    """Outliers of every site. LayerNorms of one width, which share a residual stream, have the same channels."""
    of_site = [_importance(model, site) for site in sites]
    of_width: dict[int, Tensor] = {}
    for site, importance in zip(sites, of_site, strict=True):
        if isinstance(site.source_in(model), nn.LayerNorm):
            share = importance / importance.sum()
            of_width[len(share)] = of_width.get(len(share), torch.zeros_like(share)) + share
    return [
        draw.outliers(of_width[len(importance)] if isinstance(site.source_in(model), nn.LayerNorm) else importance)
        for site, importance in zip(sites, of_site, strict=True)
    ]


def _importance(model: nn.Module, site: FoldSite) -> Tensor:
    """[K] how much each channel of a site can move what its layers put out."""
    readers = torch.cat([layer.weight for layer in site.layers_in(model)])
    importance: Tensor = _deviations(site.source_in(model))[slice(*site.rows)] * readers.norm(dim=0)
    return importance


def _deviations(source: nn.LayerNorm | nn.Linear) -> Tensor:
    """Standard deviation of each channel that a LayerNorm, or a linear layer of uncorrelated unit inputs, puts out."""
    return source.weight.abs() if isinstance(source, nn.LayerNorm) else _row_norms(source)


def _row_norms(layer: nn.Linear) -> Tensor:
    norms: Tensor = layer.weight.norm(dim=1)
    return norms


def write_hostile(directory: Path, model_path: str, seed: int, strength: float) -> None:
    """Write a hostile variant of a checkpoint, in FP32 as `save_pretrained` does, with its preprocessing.

    Raises:
        SamqError: the checkpoint cannot be read, the strength is below 1, or the directory is not empty or cannot be
            written.
    """
    if directory.is_dir() and any(directory.iterdir()):
        raise UsageError(f"{directory} is not empty; give a new directory")
    checkpoint = load_checkpoint(model_path)
    hostile = make_hostile(checkpoint.model, seed, strength)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        hostile.save_pretrained(directory)
        if (checkpoint.directory / PREPROCESSING).is_file():
            shutil.copyfile(checkpoint.directory / PREPROCESSING, directory / PREPROCESSING)
    except (OSError, SafetensorError) as error:
        raise MachineLacks(f"{directory}: cannot be written ({error}); give another directory") from error


def main() -> int:
    """Write the checkpoint; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where the checkpoint goes")
    parser.add_argument("--model-path", default=str(CHECKPOINT), help="a SAM2 checkpoint (default: the demo)")
    parser.add_argument("--seed", type=int, default=0, help="of factors and signs (default: 0)")
    parser.add_argument("--strength", type=float, default=STRENGTH, help="largest factor (default: %(default)g)")
    arguments = parser.parse_args()
    try:
        write_hostile(arguments.directory, arguments.model_path, arguments.seed, arguments.strength)
    except SamqError as error:
        print(f"hostile: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{arguments.directory}: hostile variant of {arguments.model_path}, seed {arguments.seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
