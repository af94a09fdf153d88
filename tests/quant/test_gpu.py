"""Quantization on a CUDA GPU gives what it gives on the CPU."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from small_model import pixels
from transformers import Sam2Model

from samq.calib.parts import ImageEncoder
from samq.quant.config import load_recipe, preset_names
from samq.quant.quantize import quantize
from samq.quant.storage import load_quantized, save_quantized

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA GPU here"),
]


@pytest.mark.parametrize("preset", preset_names())
def test_as_on_the_cpu(small_model: Sam2Model, preset: str, tmp_path: Path) -> None:
    recipe, batches = load_recipe(preset), [pixels(1), pixels(1, 1)]
    on_cpu = quantize(small_model, recipe, batches)
    on_gpu = quantize(copy.deepcopy(small_model).cuda(), recipe, batches)
    assert all(parameter.is_cuda for parameter in on_gpu.model.parameters())
    assert on_gpu.codes.keys() == on_cpu.codes.keys()
    save_quantized(tmp_path, on_gpu.model, on_gpu.codes)
    restored, _ = load_quantized(tmp_path)
    with torch.no_grad():
        exact = ImageEncoder(small_model)(pixels(1, 5))[0]
        errors = [float((ImageEncoder(m)(pixels(1, 5))[0] - exact).norm()) for m in (on_cpu.model, restored)]
    # Rounding differs, and with it single codes of GPTQ; the quality must not.
    assert errors[1] == pytest.approx(errors[0], rel=0.25)
