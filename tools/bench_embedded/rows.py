"""The rows of the benchmark: what each is called, how its encoder is made, and what runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from samq.calib.parts import IMAGE_ENCODER, MASK_DECODER
from samq.tools.bench_embedded import peers
from samq.tools.bench_embedded.openvino_engine import OPENVINO
from samq.tools.bench_embedded.subject import Graphs
from samq.tools.engine_start import ONNXRUNTIME

FP32, REWRITTEN = "fp32", "fp32-rewritten"
FP32_DECODER = partial(Graphs.fp32, part=MASK_DECODER)


@dataclass(frozen=True)
class Row:
    """One way to run the image encoder.

    Args:
        key: in the record, and of the folder of its graph.
        title: in the table.
        make: writes the encoder's file and returns it.
        engine: what opens the file, as `samq.tools.engine_start.opener` takes it.
        decoder: writes samq's mask decoder that goes with it; peers leave the FP32 one as it is exported.
        peer: another tool's, whose errors are entries of the table.
    """

    key: str
    title: str
    make: Callable[[Graphs], Path]
    engine: str = ONNXRUNTIME
    decoder: Callable[[Graphs], Path] = FP32_DECODER
    peer: bool = False


def _preset(key: str, title: str) -> Row:
    encoder, decoder = (partial(Graphs.preset, preset=key, part=part) for part in (IMAGE_ENCODER, MASK_DECODER))
    return Row(key, title, encoder, decoder=decoder)


def _static(key: str, kind: str, *, unsigned: bool) -> Row:
    make = partial(peers.static, key=key, unsigned=unsigned)
    return Row(key, f"ONNX Runtime `quantize_static`, {kind}", make, peer=True)


def _openvino(key: str, title: str, *, quantized: bool) -> Row:
    return Row(key, title, partial(peers.openvino, key=key, quantized=quantized), engine=OPENVINO, peer=True)


_ALL = (
    Row(FP32, "FP32, as samq exports it", partial(Graphs.fp32, part=IMAGE_ENCODER)),
    Row(
        REWRITTEN,
        "FP32 with samq's exact rewrites",
        partial(Graphs.rewritten, part=IMAGE_ENCODER),
        decoder=partial(Graphs.rewritten, part=MASK_DECODER),
    ),
    _preset("int8_w8a8", "samq W8A8 (`int8_w8a8`)"),
    _preset("int4_w4a8", "samq W4A8 (`int4_w4a8`)"),
    _preset("int4_svdquant", "samq SVDQuant (`int4_svdquant`)"),
    _preset("int4_w4only", "samq weights only (`int4_w4only`)"),
    _static("ort-static-u8s8", "U8S8", unsigned=True),
    _static("ort-static-s8s8", "S8S8", unsigned=False),
    Row("ort-dynamic", "ONNX Runtime `quantize_dynamic`", partial(peers.dynamic, key="ort-dynamic"), peer=True),
    _openvino("openvino", "OpenVINO, FP32", quantized=False),
    _openvino("nncf", "OpenVINO with NNCF, INT8", quantized=True),
)

ROWS = {row.key: row for row in _ALL}
DECODERS = (FP32, REWRITTEN, "int4_w4a8")  # whose mask decoders are timed; all presets leave the same one in float
