"""ONNX file → TensorRT network, with what TensorRT says about it in one line where it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from samq.engines.tensorrt_log import Log, parse_failure, version_of

if TYPE_CHECKING:
    import tensorrt as trt


def parse_into(api: Any, network: trt.INetworkDefinition, logger: trt.ILogger, log: Log, onnx_path: Path) -> None:
    """Read an ONNX file into an empty network.

    Raises:
        BadInput: the importer refuses it; the message names the node.
    """
    parser: trt.OnnxParser = api.OnnxParser(network, logger)
    if parser.parse_from_file(str(onnx_path)):
        return
    description = ""
    if parser.num_errors:
        error: trt.ParserError = parser.get_error(0)
        description = error.desc()
    raise parse_failure(onnx_path, description, log, version_of(api))
