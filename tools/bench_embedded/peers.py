"""Peers: what other tools make of the FP32 encoder that samq exports, each by its own documented way.

ONNX Runtime's `quant_pre_process` infers no shapes symbolically here, as that stops at the graph's free batch size; its
other steps are run. NNCF quantizes for transformers (`ModelType.TRANSFORMER`), which is SmoothQuant and INT8. OpenVINO
starts from what those steps leave: it does not compile the graph as exported within minutes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onnxruntime.quantization import (  # type: ignore[import-untyped]
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process  # type: ignore[import-untyped]

from samq.calib.parts import ENCODER_INPUTS, IMAGE_ENCODER
from samq.errors import MachineLacks
from samq.tools.bench_embedded.subject import Graphs
from samq.tools.bench_gpu.cells import DEMO
from samq.tools.quiet import quiet

OPENVINO = "OpenVINO or NNCF is not installed; run `pip install openvino nncf`"


class _Images(CalibrationDataReader):  # type: ignore[misc]
    """The calibration images, one after the other."""

    def __init__(self, graphs: Graphs) -> None:
        self._feeds = iter([{ENCODER_INPUTS[0]: image} for image in graphs.calibration])

    def get_next(self) -> dict[str, Any] | None:
        return next(self._feeds, None)


def static(graphs: Graphs, key: str, *, unsigned: bool) -> Path:
    """ONNX Runtime's `quantize_static`: Q/DQ of every operator that it can, weights per channel.

    Args:
        unsigned: activations as unsigned INT8 (U8S8), else signed (S8S8).
    """
    path = graphs.peer(key)
    if not path.exists():
        with quiet():
            quantize_static(
                str(_prepared(graphs)),
                str(path),
                _Images(graphs),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8 if unsigned else QuantType.QInt8,
                weight_type=QuantType.QInt8,
            )
    return path


def dynamic(graphs: Graphs, key: str) -> Path:
    """ONNX Runtime's `quantize_dynamic`, as it is called by default."""
    path = graphs.peer(key)
    if not path.exists():
        with quiet():
            quantize_dynamic(str(_prepared(graphs)), str(path))
    return path


def openvino(graphs: Graphs, key: str, *, quantized: bool) -> Path:
    """OpenVINO's own form of the encoder for one image: FP32, or quantized by NNCF.

    Raises:
        MachineLacks: they are not installed.
    """
    try:
        import nncf
        from openvino import Core, save_model
    except ImportError as error:
        raise MachineLacks(OPENVINO) from error
    path = graphs.peer(key, "xml")
    if not path.exists():
        with quiet():
            model = Core().read_model(_prepared(graphs))
            model.reshape({ENCODER_INPUTS[0]: list(graphs.calibration[0].shape)})
            if quantized:
                model = nncf.quantize(
                    model,
                    nncf.Dataset(graphs.calibration),
                    model_type=nncf.ModelType.TRANSFORMER,
                    subset_size=len(graphs.calibration),
                    advanced_parameters=nncf.AdvancedQuantizationParameters(
                        disable_bias_correction=graphs.subject.name != DEMO  # random weights: the same graph sooner
                    ),
                )
            save_model(model, path, compress_to_fp16=False)
    return path


def _prepared(graphs: Graphs) -> Path:
    path = graphs.peer("prepared")
    if not path.exists():
        quant_pre_process(str(graphs.fp32(IMAGE_ENCODER)), str(path), skip_symbolic_shape=True)
    return path
