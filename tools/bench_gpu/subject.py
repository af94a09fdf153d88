"""A model under test: its weights, images for it, and its quantized forms, made when they are asked for."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import Sam2Model

from samq.calib.checkpoint import load_checkpoint
from samq.calib.images import Sample
from samq.calib.processor import SamProcessor
from samq.calib.sources import open_source, take
from samq.quant.config import Recipe, load_recipe
from samq.quant.quantize import Quantized, quantize
from samq.tools.bench_gpu.cells import DEMO
from samq.tools.demo.dataset import CHECKPOINT, HELD_OUT, IMAGES
from samq.tools.prove_parity import random_sam2

Pixels = NDArray[np.float32]

NOISE_IMAGES = 2  # to calibrate random weights on


class Subject:
    """The demo model, or one with random weights.

    Args:
        name: of the model.
        model: float32, on the CPU.
        device: where it is quantized and its reference runs.
    """

    def __init__(self, name: str, model: Sam2Model, device: str) -> None:
        self.name, self.model, self.device = name, model, device
        self.is_demo = name == DEMO
        self._quantized: dict[str, Quantized] = {}
        self._scenes: list[Sample] = []

    @classmethod
    def load(cls, name: str, device: str) -> Subject:
        """One of `samq.tools.bench_gpu.cells.MODELS`."""
        return cls(name, load_checkpoint(str(CHECKPOINT)).model if name == DEMO else random_sam2(name), device)

    @cached_property
    def on_device(self) -> Sam2Model:
        """The float32 model on the device."""
        model = copy.deepcopy(self.model)
        model.to(self.device)  # type: ignore[arg-type] # transformers' decorator hides nn.Module's signature
        return model

    @cached_property
    def processor(self) -> SamProcessor:
        """The demo model's own preprocessing."""
        return load_checkpoint(str(CHECKPOINT)).processor

    def pixels(self, batch: int) -> Pixels:
        """Images to measure on [batch, 3, S, S]: held-out scenes for the demo model, noise for random weights."""
        if self.is_demo:
            return np.stack([self.processor(scene.image).pixel_values for scene in self.scenes(batch)])
        return noise(self.model, batch, seed=0)

    def scenes(self, count: int) -> list[Sample]:
        """The first held-out scenes of the demo model; each is drawn once."""
        if len(self._scenes) < count:
            self._scenes = list(take(open_source(HELD_OUT), count))
        return self._scenes[:count]

    def recipe(self, preset: str) -> Recipe:
        """The preset; random weights are rounded to nearest, which gives the same graph sooner."""
        recipe = load_recipe(preset)
        if self.is_demo:
            return recipe
        values = recipe.model_dump()
        values["wgts"]["kernel_gptq"] = None
        return Recipe.model_validate(values)

    def note(self, preset: str) -> str:
        """How it is quantized, where that is not what the preset says."""
        changed = self.recipe(preset) != load_recipe(preset)
        return f"random weights, calibrated on {NOISE_IMAGES} images of noise" + (", RTN for GPTQ" if changed else "")

    def quantized(self, preset: str) -> Quantized:
        """The quantized model, on the device."""
        if preset not in self._quantized:
            recipe = self.recipe(preset)
            self._quantized[preset] = quantize(self.on_device, recipe, self._calibration(recipe))
        return self._quantized[preset]

    def _calibration(self, recipe: Recipe) -> Iterator[Tensor] | None:
        if not recipe.needs_calibration:
            return None
        if self.is_demo:
            shipped = take(open_source(str(IMAGES)), recipe.calib.num_samples)
            return (torch.from_numpy(self.processor(sample.image).pixel_values)[None] for sample in shipped)
        return (torch.from_numpy(noise(self.model, 1, seed)) for seed in range(1, 1 + NOISE_IMAGES))


def noise(model: Sam2Model, batch: int, seed: int) -> Pixels:
    """Images [batch, 3, S, S] for random weights, drawn from the normal distribution."""
    config: Any = model.config
    size: int = config.prompt_encoder_config.image_size
    return np.random.default_rng(seed).standard_normal((batch, 3, size, size), dtype=np.float32)
