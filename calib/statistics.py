"""What calibration learns about the inputs of each linear layer, gathered in one pass with bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from samq.calib.histogram import Histogram

SAMPLE_ROWS = 1024


@dataclass
class InputStatistics:
    """Statistics of one layer's inputs x [rows, K].

    Args:
        low, high: [K] smallest and largest value of each channel.
        total: [K] Σ x in float64.
        hessian: [K, K] Σ x xᵀ in float32, or None when nothing asked for it.
        sample: [≤ SAMPLE_ROWS, K] rows, about equally many of each call.
        rows: number of rows seen.
        share: rows that the next call puts into the sample.
        histogram: of all values of all channels, or None when nothing asked for it. It knows no channels, so none of
            the changes below can be accounted for: they leave None.
    """

    low: Tensor
    high: Tensor
    total: Tensor
    hessian: Tensor | None
    sample: Tensor
    rows: int = 0
    share: int = SAMPLE_ROWS
    histogram: Histogram | None = None

    @staticmethod
    def empty(inputs: int, with_hessian: bool, device: torch.device, with_histogram: bool = False) -> InputStatistics:
        """Statistics of no rows at all."""
        return InputStatistics(
            low=torch.full((inputs,), torch.inf, device=device),
            high=torch.full((inputs,), -torch.inf, device=device),
            total=torch.zeros(inputs, dtype=torch.float64, device=device),
            hessian=torch.zeros(inputs, inputs, device=device) if with_hessian else None,
            sample=torch.empty(0, inputs, device=device),
            histogram=Histogram() if with_histogram else None,
        )

    def add(self, x: Tensor) -> None:
        """Take in inputs [..., K]. A sample that has grown too large loses every other row, and so do later calls."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        low, high = x.aminmax(dim=0)
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        self.total += x.sum(0, dtype=torch.float64)
        if self.hessian is not None:
            self.hessian.addmm_(x.T, x)
        if self.histogram is not None:
            self.histogram.add(x)
        self.sample = torch.cat([self.sample, x[_spread(len(x), min(self.share, len(x)), x.device)]])
        if len(self.sample) > SAMPLE_ROWS:
            self.sample, self.share = self.sample[::2], max(1, self.share // 2)
        self.rows += len(x)

    def rescale(self, factor: Tensor) -> None:
        """Account for inputs that are from now on multiplied by `factor` [K] > 0."""
        self.low, self.high, self.sample = self.low * factor, self.high * factor, self.sample * factor
        self.total *= factor
        self.histogram = None
        if self.hessian is not None:
            self.hessian *= factor * factor[:, None]

    def rescaled(self, factor: Tensor) -> InputStatistics:
        """Range and sample of inputs that are multiplied by `factor` [K] > 0; without the Hessian."""
        copied = replace(self, hessian=None, total=self.total.clone())
        copied.rescale(factor)
        return copied

    def shift(self, offset: Tensor) -> None:
        """Account for inputs from which `offset` c [K] is from now on subtracted.

        Σ (x − c)(x − c)ᵀ = Σ x xᵀ − c tᵀ − t cᵀ + n c cᵀ with t = Σ x. The large terms cancel in float64, but Σ x xᵀ
        was summed in float32: a channel whose offset is r times its deviation keeps a relative error of about r²·10⁻⁷.
        """
        self.low, self.high, self.sample = self.low - offset, self.high - offset, self.sample - offset
        exact = offset.double()
        self.histogram = None
        if self.hessian is not None:
            # c tᵀ + t cᵀ − n c cᵀ = u + uᵀ with u = c (t − n c / 2)ᵀ
            taken = torch.outer(exact, self.total - self.rows / 2 * exact)
            self.hessian = (self.hessian.double() - taken - taken.T).float()
        self.total -= self.rows * exact

    def rotate(self, rotation: Tensor) -> None:
        """Account for inputs x that are from now on R x, with R [K, K] in float64.

        What range they have is known of the sample alone, and so is the range from now on.
        """
        self.sample = (self.sample.double() @ rotation.T).float()
        if self.rows:
            self.low, self.high = self.sample.amin(0), self.sample.amax(0)
        self.total = rotation @ self.total
        self.histogram = None
        if self.hessian is not None:
            self.hessian = (rotation @ self.hessian.double() @ rotation.T).float()

    def mean(self) -> Tensor:
        """[K] in float64; zeros of no rows."""
        return self.total / max(self.rows, 1)

    def covariance(self) -> Tensor:
        """Σ (x − m)(x − m)ᵀ [K, K] with m the mean; needs the Hessian. A channel that never changes has exactly 0."""
        assert self.hessian is not None
        centred = (self.hessian.double() - torch.outer(self.total, self.mean())).float()
        centred.diagonal().clamp_(min=0)
        return centred

    def is_finite(self) -> bool:
        """Neither an input nor a sum of their products overflowed or was NaN."""
        gathered = [self.high - self.low] if self.rows else []
        if self.hessian is not None:
            gathered.append(self.hessian)
        return all(bool(torch.isfinite(tensor).all()) for tensor in gathered)

    def absmax(self) -> Tensor:
        """[K] largest magnitude of each channel."""
        return torch.maximum(-self.low, self.high)


@lru_cache(maxsize=64)
def _spread(rows: int, count: int, device: torch.device) -> Tensor:
    """[count] numbers of rows, evenly spread; kept, for hundreds of layers ask for the same at every image."""
    return torch.linspace(0, rows - 1, count, device=device).round().long()


@dataclass
class Recorder:
    """Records `InputStatistics` of named linear layers while the model runs.

    Args:
        layers: name → module with `in_features`.
        with_hessian: also gather Σ x xᵀ.
        with_histogram: also count the values.
    """

    layers: Mapping[str, nn.Linear]
    with_hessian: bool
    with_histogram: bool = False
    statistics: dict[str, InputStatistics] = field(default_factory=dict)

    @contextmanager
    def recording(self) -> Iterator[dict[str, InputStatistics]]:
        """Hooks are in place inside the `with` block, and removed at its end whatever happens."""
        for name, layer in self.layers.items():
            self.statistics[name] = InputStatistics.empty(
                layer.in_features, self.with_hessian, layer.weight.device, self.with_histogram
            )
        with listening(self.layers, self.statistics):
            yield self.statistics


@contextmanager
def listening(
    layers: Mapping[str, nn.Module], entries: Mapping[str, InputStatistics] | Mapping[str, Histogram]
) -> Iterator[None]:
    """Inside the `with` block, what each layer reads is added to its entry."""
    handles = []
    try:
        for name, layer in layers.items():
            handles.append(layer.register_forward_pre_hook(_adding_to(entries[name])))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adding_to(entry: InputStatistics | Histogram) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        entry.add(args[0])

    return hook
