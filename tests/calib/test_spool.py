"""Tensors that outgrow a budget go to files, and come back as they were."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from samq.calib.spool import CPU_BUDGET, Spool, memory_budget
from samq.errors import MachineLacks

SIZE = 40  # bytes of each tensor below


def tensors(count: int) -> list[Tensor]:
    return [torch.full((10,), float(index)) for index in range(count)]


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def files_in(folder: Path) -> int:
    return sum(path.is_file() for path in folder.rglob("*"))


@pytest.mark.parametrize("fitting", [0, 1, 3, 5])
def test_what_does_not_fit_is_in_files(temporary: Path, fitting: int) -> None:
    with Spool(fitting * SIZE) as spool:
        for tensor in tensors(5):
            spool.append(tensor)
        assert len(spool) == 5
        assert spool.in_memory() == fitting * SIZE
        assert files_in(temporary) == 5 - fitting
        for found, expected in zip(spool, tensors(5), strict=True):
            assert torch.equal(found, expected)
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("fitting", [0, 2, 5])
def test_replacing_changes_one_and_frees_the_old(temporary: Path, fitting: int) -> None:
    with Spool(fitting * SIZE) as spool:
        for tensor in tensors(5):
            spool.append(tensor)
        for index, tensor in enumerate(spool):
            spool[index] = tensor[:5] + 10  # half as large, so twice as many fit
        assert [tensor.tolist() for tensor in spool] == [[10.0 + index] * 5 for index in range(5)]
        in_files = 5 - min(5, 2 * fitting)
        assert spool.in_memory() == (5 - in_files) * SIZE // 2
        assert files_in(temporary) == in_files


def test_a_view_takes_no_more_room_than_it_has(temporary: Path) -> None:
    with Spool(0) as spool:
        spool.append(torch.zeros(1000, 1000)[:1, :10])
        (path,) = (path for path in temporary.rglob("*") if path.is_file())
        assert path.stat().st_size < 10_000


def test_files_go_when_an_error_comes(temporary: Path) -> None:
    spool = Spool(0)
    spool.append(torch.zeros(3))
    assert files_in(temporary) == 1
    with pytest.raises(IndexError), spool:
        _ = spool[1]
    assert not list(temporary.iterdir())


def test_no_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(MachineLacks, match="set TMPDIR to a larger disk") as caught, Spool(0) as spool:
        spool.append(torch.zeros(3))
    assert len(str(caught.value).splitlines()) == 1


def test_the_budget_of_the_cpu_is_fixed() -> None:
    assert memory_budget(torch.device("cpu")) == CPU_BUDGET
