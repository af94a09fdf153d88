"""Each rewrite for TensorRT leaves the numbers as they are, and changes what it says."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from exported import as_written, largest_error
from lowered import feeds, static_form

from samq.calib.parts import IMAGE_ENCODER, MASK_DECODER
from samq.export.fold import fold_constants
from samq.export.graph import add_initializer
from samq.export.lower_tensorrt import lower_for_tensorrt
from samq.export.tensorrt_rewrites import REWRITES, concat_pad, head_width, pair_max, rewrite
from samq.export.tensorrt_targets import TRT8, TRT10, TensorRtTarget

EXACT = 1e-6
FLIPS = 2e-3  # an INT8 code flips when its input moves by the last bit of float32
GONE = {"split_qkv": "Split", "pair_max": "ReduceMax", "concat_pad": "Pad"}
APPLY = tuple(name for name in REWRITES if name != "wide_heads")  # 128 pixels give 64 keys at most; see test_pad_heads


def written(model: ir.Model) -> bytes:
    """The file of a model."""
    return ir.to_proto(model).SerializeToString(deterministic=True)


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


@pytest.mark.parametrize("rewrites", [*((name,) for name in APPLY), tuple(REWRITES)], ids="+".join)
@pytest.mark.parametrize("name", ["float", "int8_w8a8"])
def test_the_encoder_answers_as_before(name: str, rewrites: tuple[str, ...]) -> None:
    plain = lower_for_tensorrt(static_form(name, IMAGE_ENCODER), TRT8).model
    changed = lower_for_tensorrt(static_form(name, IMAGE_ENCODER), TRT8, rewrites=rewrites).model
    onnx.checker.check_model(ir.to_proto(changed), full_check=True)
    assert written(changed) != written(plain)
    for rewritten in rewrites:
        if rewritten in GONE:
            assert operators(plain)[GONE[rewritten]] > 0
            assert operators(changed)[GONE[rewritten]] == 0
    given = feeds(plain)
    for found, expected in zip(as_written(changed, given), as_written(plain, given), strict=True):
        assert largest_error(found, expected) < (EXACT if name == "float" else FLIPS)


@pytest.mark.parametrize("target", [TRT8, TRT10], ids=lambda target: target.name)
@pytest.mark.parametrize("name", ["float", "int8_w8a8"])
def test_the_decoder_is_left_alone(name: str, target: TensorRtTarget) -> None:
    """It has a GEMM each for queries, keys and values, and neither windows nor maxima nor padding."""
    plain = lower_for_tensorrt(static_form(name, MASK_DECODER), target).model
    changed = lower_for_tensorrt(static_form(name, MASK_DECODER), target, rewrites=REWRITES).model
    assert written(changed) == written(plain)


def test_how_many_places_were_changed() -> None:
    model = static_form("float", IMAGE_ENCODER)
    fold_constants(model)
    before = operators(model)
    changed = rewrite(model, REWRITES)
    assert changed["pair_max"] == before["ReduceMax"]
    assert changed["concat_pad"] == before["Pad"]
    assert [name for name, places in changed.items() if places] == list(APPLY)
    assert rewrite(model, ()) == {}
    with pytest.raises(KeyError, match="no_such"):
        rewrite(model, ("no_such",))


@pytest.mark.parametrize(("width", "keys", "wanted"), [(56, 4096, 64), (72, 4096, 80), (96, 4096, 96), (56, 196, 56)])
def test_head_widths(width: int, keys: int, wanted: int) -> None:
    assert head_width(width, keys) == wanted


def one_node(op: str, shape: tuple[int | str, ...], constants: list[np.ndarray], **attributes: object) -> ir.Model:
    x = ir.Value(name="x", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 18}, name="g")
    inputs = [add_initializer(graph, f"c{index}", array) for index, array in enumerate(constants)]
    node = ir.node(op, [x, *inputs], attributes, name="n")  # type: ignore[arg-type]
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph.append(node)
    graph.outputs.append(node.outputs[0])
    return ir.Model(graph, ir_version=9)


@pytest.mark.parametrize(
    ("shape", "axes", "changed"),
    [((3, 2, 4, 2), [1, 3], 1), ((3, 2, 4, 2), [-1], 1), ((3, 2, 4), [2], 0), (("n", 2), [0], 0)],
)
def test_maxima(shape: tuple[int | str, ...], axes: list[int], changed: int) -> None:
    model = one_node("ReduceMax", shape, [np.array(axes)], keepdims=0)
    given = {"x": np.random.default_rng(0).standard_normal([s if isinstance(s, int) else 3 for s in shape], np.float32)}
    expected = as_written(model, given)
    assert pair_max(model) == changed
    np.testing.assert_array_equal(as_written(model, given)[0], expected[0])


@pytest.mark.parametrize(
    ("padding", "filling", "changed"),
    [
        ([0, 0, 0, 0, 2, 1], 0.0, 1),
        ([0, 0, 0, 0, 0, 0], 0.0, 0),
        ([0, 1, 0, 0, 2, 1], 0.0, 0),
        ([0, 0, 0, 0, 2, 1], 1.0, 0),
        ([0, 0, 0, 0, -1, 0], 0.0, 0),
    ],
)
def test_paddings(padding: list[int], filling: float, changed: int) -> None:
    model = one_node("Pad", (2, 3, 4), [np.array(padding), np.array(filling, np.float32)])
    given = {"x": np.random.default_rng(0).standard_normal((2, 3, 4), np.float32)}
    expected = as_written(model, given)
    assert concat_pad(model) == changed
    np.testing.assert_array_equal(as_written(model, given)[0], expected[0])
