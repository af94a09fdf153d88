"""Layers that share a down-projection, in ONNX: one constant, one product of one tensor, the simulation's numbers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args

import onnx_ir as ir
import pytest
import torch
from exported import as_written, canonical, largest_error, one_layer, quantized
from lowered import HALF_ERROR, distance, feeds, static_form
from small_model import pixels, recipe_of, relative
from test_linear import PER_TOKEN, STATIC_S8, codes, simulated, tokens
from torch.nn import functional as F

from samq.calib.parts import IMAGE_ENCODER, MASK_DECODER, PARTS, ImageEncoder, part_of
from samq.engines.onnxruntime import OnnxRuntimeEngine, executed_layers
from samq.export.graph import LAYER_KEY, LOW_RANK, constant_of, producer
from samq.export.linear import fill_sites
from samq.export.lower_onnxruntime import lower_for_onnxruntime
from samq.export.lower_onnxruntime_cuda import Weights, lower_for_onnxruntime_cuda
from samq.export.lower_tensorrt import lower_for_tensorrt
from samq.export.lowered_layer import INT8_GEMM
from samq.export.parts import save_part
from samq.export.placement import Form, Placement
from samq.export.tensorrt_rewrites import REWRITES
from samq.export.tensorrt_targets import TRT8
from samq.quant.config import Recipe
from samq.quant.inputs import InputGrid
from samq.quant.layers import LayerCodes
from samq.quant.low_rank import LowRank
from samq.tools.targets import requested_compute

BLOCK, ATTENTION = "vision_encoder.backbone.blocks", "mask_decoder.transformer.layers"
FIRST, SECOND = "a.layer", "b.layer"
EXACT, FP16 = 1e-5, 2e-3
SHARED = {"low_rank": {"rank": 4, "max_overhead": None, "shared_down": True}}
WEIGHTS_ONLY = recipe_of("int4_w4only_rtn", wgts=SHARED)
W4A8 = recipe_of("int4_w4a8", wgts=SHARED)
PRODUCTS = {  # first layer that shares → products, and layers that read them
    IMAGE_ENCODER: {f"{BLOCK}.{index}.attn.qkv": (count, 2) for index, count in ((1, 1), (2, 1), (4, 2))},
    MASK_DECODER: {
        f"{ATTENTION}.0.self_attn.q_proj": (1, 3),
        f"{ATTENTION}.0.cross_attn_token_to_image.k_proj": (1, 2),
        f"{ATTENTION}.0.cross_attn_image_to_token.k_proj": (1, 3),
        f"{ATTENTION}.0.cross_attn_image_to_token.v_proj": (1, 2),
        f"{ATTENTION}.1.cross_attn_token_to_image.k_proj": (1, 2),
        f"{ATTENTION}.1.cross_attn_image_to_token.k_proj": (1, 2),
    },
}


def twins(inputs: InputGrid | None, rank: int = 4) -> dict[str, LayerCodes]:
    """Two layers that read one tensor, the second with the down-projection of the first."""
    first = codes(4, True, 16, inputs, rank=rank)
    second = codes(4, True, 0, inputs, rank=rank)
    assert first.branch is not None
    assert second.branch is not None
    shared = LowRank(first.branch.down, second.branch.up)
    return {FIRST: first, SECOND: replace(second, branch=shared, down_of=FIRST)}


def graph_of(layers: dict[str, LayerCodes]) -> ir.Model:
    """x → the second layer → z, x → the first one → y: the owner of the down-projection comes last."""
    model, _ = one_layer(layers[FIRST])
    site = model.graph[0]
    twin = ir.node(site.op_type, [site.inputs[0]], {"layer": SECOND}, domain=site.domain, name="twin")
    output = twin.outputs[0]
    output.name, output.type, output.shape = "z", site.outputs[0].type, site.outputs[0].shape
    model.graph.insert_before(site, twin)
    model.graph.outputs.append(output)
    return fill_sites(model, layers)


def downs(model: ir.Model) -> list[ir.Node]:
    """The products with down-projections."""
    return [node for node in model.graph if str(node.name).endswith(f"/{LOW_RANK}/down")]


def errors(model: ir.Model, layers: dict[str, LayerCodes], folder: Path) -> Iterator[float]:
    """How far the answers of ONNX Runtime are from the simulation's."""
    path = folder / "model.onnx"
    save_part(model, path)
    found = OnnxRuntimeEngine(path).run({"x": tokens()})
    for name, output in ((FIRST, "y"), (SECOND, "z")):
        yield largest_error(found[output], simulated(layers[name], tokens()))


@pytest.mark.parametrize("inputs", [None, STATIC_S8, PER_TOKEN])
def test_two_layers_compute_what_torch_simulates(inputs: InputGrid | None, tmp_path: Path) -> None:
    layers = twins(inputs)
    model = graph_of(layers)
    assert [name for name in model.graph.initializers if str(name).endswith("/down_weight")] == [
        f"{SECOND}/{LOW_RANK}/down_weight"
    ]
    assert len(downs(model)) == 1
    found = as_written(model, {"x": tokens()})
    for answer, name in zip(found, (FIRST, SECOND), strict=True):
        assert largest_error(answer, simulated(layers[name], tokens())) < EXACT
    lowered = lower_for_onnxruntime(graph_of(layers))
    assert len(downs(lowered)) == 1
    assert max(errors(lowered, layers, tmp_path)) < EXACT


@pytest.mark.parametrize("weights", get_args(Weights))
def test_two_layers_in_the_graph_for_cuda(weights: Weights, tmp_path: Path) -> None:
    layers = twins(None)
    lowered = lower_for_onnxruntime_cuda(graph_of(layers), weights=weights).model
    assert len(downs(lowered)) == (0 if weights == "dequantized at load" else 1)  # in the weights of each
    assert max(errors(lowered, layers, tmp_path)) < FP16


@pytest.mark.parametrize("folded", [(), (FIRST,), (SECOND,), (FIRST, SECOND)], ids=["none", "one", "other", "both"])
def test_two_layers_in_the_graph_for_tensorrt(folded: tuple[str, ...]) -> None:
    """Kept, folded, or one of each: the product stays as long as a layer reads it."""
    layers = twins(STATIC_S8)
    placement = Placement(layers={**dict.fromkeys(folded, "fold"), "*": "branch"})
    lowered = lower_for_tensorrt(graph_of(layers), TRT8, placement=placement)
    assert {name: became.compute for name, became in lowered.layers.items()} == dict.fromkeys(layers, INT8_GEMM)
    assert {name for name, became in lowered.layers.items() if became.branch == "folded"} == set(folded)
    assert len(downs(lowered.model)) == (0 if len(folded) == len(layers) else 1)
    found = as_written(lowered.model, {"x": tokens()})
    for answer, (name, layer) in zip(found, layers.items(), strict=True):
        if name not in folded:
            assert largest_error(answer, simulated(layer, tokens())) < EXACT
            continue
        whole = F.linear(STATIC_S8.fake_quantize(torch.from_numpy(tokens())), layer.effective_weight(), layer.bias)
        assert EXACT < largest_error(answer, whole.numpy()) < 2e-2, "the weight is rounded again"


@pytest.mark.parametrize(
    ("first", "second", "sides"),
    [
        ("branch-8", "branch", [8, 12]),
        ("branch", "branch-8", [8, 12]),
        ("branch-8", "branch-8", [8]),
        ("fold", "branch-8", [8]),
        ("branch-8", "fp16", [8]),
    ],
)
def test_two_layers_of_which_branches_are_narrowed(first: Form, second: Form, sides: list[int]) -> None:
    """They share the product that both read, or a part of it."""
    layers, placement = twins(STATIC_S8, rank=12), Placement(layers={FIRST: first, SECOND: second})
    lowered = lower_for_tensorrt(graph_of(layers), TRT8, placement=placement)
    narrow = [node.inputs[1] for node in lowered.model.graph if "/low_rank/down" in str(node.name)]
    assert sorted(constant_of(factor).shape[1] for factor in narrow) == sides  # type: ignore[union-attr]
    found, x = as_written(lowered.model, {"x": tokens()}), torch.from_numpy(tokens())
    for answer, (name, layer) in zip(found, layers.items(), strict=True):
        assert layer.branch is not None
        form = placement.form(name)
        kept = {"branch": 12, "branch-8": 8}.get(form, 0)
        branch, inputs = layer.branch.up[:, :kept] @ layer.branch.down[:kept], STATIC_S8.fake_quantize(x)
        rest = F.linear(x if form == "fp16" else inputs, layer.effective_weight() - branch, layer.bias)
        error = largest_error(answer, (rest + F.linear(x, branch)).numpy())
        assert error < EXACT if form in ("branch", "fp16") else EXACT < error < 4e-2, "the weight is rounded again"


def test_two_layers_with_a_multiplier(tmp_path: Path) -> None:
    multiplier = torch.logspace(-1, 1, 80)
    layers = {name: replace(layer, multiplier=multiplier) for name, layer in twins(None).items()}
    model = lower_for_onnxruntime(graph_of(layers))
    assert max(errors(model, layers, tmp_path)) < EXACT


def test_it_is_stored_once_and_computed_once_for_each_tensor() -> None:
    """The windows of block 4 are filled up, so that its qkv reads a tensor of its own."""
    codes_of = quantized(W4A8).codes
    for part in PARTS:
        model = canonical(W4A8, part)
        owners = {name: codes.down_of or name for name, codes in codes_of.items() if part_of(name) == part}
        stored = [name for name in model.graph.initializers if str(name).endswith(f"/{LOW_RANK}/down_weight")]
        assert len(stored) == len(set(owners.values())) < len(owners)
        read: dict[str, list[ir.Node]] = defaultdict(list)
        for node in model.graph:
            if str(node.name).endswith(f"/{LOW_RANK}/up"):
                layer, down = node.metadata_props[LAYER_KEY], producer(node.inputs[0], "MatMul")
                assert down is not None
                weight, branch = constant_of(down.inputs[1]), codes_of[layer].branch
                assert weight is not None
                assert branch is not None
                assert (branch.down.numpy() == weight.T).all()
                read[owners[layer]].append(down)
        products = {owner: (len(set(downs)), len(downs)) for owner, downs in read.items() if len(downs) > 1}
        assert products == PRODUCTS[part]


@pytest.mark.parametrize(("recipe", "bound"), [(WEIGHTS_ONLY, EXACT), (W4A8, 4e-2)], ids=["W4A16", "W4A8"])
def test_a_whole_encoder_computes_what_torch_simulates(recipe: Recipe, bound: float, tmp_path: Path) -> None:
    """INT8 codes flip where float sums differ in their last bit; the tests above are sharp."""
    image, path = pixels(1, seed=3), tmp_path / "encoder.onnx"
    save_part(lower_for_onnxruntime(canonical(recipe, IMAGE_ENCODER)), path)
    engine = OnnxRuntimeEngine(path)
    found = engine.run({"pixel_values": image.numpy()})
    with torch.no_grad():
        expected = ImageEncoder(quantized(recipe).model)(image)
    for output, exact in zip(engine.outputs, expected, strict=True):
        assert relative(torch.from_numpy(found[output]) - exact, exact) < bound
    executed = executed_layers(path)
    layers = [name for name in quantized(recipe).codes if part_of(name) == IMAGE_ENCODER]
    assert {executed[name].compute for name in layers} == {requested_compute(recipe)}


def test_a_whole_decoder_is_lowered_exactly() -> None:
    model = canonical(WEIGHTS_ONLY, MASK_DECODER)
    inputs = feeds(model)
    expected = as_written(model, inputs)
    found = as_written(lower_for_onnxruntime(model), inputs)
    assert max(distance(*pair) for pair in zip(found, expected, strict=True)) < EXACT


@pytest.mark.parametrize("part", PARTS)
def test_whole_parts_for_gpus_compute_what_the_canonical_graph_does(part: str) -> None:
    """Rewrites take GEMMs apart, and CUDA's draw branches into weights."""
    model = static_form("int4_w4only_rtn", part, wgts=SHARED)
    inputs = feeds(model)
    expected = as_written(model, inputs)
    found = as_written(lower_for_tensorrt(model, TRT8, rewrites=REWRITES).model, inputs)
    assert max(distance(*pair) for pair in zip(found, expected, strict=True)) < EXACT
    on_cuda = lower_for_onnxruntime_cuda(static_form("int4_w4only_rtn", part, wgts=SHARED)).model
    found = as_written(on_cuda, inputs)
    assert max(distance(*pair) for pair in zip(found, expected, strict=True)) < HALF_ERROR
