"""Rotated residual streams: exact where there is no pooling, and why not elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from small_model import outputs, pixels, relative, small_config, small_sam2
from torch import Tensor, nn
from transformers import Sam2Config, Sam2Model

from samq.calib.parts import ImageEncoder
from samq.quant.config import Recipe
from samq.quant.folds import Folds
from samq.quant.quantize import quantize
from samq.quant.rotate import mean_keeping_rotation
from samq.quant.sites import linear_at
from samq.quant.streams import POOLED, residual_streams, rotate_stream

Array = NDArray[np.float64]
BLOCKS = "vision_encoder.backbone.blocks"
ROTATED = Recipe.model_validate(
    {"wgts": {"dtype": "sint8", "group_shapes": [[1, -1]]}, "rotation": {"enabled": True, "residual": True}}
)


def random_model(config: Sam2Config, seed: int = 1) -> Sam2Model:
    """Every parameter away from zeros and ones, gains of both signs among them."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = Sam2Model(config).eval()
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "pos_embed" in name:
                parameter += 0.3 * torch.randn_like(parameter)
        gain = model.get_submodule(f"{BLOCKS}.0.layer_norm2").weight
        assert isinstance(gain, Tensor)
        gain[3] *= -20
    return model


def without_pooling(windows: list[int], widths: Sequence[int] = (32, 64, 96, 128)) -> Sam2Config:
    """Stages that widen and do not pool; there are 32 tokens across in all of them."""
    config = small_config()
    vision: Any = config.vision_config
    vision.backbone_config.num_query_pool_stages = 0
    vision.backbone_config.window_size_per_stage = windows
    vision.backbone_config.embed_dim_per_stage = list(widths)
    vision.backbone_channel_list = list(reversed(widths))
    return config


def test_stages_that_pool_keep_their_basis(small_model: Sam2Model) -> None:
    streams = residual_streams(small_model)
    assert [stream.width for stream in streams] == [32, 64, 96, 128]
    assert [stream.obstacle for stream in streams] == [None, POOLED, POOLED, POOLED]
    first = streams[0]
    assert first.writers == (f"{BLOCKS}.0.attn.proj", f"{BLOCKS}.0.mlp.proj_out")
    assert set(first.norms) == {f"{BLOCKS}.0.layer_norm1", f"{BLOCKS}.0.layer_norm2", f"{BLOCKS}.1.layer_norm1"}


def test_maxima_do_not_pass_through_a_rotation() -> None:
    """Why: the rotation of pooled channels is far from pooling rotated channels."""
    x = torch.randn(1, 32, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rotation = mean_keeping_rotation(32)

    def rotated(y: Tensor) -> Tensor:
        return torch.einsum("ij,bjhw->bihw", rotation, y)

    before, after = rotated(nn.functional.max_pool2d(x, 2)), nn.functional.max_pool2d(rotated(x), 2)
    assert relative(after - before, before) > 0.5


def test_the_first_stream_is_exact(small_model: Sam2Model) -> None:
    model = random_model(small_config())
    rotated = copy.deepcopy(model)
    rotate_stream(rotated, residual_streams(rotated)[0])
    for after, before in zip(outputs(rotated), outputs(model), strict=True):
        assert relative(after - before, before) < 1e-4


@torch.no_grad()
def laterals(model: Sam2Model) -> list[Tensor]:
    """What the neck's convolutions make of the stages; its sums want stages that halve."""
    stages = model.vision_encoder.backbone(pixels(1).to(model.dtype)).intermediate_hidden_states
    convolutions = reversed(model.vision_encoder.neck.convs)
    return [conv(stage.permute(0, 3, 1, 2)) for conv, stage in zip(convolutions, stages, strict=True)]


@pytest.mark.parametrize("windows", [[8, 8, 8, 8], [8, 5, 6, 3]], ids=["whole windows", "filled up windows"])
def test_a_stage_without_pooling_is_exact(windows: list[int]) -> None:
    model = random_model(without_pooling(windows))
    streams = residual_streams(model)
    assert [stream.obstacle for stream in streams] == [None] * 4
    before = laterals(model)
    for stream in streams:
        rotate_stream(model, stream)
    for a, b in zip(laterals(model), before, strict=True):
        assert relative(a - b, b) < 1e-4


@given(st.integers(0, 999), st.sampled_from([4, 8, 20]), st.lists(st.booleans(), min_size=4, max_size=4))
@settings(max_examples=6)
def test_any_streams_of_a_model_are_exact(seed: int, wider: int, chosen: list[bool]) -> None:
    """In float64, of stages that widen by so many channels and do not pool."""
    widths = [32 + wider * stage for stage in range(4)]
    model = random_model(without_pooling([8, 4, 8, 4], widths), seed).double()
    before = laterals(model)
    for stream, rotated in zip(residual_streams(model), chosen, strict=True):
        if rotated or not any(chosen):
            rotate_stream(model, stream)
    for a, b in zip(laterals(model), before, strict=True):
        assert relative(a - b, b) < 1e-12


def test_the_stream_is_rotated_and_its_norms_have_no_gain() -> None:
    model = random_model(small_config())
    rotated, seen = copy.deepcopy(model), []
    rotation = rotate_stream(rotated, residual_streams(rotated)[0])
    for each in (model, rotated):
        handle = each.get_submodule(f"{BLOCKS}.1").register_forward_pre_hook(
            lambda module, args: seen.append(args[0].detach().double())
        )
        with torch.no_grad():
            ImageEncoder(each)(pixels(1))
        handle.remove()
    torch.testing.assert_close(seen[1], seen[0] @ rotation.T, rtol=1e-4, atol=1e-4)
    for name in residual_streams(rotated)[0].norms:
        norm = rotated.get_submodule(name)
        assert isinstance(norm, nn.LayerNorm)
        assert bool((norm.weight == 1).all())
        assert not norm.bias.any()


def test_weights_are_rotated_as_in_the_paper() -> None:
    """QuaRot, section 4, stage 1a: W ← R W and b ← R b where a layer writes, W ← W diag(g) Rᵀ where it reads.

    What LayerNorm adds goes into the readers: b ← b + W β.
    """
    model = random_model(small_config())
    rotated, (stream, *_) = copy.deepcopy(model), residual_streams(model)
    rotation = rotate_stream(rotated, stream).numpy()

    def both(name: str) -> list[list[Array]]:
        """Weight and bias of a module, before and after."""
        modules = (each.get_submodule(name) for each in (model, rotated))
        return [[p.detach().double().numpy() for p in (module.weight, module.bias)] for module in modules]

    for writer in (*stream.writers, "vision_encoder.backbone.patch_embed.projection"):
        (weight, bias), found = both(writer)
        near(found[0], np.tensordot(rotation, weight, 1))
        near(found[1], rotation @ bias)
    for site in stream.sites_in(model):
        (gain, beta), _ = both(site.source)
        for reader in site.layers:
            (weight, bias), found = both(reader)
            near(found[0], weight @ np.diag(gain) @ rotation.T)
            near(found[1], bias + weight @ beta)
    (weight, bias), found = both(f"vision_encoder.neck.convs.{len(model.vision_encoder.neck.convs) - 1}")
    near(found[0][..., 0, 0], weight[..., 0, 0] @ rotation.T)
    near(found[1], bias)


def near(found: Array, expected: Array) -> None:
    """Equal up to FP32's rounding of what is stored."""
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_a_gain_near_zero_before_filled_up_windows_is_an_obstacle() -> None:
    model = random_model(without_pooling([8, 5, 6, 3]))
    for name in ("0.layer_norm2", "3.layer_norm1", "4.layer_norm1"):  # an MLP's, one without windows, and one of 6
        norm = model.get_submodule(f"{BLOCKS}.{name}")
        assert isinstance(norm, nn.LayerNorm)
        with torch.no_grad():
            norm.weight[5] = 0
    obstacles = [stream.obstacle for stream in residual_streams(model)]
    assert obstacles[:2] == [None, None]
    assert obstacles[2] == f"{BLOCKS}.4.layer_norm1 has gains near zero before windows that are filled up with zeros"


def test_stages_of_one_width_are_one_stream() -> None:
    model = random_model(without_pooling([8, 8, 8, 8], (32, 64, 64, 128)))
    obstacles = [stream.obstacle for stream in residual_streams(model)]
    assert [obstacle is None for obstacle in obstacles] == [True, False, False, True]


def test_the_pass_says_what_it_rotated_and_what_not(small_model: Sam2Model) -> None:
    quantized = quantize(small_model, ROTATED.model_copy(update={"ipts": None}), None)
    assert quantized.folds.streams == [f"{BLOCKS}.0"]
    assert "residual stream of stage 1 rotated" in quantized.notes[f"{BLOCKS}.0.mlp.proj_in"].remarks
    assert f"residual stream of stage 2 not rotated: {POOLED}" in quantized.notes[f"{BLOCKS}.1.mlp.proj_in"].remarks
    with torch.no_grad():
        after, before = (ImageEncoder(model)(pixels(1))[0] for model in (quantized.model, small_model))
    assert relative(after - before, before) < 0.05


def test_the_float_twin_is_rotated_too(small_model: Sam2Model) -> None:
    twin = small_sam2()
    folds = Folds(streams=[f"{BLOCKS}.0"])
    folds.apply(twin)
    expected = copy.deepcopy(small_model)
    rotate_stream(expected, residual_streams(expected)[0])
    for name in (f"{BLOCKS}.0.attn.proj", f"{BLOCKS}.1.attn.qkv"):
        assert torch.equal(linear_at(twin, name).weight, linear_at(expected, name).weight)
