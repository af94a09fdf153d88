"""Integer queries and keys are simulated as ONNX computes them, and the table has a row for each form."""

from __future__ import annotations

import pytest
import torch
from small_model import outputs, pixels
from torch import Tensor
from transformers import Sam2Model

from samq.calib.histogram import Histogram
from samq.quant.config import InputsConfig
from samq.quant.grids import Grid
from samq.quant.inputs import calibrated_range, grid_of_range
from samq.quant.signs import decoder_attentions
from samq.tools import bench_attention
from samq.tools.bench_accuracy.method import DEMO, HOSTILE
from samq.tools.bench_attention import MAX, MSE, calibrated, ends_of, rounded, scales_of, with_signs_folded
from samq.tools.demo.hostile import hearing, make_hostile, projections

ASYMMETRIC = Grid(8, signed=False)


def _values(seed: int = 0) -> Tensor:
    """A few that lie far from the rest, more above zero than below."""
    return torch.randn(3, 50, 20, generator=torch.Generator().manual_seed(seed)) ** 3 + 1


@pytest.mark.parametrize("ends", [(-3.0, 5.0), (0.0, 7.0), (-170.0, 0.5), (0.0, 0.0)])
def test_eight_bits_are_those_of_samqs_input_grids(ends: tuple[float, float]) -> None:
    values = _values()
    expected = grid_of_range("uint8", *ends).fake_quantize(values)
    torch.testing.assert_close(rounded(values, ASYMMETRIC, scales_of(ASYMMETRIC, ends)), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("signed", [True, False])
def test_a_grid_has_its_codes_and_reaches_from_end_to_end(bits: int, signed: bool) -> None:
    values, grid = _values(), Grid(bits, signed)
    found = rounded(values, grid, scales_of(grid, (float(values.min()), float(values.max()))))
    assert found.shape == values.shape
    assert len(found.unique()) <= 2**bits
    step = (values.abs().max() / (2 ** (bits - 1) - 1)) if signed else (values.max() - values.min()) / (2**bits - 1)
    assert float((found - values).abs().max()) <= 0.502 * float(step) * (2 - signed)  # a zero-point is rounded, too


@pytest.mark.parametrize(("ends", "calibrator"), [(MAX, "max"), ("99.99 %", "percentile"), (MSE, "mse")])
@pytest.mark.parametrize(("signed", "dtype"), [(True, "sint8"), (False, "uint8")])
def test_ranges_are_those_of_samqs_calibrators(ends: str, calibrator: str, signed: bool, dtype: str) -> None:
    histogram = Histogram.of(_values())
    expected = calibrated_range(InputsConfig.model_validate({"dtype": dtype, "calibrator": calibrator}), histogram)
    found = ends_of(histogram, Grid(8, signed), ends)
    assert found == expected or (signed and ends == MSE)  # where sint8 has a code more below zero than Grid
    assert ends_of(histogram, Grid(8, signed), "99.9 %")[1] < ends_of(histogram, Grid(8, signed), MAX)[1]


def test_the_fold_makes_keys_one_sided_and_changes_no_answer(small_model: Sam2Model) -> None:
    hostile = make_hostile(small_model)
    folded, folds = with_signs_folded(hostile, [pixels(1)])
    assert 0 < folds <= len(decoder_attentions(hostile))
    assert all(torch.equal(a, b) for a, b in zip(outputs(folded), outputs(hostile), strict=True))
    before, after = (calibrated(model, [pixels(1)]).histograms for model in (hostile, folded))
    for name in before:
        spans = [high - low for low, high in (ends_of(of[name], ASYMMETRIC, MAX) for of in (before, after))]
        if name.endswith("k_proj"):
            assert spans[1] < 0.75 * spans[0], name
    plain, none = with_signs_folded(small_model, [pixels(1)])
    assert none == 0
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in small_model.state_dict().items())


def test_signs_are_nothing_to_a_grid_around_zero(small_model: Sam2Model) -> None:
    hostile = make_hostile(small_model)
    folded, _ = with_signs_folded(hostile, [pixels(1)])
    answers = []
    for model in (hostile, folded):
        listeners = calibrated(model, [pixels(1)]).rounding(Grid(8, signed=True), MAX)
        with hearing(projections(model), listeners):
            answers.append(outputs(model))
        assert not torch.equal(answers[-1][3], outputs(model)[3])
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))


def test_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    forms = ((Grid(8, signed=True), MAX), (ASYMMETRIC, "99.9 %"), (Grid(4, signed=False), MSE))
    assert set(forms) < set(bench_attention.FORMS)
    monkeypatch.setattr(bench_attention, "FORMS", forms)
    assert bench_attention.main(["--scenes", "1", "--calibration", "1"]) == 0
    head, rule, *rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert head == list(bench_attention.HEADER)
    assert set(rule) == {"---"}
    of_model = {name: [row[1:] for row in rows if row[0] == name] for name in (DEMO, HOSTILE)}
    assert [row[0] for row in of_model[DEMO]] == ["FP32", "FP16", "INT8, symmetric", "INT8", "INT4"]
    assert [row[1] for row in of_model[DEMO]] == ["—", "—", MAX, "99.9 %", MSE]
    assert [row[2] for row in of_model[HOSTILE]] == ["—", "—", *["—", "7 of 7"] * 3]
    for name, least in ((DEMO, 1.0), (HOSTILE, 0.999)):
        agreement = [float(row[5].split()[0]) for row in of_model[name]]
        assert agreement[0] >= least
        assert min(agreement) < 0.98
    assert of_model[HOSTILE][2][3:6] == of_model[HOSTILE][3][3:6]  # signs are nothing to a grid around zero
    assert of_model[HOSTILE][3][6].split()[0] == "+0.0000"
