"""Statistics of each block, behind the blocks before it as they are by then."""

from __future__ import annotations

import copy

import pytest
import torch
from small_model import pixels
from torch import nn
from transformers import Sam2Model

from samq.calib.block_walk import BlockWalk
from samq.calib.calibrate import calibrate
from samq.calib.parts import BACKBONE
from samq.calib.spool import CPU_BUDGET, Spool
from samq.calib.statistics import InputStatistics
from samq.errors import BadInput

BATCHES = [pixels(2), pixels(1, 1)]


def layers_of(model: Sam2Model) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def walk_of(model: Sam2Model) -> BlockWalk:
    kept = Spool(CPU_BUDGET)
    for batch in BATCHES:
        kept.append(batch)
    return BlockWalk(model, kept, with_hessian=True)


def same(found: InputStatistics, expected: InputStatistics) -> None:
    assert found.rows == expected.rows
    for name in ("low", "high", "total", "sample", "hessian"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-3)


def test_of_a_model_that_stays_it_is_what_one_pass_finds(small_model: Sam2Model) -> None:
    layers = layers_of(small_model)
    expected = calibrate(small_model, layers, BATCHES, with_hessian=True, with_decoder=True)
    steps = list(walk_of(small_model).steps(layers))
    assert [name for statistics in steps for name in statistics] == sorted(
        layers, key=lambda name: not name.startswith(BACKBONE)
    )
    assert len(steps) == 5 + 1  # blocks and the decoder
    for statistics in steps:
        for name, entry in statistics.items():
            same(entry, expected[name])


@pytest.mark.parametrize("tokens_in_memory", [True, False])
def test_each_block_stands_behind_the_changed_ones(
    small_model: Sam2Model, tokens_in_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not tokens_in_memory:
        monkeypatch.setattr("samq.calib.block_walk.memory_budget", lambda device: 0)
    model, layers = copy.deepcopy(small_model), layers_of(small_model)
    found: dict[str, InputStatistics] = {}
    for statistics in walk_of(model).steps(layers):
        found |= statistics
        with torch.no_grad():
            for name in statistics:
                model.get_parameter(f"{name}.weight").mul_(0.8)
    # What a layer saw: everything before its block changed, nothing else.
    for index in range(5):
        until = copy.deepcopy(small_model)
        with torch.no_grad():
            for before in range(index):
                for name in layers:
                    if name.startswith(f"{BACKBONE}.blocks.{before}."):
                        until.get_parameter(f"{name}.weight").mul_(0.8)
        of_block = {n: m for n, m in layers_of(until).items() if n.startswith(f"{BACKBONE}.blocks.{index}.")}
        for name, entry in calibrate(until, of_block, BATCHES, with_hessian=True, with_decoder=False).items():
            same(found[name], entry)
    in_decoder = [name for name in layers if not name.startswith(BACKBONE)]
    until = copy.deepcopy(small_model)
    with torch.no_grad():
        for name in layers:
            if name.startswith(BACKBONE):
                until.get_parameter(f"{name}.weight").mul_(0.8)
    modules = {name: layers_of(until)[name] for name in in_decoder}
    for name, entry in calibrate(until, modules, BATCHES, with_hessian=True, with_decoder=True).items():
        same(found[name], entry)


def test_blocks_without_layers_are_walked_through(small_model: Sam2Model) -> None:
    names = [f"{BACKBONE}.blocks.{index}.mlp.proj_in" for index in (1, 3)]
    expected = calibrate(small_model, {n: layers_of(small_model)[n] for n in names}, BATCHES, True, False)
    steps = list(walk_of(small_model).steps(names))
    assert [list(statistics) for statistics in steps] == [[name] for name in names]
    for statistics in steps:
        for name, entry in statistics.items():
            same(entry, expected[name])


def test_what_is_not_finite_is_named(small_model: Sam2Model) -> None:
    model = copy.deepcopy(small_model)
    with torch.no_grad():
        model.get_parameter(f"{BACKBONE}.blocks.2.layer_norm1.weight").fill_(torch.inf)
    with pytest.raises(BadInput, match=r"blocks\.2\.attn\.qkv: its inputs are not finite"):
        list(walk_of(model).steps(layers_of(model)))
    assert all(not module._forward_pre_hooks for module in model.modules())
