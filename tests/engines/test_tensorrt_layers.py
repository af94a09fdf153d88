"""What the engine inspector says, read for 8.6, 10.x and 11; the answers have the form of those in TensorRT issues 4020
and 4397, with samq's names in them, and for 11 what its migration guide makes of them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from samq.engines.base import Executed
from samq.engines.tensorrt_layers import EngineLayer, executed, read_layers, with_regions

DATA = Path(__file__).parents[1] / "data" / "trt_inspector"
ORDER = (
    "a.qkv/QuantizeLinear",
    "a.qkv/MatMul",
    "a.qkv/Add",
    "a.norm/LayerNormalization",
    "a.mlp.0/MatMul",
    "a.mlp.1/MatMul",
    "a.mlp.1/Add",
    "b.query/MatMul",
    "b.key/MatMul",
    "b.query/low_rank/down",
    "b.value/MatMul",
)
GEMMS = tuple(name for name in ORDER if name.endswith(("/MatMul", "/down")))


def layers_of(version: str) -> tuple[EngineLayer, ...]:
    return read_layers((DATA / f"{version}.json").read_text(encoding="utf-8"))


def test_layers_of_8_6() -> None:
    found = executed(with_regions(layers_of("8.6"), ORDER, GEMMS), GEMMS)
    computes = {name: layer.compute for name, layer in found.items()}
    hidden = "unknown (inside a fused region, FP16 at its edges)"
    assert computes == {
        "a.qkv": "INT8 GEMM",
        "a.mlp.0": hidden,
        "a.mlp.1": hidden,
        "b.query": "FP16 GEMM",
        "b.key": "FP16 GEMM",
        "b.query/low_rank/down": "FP16 GEMM",
        "b.value": "unknown (the engine inspector does not name it)",
    }
    assert found["a.mlp.0"].operator == "Myelin"
    assert found["a.qkv"].operator.startswith("sm80_xmma_fprop_implicit_gemm_interleaved_i8i8")


def test_layers_of_10() -> None:
    gemms = ("a.qkv/MatMul", "a.mlp.0/MatMul", "b.query/MatMul", "b.key/MatMul")
    found = executed(with_regions(layers_of("10"), gemms, gemms), gemms)
    assert {name: layer.compute for name, layer in found.items()} == {
        "a.qkv": "INT8 GEMM",
        "a.mlp.0": "INT4 weights, FP16 arithmetic",
        "b.query": "FP16 GEMM",
        "b.key": "FP16 GEMM",
    }
    assert "i8i8" in found["a.qkv"].operator, "the transposing kernel names the node too, and is no GEMM"


def as_11_tells(account: dict[str, Any]) -> str:
    """The same account as TensorRT 11 gives it, weights among the constants."""
    for layer in account["Layers"]:
        for tensor in (*layer["Inputs"], *layer["Outputs"]):
            tensor |= {"Datatype": tensor.pop("Format/Datatype"), "Format": "Row major linear FP32 format (kLINEAR)"}
        layer["Inputs"], layer["Constants"] = layer["Inputs"][:1], layer["Inputs"][1:]
        layer["Metadata"] = [layer["Metadata"]]
    return json.dumps({"Layers": account["Layers"], "I/O Tensors": []})


def test_layers_of_11() -> None:
    text = (DATA / "10.json").read_text(encoding="utf-8")
    assert read_layers(as_11_tells(json.loads(text, strict=False))) == read_layers(text)


@pytest.mark.parametrize("text", ["[]", "3", '{"Layers": 3}', '{"Layers": [null]}', '{"Layers": [{"Inputs": ["x"]}]}'])
def test_an_account_of_another_form_is_told(text: str) -> None:
    with pytest.raises(ValueError, match="unknown form"):
        read_layers(text)


def test_precision_of_every_layer() -> None:
    assert [layer.precision for layer in layers_of("8.6")] == [
        "FP32", "FP16", "INT8", "FP16", "FP16", "FP16", "FP16", "FP16",
    ]  # fmt: skip
    assert [layer.precision for layer in layers_of("10")] == ["FP16", "INT8", "FP16", "FP16", "FP16"]


def test_nodes_of_every_layer() -> None:
    nodes = [layer.nodes for layer in layers_of("8.6")]
    assert nodes[0] == nodes[3] == (), "copies are called by whom they serve, and are not it"
    assert nodes[2][2:] == ("a.qkv/MatMul", "a.qkv/Add")
    assert nodes[5] == ("b.query/MatMul", "b.key/MatMul")
    assert nodes[7] == ("b.gelu/Erf", "b.gelu/Mul")
    assert layers_of("10")[1].nodes == ("a.qkv/DequantizeLinear", "a.qkv/MatMul", "a.qkv/Add")


def region(name: str, *nodes: str) -> EngineLayer:
    return EngineLayer(f"{{ForeignNode[{name}]}}", "Myelin", "FP16", "", "", nodes)


def test_the_smallest_region_gets_a_gemm() -> None:
    wide, narrow = (
        region("a.qkv/Add...b.value/MatMul"),
        region("a.norm/LayerNormalization...a.mlp.1/Add + b.key/MatMul"),
    )
    found = with_regions((wide, narrow), ORDER, GEMMS)
    assert found[1].nodes == ("a.mlp.0/MatMul", "a.mlp.1/MatMul", "b.query/MatMul", "b.key/MatMul")
    assert found[0].nodes == ("b.query/low_rank/down", "b.value/MatMul")


def test_regions_that_tell_their_nodes_or_hide_their_ends_are_left() -> None:
    told, hidden = (
        region("a.qkv/Add...b.key/MatMul", "a.mlp.0/MatMul"),
        region("(Unnamed Layer* 3) [Shuffle]...a.mlp.1/Add"),
    )
    assert with_regions((told, hidden), ORDER, GEMMS) == (told, hidden)


def test_a_layer_of_several_gemms_is_told_as_one() -> None:
    parts = [EngineLayer(f"q/MatMul_{p}", "gemm", "FP16", "", "tactic", (f"q/MatMul_{p}",)) for p in "qk"]
    parts.append(EngineLayer("q/MatMul_v", "gemm", "INT8", "", "other", ("q/MatMul_v",)))
    gemms = [layer.name for layer in parts]
    assert executed(parts[:2], gemms[:2]) == {"q": Executed("FP16 GEMM", "tactic")}
    assert executed(parts, gemms) == {"q": Executed("FP16 GEMM and INT8 GEMM", "tactic, other")}


def test_names_alone_say_no_precision() -> None:
    """What the inspector gives for a plan that was built without detailed profiling."""
    layers = read_layers('{"Layers": ["a.qkv/MatMul + a.qkv/Add"], "Bindings": ["x"]}')
    assert executed(layers, ["a.qkv/MatMul"]) == {"a.qkv": Executed("unknown", "unknown")}


@pytest.mark.parametrize(
    ("text", "precision"),
    [
        ("Row major linear BFloat16", "BF16"),
        ("Channel major FP16 format where channel % 8 == 0", "FP16"),
        ("Half", "FP16"),
        ("Float", "FP32"),
        ("Row major linear INT8 format", "INT8"),
        ("FP8", "FP8"),
        ("Float8E4M3", "FP8"),
        ("Int32", "unknown"),
        ("Row major linear INT64", "unknown"),
    ],
)
def test_number_types_of_tensors(text: str, precision: str) -> None:
    tensor = f'[{{"Name": "x", "Format/Datatype": "{text}"}}]'
    (layer,) = read_layers(f'{{"Layers": [{{"Name": "n", "LayerType": "t", "Inputs": {tensor}, "Outputs": []}}]}}')
    assert layer.precision == precision
