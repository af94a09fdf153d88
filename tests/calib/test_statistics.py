"""Statistics of inputs against NumPy, with bounded memory and hooks that always go."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from samq.calib.histogram import Histogram
from samq.calib.statistics import SAMPLE_ROWS, InputStatistics, Recorder

CPU = torch.device("cpu")


def batches(*rows: int, inputs: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, inputs, generator=generator) * (1 + index) for index, n in enumerate(rows)]


@pytest.mark.parametrize("shape", [(12, 6), (3, 4, 6), (1, 2, 6, 6)])
@pytest.mark.parametrize("with_hessian", [True, False])
def test_ranges_and_hessian(shape: tuple[int, ...], with_hessian: bool) -> None:
    entry = InputStatistics.empty(6, with_hessian, CPU)
    seen = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    for x in seen:
        entry.add(x)
    rows = torch.cat([x.reshape(-1, 6) for x in seen]).double().numpy()
    assert entry.rows == len(rows)
    np.testing.assert_array_equal(entry.low.numpy(), rows.min(0))
    np.testing.assert_array_equal(entry.high.numpy(), rows.max(0))
    np.testing.assert_array_equal(entry.absmax().numpy(), np.abs(rows).max(0))
    np.testing.assert_allclose(entry.total.numpy(), rows.sum(0), rtol=1e-12)
    if with_hessian:
        assert entry.hessian is not None
        np.testing.assert_allclose(entry.hessian.numpy(), rows.T @ rows, rtol=1e-5, atol=1e-5)
    else:
        assert entry.hessian is None
    assert entry.is_finite()


@pytest.mark.parametrize("calls", [1, 2, 3, 10, 100])
def test_the_sample_is_bounded_and_spread(calls: int) -> None:
    entry = InputStatistics.empty(1, False, CPU)
    for call in range(calls):
        entry.add(torch.linspace(call, call + 0.9, 2000)[:, None])
    assert SAMPLE_ROWS // 2 <= len(entry.sample) <= SAMPLE_ROWS
    assert entry.rows == calls * 2000
    of_call = np.bincount(entry.sample[:, 0].int().numpy(), minlength=calls)
    assert of_call.max() <= 2 * of_call.min()
    first = entry.sample[: of_call[0], 0]  # of the first call: from its first row to its last
    assert (first.diff() > 0).all()
    assert first[0].item() == 0
    assert first[-1].item() == pytest.approx(0.9, abs=0.2)


@pytest.mark.parametrize("with_hessian", [True, False])
def test_rescaling_is_as_if_the_inputs_had_been_scaled(with_hessian: bool) -> None:
    factor = torch.logspace(-2, 2, 6)
    scaled, rescaled = (InputStatistics.empty(6, with_hessian, CPU) for _ in range(2))
    for x in batches(20, 30):
        scaled.add(x * factor)
        rescaled.add(x)
    rescaled.rescale(factor)
    for name in ("low", "high", "total", "sample", *(["hessian"] if with_hessian else [])):
        torch.testing.assert_close(getattr(rescaled, name), getattr(scaled, name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("with_hessian", [True, False])
@pytest.mark.parametrize("far", [0.0, 1.0, 30.0])
def test_shifting_is_as_if_the_inputs_had_been_shifted(with_hessian: bool, far: float) -> None:
    offset = far * torch.tensor([1.0, -1, 0.5, 0, -2, 3])
    shifted, moved = (InputStatistics.empty(6, with_hessian, CPU) for _ in range(2))
    for x in batches(200, 300):
        shifted.add(x)
        moved.add(x - offset)
        shifted.add(x + 2 * offset)
        moved.add(x + offset)
    shifted.shift(offset)
    assert shifted.rows == moved.rows
    for name in ("low", "high", "total", "sample"):
        torch.testing.assert_close(getattr(shifted, name), getattr(moved, name), rtol=1e-5, atol=1e-4 * (1 + far))
    if with_hessian:
        assert shifted.hessian is not None
        assert moved.hessian is not None
        assert float((shifted.hessian - moved.hessian).norm() / moved.hessian.norm()) < 1e-5


@pytest.mark.parametrize("with_hessian", [True, False])
def test_rotating_is_as_if_the_inputs_had_been_rotated(with_hessian: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q
    rotated, turned = (InputStatistics.empty(6, with_hessian, CPU) for _ in range(2))
    for x in batches(20, 30):  # all of which are in the sample
        rotated.add(x)
        turned.add((x.double() @ rotation.T).float())
    rotated.rotate(rotation)
    for name in ("low", "high", "total", "sample", *(["hessian"] if with_hessian else [])):
        torch.testing.assert_close(getattr(rotated, name), getattr(turned, name), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("far", [0.0, 1.0, 30.0])
def test_mean_and_covariance(far: float) -> None:
    entry = InputStatistics.empty(6, True, CPU)
    seen = [x + far for x in batches(200, 300)]
    for x in seen:
        x[:, 4] = far
        entry.add(x)
    rows = torch.cat(seen).double()
    torch.testing.assert_close(entry.mean(), rows.mean(0), rtol=1e-6, atol=1e-6)
    around = rows - rows.mean(0)
    found = entry.covariance().double()
    assert float((found - around.T @ around).norm() / (around.T @ around).norm()) < 1e-5 * (1 + far)
    assert (found.diagonal() >= 0).all()


def test_statistics_of_no_row_stay_so() -> None:
    entry = InputStatistics.empty(6, True, CPU)
    entry.rotate(torch.eye(6, dtype=torch.float64))
    assert entry.rows == 0
    assert (entry.low > entry.high).all()
    assert not entry.mean().any()
    assert not entry.covariance().any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("position", [0, 7])
def test_values_that_are_not_finite_show(value: float, position: int) -> None:
    entry = InputStatistics.empty(6, False, CPU)
    broken = batches(10)[0]
    broken[position, 2] = value
    entry.add(broken)
    entry.add(batches(10)[0])
    assert not entry.is_finite()


def test_an_overflow_of_the_hessian_shows() -> None:
    entry = InputStatistics.empty(6, True, CPU)
    entry.add(torch.full((2, 6), 1e20))
    assert torch.isfinite(entry.high).all()
    assert not entry.is_finite()


def test_a_histogram_counts_all_values_and_goes_with_any_change_of_the_inputs() -> None:
    seen = batches(200, 300)
    changes: list[Callable[[InputStatistics], object]] = [
        lambda entry: entry.rescale(torch.full((6,), 2.0)),
        lambda entry: entry.shift(torch.ones(6)),
        lambda entry: entry.rotate(torch.eye(6, dtype=torch.float64)),
    ]
    for change in changes:
        entry = InputStatistics.empty(6, False, CPU, with_histogram=True)
        for x in seen:
            entry.add(x)
        assert entry.histogram is not None
        assert torch.equal(entry.histogram.counts, Histogram.of(torch.cat(seen)).counts)
        assert entry.rescaled(torch.ones(6)).histogram is None
        assert entry.histogram is not None, "the copy lost it, not the entry"
        change(entry)
        assert entry.histogram is None
    assert InputStatistics.empty(6, True, CPU).histogram is None


def test_no_row_is_no_error() -> None:
    assert InputStatistics.empty(6, True, CPU).is_finite()


def hooks_of(module: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) for m in module.modules())


def test_recorder_listens_inside_its_block_only() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    layers = {"0": model[0], "2": model[2]}
    first, second = batches(5, 7)
    model(first)
    with Recorder(layers, True).recording() as statistics:
        assert hooks_of(model) == 2
        model(second)
    assert hooks_of(model) == 0
    model(first)
    assert statistics["0"].rows == statistics["2"].rows == 7
    torch.testing.assert_close(statistics["0"].sample, second)
    torch.testing.assert_close(statistics["2"].sample, model[:2](second).detach())


def test_recorder_lets_go_on_errors() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    with pytest.raises(KeyError), Recorder({"0": model[0]}, True).recording():
        raise KeyError
    assert hooks_of(model) == 0


def test_recorder_lets_go_when_a_layer_is_impossible() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU())
    with (
        pytest.raises(AttributeError),
        Recorder({"0": model[0], "1": model[1]}, True).recording(),  # type: ignore[dict-item]
    ):
        pass
    assert hooks_of(model) == 0
