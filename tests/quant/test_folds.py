"""Folds that are applied again give the float twin of a quantized model."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from small_model import pixels
from transformers import Sam2Model

from samq.calib.parts import ImageEncoder
from samq.errors import BadInput
from samq.quant.config import Recipe
from samq.quant.folds import Folds
from samq.quant.quantize import Quantized, quantize
from samq.quant.sites import linear_at
from samq.tools.sqnr import layer_sqnr

EVERYTHING = Recipe.model_validate(
    {
        "wgts": {"dtype": "sint8", "group_shapes": [[1, -1]], "skip_decoder": False},
        "ipts": {},
        "shift": {"enabled": True},
        "smooth": {"enabled": True},
        "rotation": {"enabled": True},
    }
)


@pytest.fixture(scope="module")
def quantized(small_model: Sam2Model) -> Quantized:
    return quantize(small_model, EVERYTHING, [pixels(1)])


@pytest.fixture(scope="module")
def twin(small_model: Sam2Model, quantized: Quantized) -> Sam2Model:
    model = copy.deepcopy(small_model)
    quantized.folds.apply(model)
    return model


def test_the_twin_computes_what_the_float_model_does(small_model: Sam2Model, twin: Sam2Model) -> None:
    with torch.no_grad():
        before, after = (ImageEncoder(model)(pixels(1, 5))[0] for model in (small_model, twin))
    assert float((after - before).norm() / before.norm()) < 1e-5


def test_the_twin_has_the_weights_that_were_quantized(
    small_model: Sam2Model, twin: Sam2Model, quantized: Quantized
) -> None:
    def worst(model: Sam2Model) -> float:
        errors = []
        for name, codes in quantized.codes.items():
            weight = linear_at(model, name).weight.detach()
            errors.append(float((codes.effective_weight() - weight).norm() / weight.norm()))
        return max(errors)

    assert worst(twin) < 0.02  # INT8 rounding and nothing else
    assert worst(small_model) > 0.2


def test_only_the_twin_can_be_compared_layer_by_layer(
    small_model: Sam2Model, twin: Sam2Model, quantized: Quantized
) -> None:
    names = list(quantized.codes)
    with_twin = layer_sqnr(twin, quantized.model, names, [pixels(1, 3)])
    without = layer_sqnr(small_model, quantized.model, names, [pixels(1, 3)])
    # A value that hardly differs from token to token has little left when its middle is taken away: 20 dB less of it.
    assert all(value is not None and value > 10 for value in with_twin.values())
    assert min(value for value in without.values() if value is not None) < 0  # more noise than signal


def test_round_trip(tmp_path: Path, quantized: Quantized) -> None:
    quantized.folds.save(tmp_path)
    loaded = Folds.load(tmp_path)
    assert sorted(loaded.rotated) == sorted(quantized.folds.rotated)
    for read, written in (
        (loaded.offsets, quantized.folds.offsets),
        (loaded.scales, quantized.folds.scales),
    ):
        assert written
        assert read.keys() == written.keys()
        assert all(torch.equal(read[source], vector) for source, vector in written.items())


def test_the_twin_has_the_biases_that_were_stored(twin: Sam2Model, quantized: Quantized) -> None:
    for name, codes in quantized.codes.items():
        assert codes.bias is not None
        torch.testing.assert_close(codes.bias, linear_at(twin, name).bias.detach(), rtol=1e-4, atol=1e-5)


def test_no_fold_is_a_file_too(tmp_path: Path) -> None:
    Folds().save(tmp_path)
    assert Folds.load(tmp_path) == Folds()


@pytest.mark.parametrize("content", [None, b"", b"no safetensors at all"])
def test_missing_or_corrupt(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "folds.safetensors").write_bytes(content)
    with pytest.raises(BadInput, match="folds"):
        Folds.load(tmp_path)
