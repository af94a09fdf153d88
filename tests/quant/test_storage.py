"""`weights/`: bit for bit back, and every broken file in one line."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_model import outputs, pixels, recipe_of
from torch import Tensor
from transformers import Sam2Model

from samq.errors import BadInput, MachineLacks
from samq.quant.config import Recipe, preset_names
from samq.quant.layers import QuantizedLinear, replace_module
from samq.quant.quantize import quantize
from samq.quant.storage import FILE_NAME, FORMAT, load_quantized, save_quantized

LAYER = "vision_encoder.backbone.blocks.0.attn.qkv"
RECIPES: dict[str, Callable[[], Recipe]] = {
    **{preset: lambda preset=preset: recipe_of(preset) for preset in preset_names()},
    "per token": lambda: recipe_of("int4_w4a8_rtn", ipts={"mode": "dynamic", "granularity": "per_token"}),
    "dynamic": lambda: recipe_of("int4_w4a8_rtn", ipts={"mode": "dynamic"}),
    "uint8 inputs": lambda: recipe_of("int4_w4a8_rtn", ipts={"dtype": "uint8"}),
    "uint4 two-level": lambda: recipe_of(wgts={"dtype": "uint4", "group_shapes": [[1, 16]]}),
    "uint8 weights": lambda: recipe_of("int4_w4only_rtn", wgts={"dtype": "uint8", "group_shapes": [[1, 48]]}),
    "sint4 weights": lambda: recipe_of("int4_w4only_rtn", wgts={"dtype": "sint4", "group_shapes": [[1, -1]]}),
    "sint8 weights": lambda: recipe_of("int4_w4only_rtn", wgts={"dtype": "sint8", "group_shapes": [[1, 32]]}),
    "rotation": lambda: recipe_of("int4_w4a8_rtn", rotation={"enabled": True}),
    "rotation online": lambda: recipe_of(
        "int4_w4a8_rtn", smooth={"enabled": True, "multiply": True}, rotation={"enabled": True, "online": True}
    ),
    "high rank": lambda: recipe_of(
        wgts={"low_rank": {"rank": 8, "compensate": True, "max_overhead": 0.5}, "skip_decoder": True}
    ),
    "shared": lambda: recipe_of(
        "int4_svdquant", wgts={"low_rank": {"rank": 4, "max_overhead": None, "shared_down": True}}
    ),
    "shared, 8 bits": lambda: recipe_of(
        "int8_w8a8", wgts={"low_rank": {"rank": 4, "max_overhead": None, "shared_down": True}}
    ),
    "first block": lambda: recipe_of(wgts={"skip_first_block": True, "skip_decoder": True}),
}


@pytest.mark.parametrize("name", RECIPES)
def test_bit_for_bit(small_model: Sam2Model, name: str, tmp_path: Path) -> None:
    saved = quantize(small_model, RECIPES[name](), [pixels(1)])
    path = save_quantized(tmp_path, saved.model, saved.codes)
    assert path == tmp_path / FILE_NAME
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", FILE_NAME]
    torch.manual_seed(1)
    model, codes = load_quantized(tmp_path)

    assert not model.training
    before, after = saved.model.state_dict(), model.state_dict()
    assert list(before) == list(after)
    for key in before:
        assert before[key].dtype == after[key].dtype
        assert torch.equal(before[key], after[key]), key
    assert list(codes) == list(saved.codes)
    stored = load_file(path)
    for layer, entry in saved.codes.items():
        loaded = codes[layer]
        assert torch.equal(loaded.weight.codes, entry.weight.codes)
        assert torch.equal(loaded.weight.dequantize(), entry.weight.dequantize())
        assert loaded.weight.grid == entry.weight.grid
        assert loaded.inputs == entry.inputs
        assert (loaded.branch is None) == (entry.branch is None)
        assert loaded.down_of == entry.down_of
        assert loaded.rotated == entry.rotated
        assert (f"{layer}.down" in stored) == (entry.branch is not None and entry.down_of is None)
        keys = ("codes", "scale", "channel_scale", "zero_point", "down", "up", "multiplier")
        parts = [stored[f"{layer}.{key}"] for key in keys if f"{layer}.{key}" in stored]
        assert sum(part.numel() * part.element_size() for part in parts) == entry.stored_bytes()
        module = model.get_submodule(layer)
        assert isinstance(module, QuantizedLinear)
        assert module.codes is loaded
    for a, b in zip(outputs(saved.model), outputs(model), strict=True):
        assert torch.equal(a, b)

    save_quantized(tmp_path / "again", model, codes)
    assert (tmp_path / "again" / FILE_NAME).read_bytes() == path.read_bytes()


@pytest.fixture(scope="module")
def written(small_model: Sam2Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    saved = quantize(small_model, recipe_of("int4_svdquant"), [pixels(1)])
    save_quantized(folder, saved.model, saved.codes)
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "weights"))


def test_layout(folder: Path) -> None:
    stored = load_file(folder / FILE_NAME)
    assert stored[f"{LAYER}.codes"].dtype == torch.uint8
    assert stored[f"{LAYER}.codes"].numel() == 96 * 32 // 2
    assert (stored[f"{LAYER}.scale"].dtype, stored[f"{LAYER}.scale"].shape) == (torch.int8, (96, 1))
    assert (stored[f"{LAYER}.channel_scale"].dtype, stored[f"{LAYER}.channel_scale"].shape) == (torch.float16, (96,))
    assert stored[f"{LAYER}.bias"].dtype == torch.float32
    assert f"{LAYER}.weight" not in stored
    assert stored["vision_encoder.neck.convs.0.weight"].dtype == torch.float16
    assert stored["vision_encoder.backbone.blocks.0.layer_norm1.weight"].dtype == torch.float32
    assert any(name.endswith(".down") and tensor.dtype == torch.float16 for name, tensor in stored.items())


def test_a_multiplier_comes_back(small_model: Sam2Model, tmp_path: Path) -> None:
    made = quantize(small_model, recipe_of("int4_w4only_rtn"), None)
    layer = made.codes[LAYER]
    multiplied = replace(layer, multiplier=torch.linspace(0.1, 3, layer.weight.codes.shape[1]))
    replace_module(made.model, LAYER, QuantizedLinear(multiplied))
    save_quantized(tmp_path, made.model, made.codes | {LAYER: multiplied})
    model, codes = load_quantized(tmp_path)
    found = codes[LAYER].multiplier
    assert found is not None
    assert multiplied.multiplier is not None
    assert torch.equal(found, multiplied.multiplier)
    assert [name for name, entry in codes.items() if entry.multiplier is not None] == [LAYER]
    for before, after in zip(outputs(made.model), outputs(model), strict=True):
        assert torch.equal(before, after)


Tensors = dict[str, Tensor]
Metadata = dict[str, str]


def rewrite(folder: Path, change: Callable[[Tensors, Metadata], object]) -> None:
    path = folder / FILE_NAME
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def edit_layers(metadata: Metadata, change: Callable[[dict[str, dict[str, object]]], object]) -> None:
    layers = json.loads(metadata[FORMAT])
    change(layers)
    metadata[FORMAT] = json.dumps(layers)


def test_a_file_from_before_rotations_at_run_time_loads(folder: Path) -> None:
    expected = load_quantized(folder)[1]
    rewrite(folder, lambda t, m: edit_layers(m, lambda x: [one.pop("rotated") for one in x.values()]))
    found = load_quantized(folder)[1]
    assert list(found) == list(expected)
    assert not any(layer.rotated for layer in found.values())


BROKEN: dict[str, Callable[[Path], object]] = {
    "no file": lambda f: (f / FILE_NAME).unlink(),
    "no config": lambda f: (f / "config.json").unlink(),
    "empty": lambda f: (f / FILE_NAME).write_bytes(b""),
    "not safetensors": lambda f: (f / FILE_NAME).write_bytes(b"PK\x03\x04" * 100),
    "truncated": lambda f: (f / FILE_NAME).write_bytes((f / FILE_NAME).read_bytes()[:-1000]),
    "truncated header": lambda f: (f / FILE_NAME).write_bytes((f / FILE_NAME).read_bytes()[:100]),
    "config is no JSON": lambda f: (f / "config.json").write_text("{"),
    "config is a list": lambda f: (f / "config.json").write_text("[]"),
    "config is binary": lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"),
    "config of another size": lambda f: (f / "config.json").write_text("{}"),
    "other format": lambda f: rewrite(f, lambda t, m: m.update({"samq-0": m.pop(FORMAT)})),
    "no format": lambda f: rewrite(f, lambda t, m: m.clear()),
    "layers are no JSON": lambda f: rewrite(f, lambda t, m: m.update({FORMAT: "{"})),
    "layers are a list": lambda f: rewrite(f, lambda t, m: m.update({FORMAT: "[]"})),
    "unknown layer": lambda f: rewrite(f, lambda t, m: edit_layers(m, lambda x: x.update({"a.b": x[LAYER]}))),
    "unknown grid": lambda f: rewrite(f, lambda t, m: edit_layers(m, lambda x: x[LAYER].update(grid={"bits": 4}))),
    "wrong shape": lambda f: rewrite(f, lambda t, m: edit_layers(m, lambda x: x[LAYER].update(shape=[96, 48]))),
    "forgotten layer": lambda f: rewrite(f, lambda t, m: edit_layers(m, lambda x: x.pop(LAYER))),
    "missing codes": lambda f: rewrite(f, lambda t, m: t.pop(f"{LAYER}.codes")),
    "missing scale": lambda f: rewrite(f, lambda t, m: t.pop(f"{LAYER}.scale")),
    "missing bias": lambda f: rewrite(f, lambda t, m: t.pop(f"{LAYER}.bias")),
    "missing factor": lambda f: rewrite(f, lambda t, m: t.pop(next(key for key in t if key.endswith(".down")))),
    "missing branch": lambda f: rewrite(
        f, lambda t, m: [t.pop(key) for key in list(t) if key.endswith((".down", ".up"))]
    ),
    "factor of no layer": lambda f: rewrite(
        f, lambda t, m: edit_layers(m, lambda x: [one.update(down_of="a.b") for one in x.values()])
    ),
    "missing tensor": lambda f: rewrite(f, lambda t, m: t.pop("vision_encoder.neck.convs.0.weight")),
    "short codes": lambda f: rewrite(f, lambda t, m: t.update({f"{LAYER}.codes": t[f"{LAYER}.codes"][:10].clone()})),
    "short scale": lambda f: rewrite(f, lambda t, m: t.update({f"{LAYER}.scale": t[f"{LAYER}.scale"][:10].clone()})),
    "extra tensor": lambda f: rewrite(f, lambda t, m: t.update(extra=torch.zeros(1))),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_bad_input_in_one_line(folder: Path, name: str) -> None:
    BROKEN[name](folder)
    with pytest.raises(BadInput) as caught:
        load_quantized(folder)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert len(message) < 500
    assert str(folder) in message
    assert "samq-export quantize" in message
    assert ("config.json" in message) == (name.startswith(("no config", "config is")))


def test_a_file_that_cannot_be_written_whole_is_not_there(small_model: Sam2Model, tmp_path: Path) -> None:
    saved = quantize(small_model, recipe_of("int4_w4only_rtn"), None)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(MachineLacks, match=FILE_NAME):
            save_quantized(tmp_path, saved.model, saved.codes)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []
