"""The same work on many tensors: in order, without gradients, errors and all; on a GPU in threads, the same bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from samq.quant import side_by_side as module
from samq.quant.gptq import factorize
from samq.quant.low_rank import truncated_svd
from samq.quant.side_by_side import side_by_side

CPU = torch.device("cpu")


def matrices(count: int, side: int, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(side, side, generator=generator).to(device) for _ in range(count)]


def test_results_stand_in_the_order_of_the_items() -> None:
    assert side_by_side(lambda x: 2 * x, range(20), CPU) == [2 * x for x in range(20)]
    assert side_by_side(lambda x: x, [], CPU) == []


def test_no_gradients_are_kept() -> None:
    (found,) = side_by_side(lambda x: x * 2, [torch.ones(2, requires_grad=True)], CPU)
    assert not found.requires_grad


def test_what_the_work_raises_is_raised() -> None:
    with pytest.raises(ValueError, match="zero or not finite"):
        side_by_side(lambda x: factorize(x, 0.01), [torch.eye(2), torch.zeros(2, 2)], CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA GPU here")
def test_threads_find_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    weights = matrices(24, 96, device)
    alone = [truncated_svd(weight, 8) for weight in weights]
    together = side_by_side(lambda weight: truncated_svd(weight, 8), weights, device)
    assert all(torch.equal(a.up, b.up) and torch.equal(a.down, b.down) for a, b in zip(alone, together, strict=True))
    with pytest.raises(ValueError, match="zero or not finite"):
        side_by_side(lambda x: factorize(x, 0.01), [torch.zeros(2, 2, device=device)] * 3, device)
    monkeypatch.setattr(module, "THREADS", 1)
    one = side_by_side(lambda weight: truncated_svd(weight, 8), weights, device)
    assert all(torch.equal(a.up, b.up) for a, b in zip(alone, one, strict=True))
