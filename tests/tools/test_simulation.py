"""A simulation as an engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from exported import float_model, float_predictor
from small_model import IMAGE_SIZE, pixels

from samq.calib.prompts import clicks, grid
from samq.tools.simulation import torch_predictor


def test_the_simulation_answers_as_an_engine_does(tmp_path: Path) -> None:
    image, prompts = pixels(1, seed=2)[0].numpy(), clicks(grid(IMAGE_SIZE, 5))
    answers = []
    for predictor in (torch_predictor(float_model()), float_predictor(tmp_path)):
        answers.append(predictor.decode(predictor.encode(image), prompts.coords, prompts.labels))
    assert answers[0].masks.shape == answers[1].masks.shape == (25, 4, 32, 32)
    np.testing.assert_allclose(answers[0].masks, answers[1].masks, atol=1e-3 * np.abs(answers[1].masks).max())
    np.testing.assert_allclose(answers[0].scores, answers[1].scores, atol=1e-4)
