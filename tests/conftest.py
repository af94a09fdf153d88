"""Fixtures for all tests."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from small_model import small_sam2
from transformers import Sam2Model

settings.register_profile("samq", derandomize=True, deadline=None, database=None)  # the same examples in every run
settings.load_profile("samq")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # the tensors are small; threads would only wait for each other


@pytest.fixture(scope="session")
def small_model() -> Sam2Model:
    """A small SAM2 model; not to be changed."""
    return small_sam2()


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, as at a terminal; a shell's jobs in the background start without."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
