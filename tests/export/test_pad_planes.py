"""Paddings written as paddings of planes: the same values, and the provider's fast kernel takes them."""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir
import pytest
from exported import float_model
from test_fuse_attention import fused, graph

from samq.calib.parts import IMAGE_ENCODER
from samq.export.graph import constant_of
from samq.export.lower_onnxruntime_cuda import lower_for_onnxruntime_cuda
from samq.export.pad_planes import MOST_AXES, pad_planes
from samq.export.parts import float_part
from samq.export.trace import StaticShape, trace

# Paddings (before, then behind), the shape of x, and the Reshapes of what becomes of it; none where it stays.
CASES = {
    "behind both sides of a window": ("0, 0, 0, 0, 0, 6, 3, 0", "2, 4, 5, 3", 2),
    "on all sides": ("0, 1, 2, 0, 0, 3, 4, 0", "2, 4, 5, 3", 2),
    "one axis in front of two": ("0, 1, 0, 0, 0, 0, 0, 0", "2, 4, 5, 3", 2),
    "one axis that is cut": ("0, -1, 0, 0, 0, 2, 0, 0", "2, 4, 5, 3", 2),
    "a batch that is not known": ("0, 0, 0, 0, 0, 1, 1, 0", "n, 4, 5, 3", 2),
    "five axes, the last two": ("0, 0, 0, 1, 1, 0, 0, 0, 0, 0", "2, 1, 2, 4, 5", 2),
    "planes already": ("0, 0, 0, 0, 0, 0, 1, 2", "2, 3, 4, 5", 0),
    "nothing": ("0, 0, 0, 0, 0, 0, 0, 0", "2, 3, 4, 5", 0),
}
REFUSED = {
    "axes that are no neighbours": ("0, 0, 0, 0, 1, 0, 1, 0", "2, 4, 5, 3"),
    "a side that is not known": ("0, 0, 0, 0, 0, 1, 1, 0", "2, 4, n, 3"),
    "two sides in front that are not known": ("0, 0, 0, 0, 0, 0, 0, 1, 1, 0", "n, m, 4, 5, 3"),
}


def padding(pads: str, shape: str, more: str = "", **_: str) -> ir.Model:
    outputs = ", ".join("abcdefgh"[: shape.count(",") + 1])
    body = f"pads = Constant <value_ints = [{pads}]> () {more or 'y = Pad (x, pads)'}"
    return graph(body, f"float[{shape}] x", f"float[{outputs}] y")


@pytest.mark.parametrize("case", CASES)
def test_padding(case: str) -> None:
    pads, shape, reshapes = CASES[case]
    done, operators = fused(padding(pads, shape), pad_planes)
    assert (done.count, done.refused) == (int(reshapes > 0), ())
    assert operators == Counter({"Pad": 1} | ({"Reshape": reshapes} if reshapes else {}))


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_fast_kernel_cannot_take_stays(case: str) -> None:
    done, operators = fused(padding(*REFUSED[case]), pad_planes)
    assert (done.count, operators) == (0, {"Pad": 1})
    assert done.refused == ("y: other axes grow than two neighbouring ones of known sides",)


def test_a_value_goes_along_and_edges_stay() -> None:
    value = "v = Constant <value_float = 2.5> () y = Pad (x, pads, v)"
    done, operators = fused(padding("0, 1, 0, 0, 0, 1, 1, 0", "2, 4, 5, 3", value), pad_planes)
    assert (done.count, operators["Reshape"]) == (1, 2)
    edge = 'y = Pad <mode = "edge"> (x, pads)'
    done, operators = fused(padding("0, 1, 0, 0, 0, 1, 1, 0", "2, 4, 5, 3", edge), pad_planes)
    assert (done.count, operators) == (0, {"Pad": 1})
    assert len(done.refused) == 1


def test_the_encoders_windows_are_padded_as_planes() -> None:
    """Their Reshapes merge with those that part windows, so that no node is added."""
    model = float_part(trace(float_model(), IMAGE_ENCODER, StaticShape()), float_model(), half=False)
    reshapes = [
        sum(node.op_type == "Reshape" for node in lower_for_onnxruntime_cuda(m, planes=planes).model.graph)
        for m, planes in ((model.clone(), False), (model.clone(), True))
    ]
    assert reshapes[0] == reshapes[1]
    pads = [node for node in lower_for_onnxruntime_cuda(model).model.graph if node.op_type == "Pad"]
    assert pads
    for pad in pads:
        amounts = constant_of(pad.inputs[1])
        assert amounts is not None
        before, behind = amounts.reshape(2, -1)
        assert len(before) <= MOST_AXES
        assert not before[:-2].any()
        assert not behind[:-2].any()
