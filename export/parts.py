"""Writing the ONNX files of a model's parts."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import onnx
import onnx_ir as ir
from torch import nn

from samq.export.linear import fill_sites, store_as_fp16
from samq.export.trace import set_parameters
from samq.files import written_whole
from samq.quant.layers import LayerCodes

EXTERNAL_DATA_ABOVE = 1_900_000_000  # bytes; a protobuf ends at 2 GiB


def float_part(skeleton: ir.Model, model: nn.Module, *, half: bool) -> ir.Model:
    """The baseline: float weights, stored in FP32, or in FP16 (`half`) with FP32 arithmetic.

    Args:
        skeleton: from `samq.export.trace.trace`; not changed.
        model: the float `Sam2Model`.
    """
    filled = fill_sites(set_parameters(skeleton, model), _linears(model))
    return store_as_fp16(filled, rounding=True) if half else filled


def quantized_part(skeleton: ir.Model, model: nn.Module, codes: Mapping[str, LayerCodes]) -> ir.Model:
    """The canonical Q/DQ form of the quantized model, what stays float in FP16 where that is exact."""
    filled = fill_sites(set_parameters(skeleton, model), _linears(model) | dict(codes))
    return store_as_fp16(filled, rounding=False)


def save_part(model: ir.Model, path: Path) -> list[Path]:
    """Check and write one part; returns the files, an external-data file too where the part is large.

    Raises:
        onnx.checker.ValidationError: the graph is not valid (a bug).
        MachineLacks: the disk is full or not writable.
    """
    data = path.with_name(f"{path.name}.data")
    external = data.name if _stored_bytes(model) > EXTERNAL_DATA_ABOVE else None
    with (
        written_whole(path) as temporary,
        tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", suffix=".part") as folder,
    ):
        written = Path(folder) / path.name
        ir.save(model, written, external_data=external)
        onnx.checker.check_model(str(written), full_check=True)
        if external is not None:
            with written_whole(data) as whole:
                (Path(folder) / external).replace(whole)
        written.replace(temporary)
    if external is not None:
        return [path, data]
    data.unlink(missing_ok=True)  # of a larger model that stood here
    return [path]


def _stored_bytes(model: ir.Model) -> int:
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)


def _linears(model: nn.Module) -> dict[str, nn.Linear | LayerCodes]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
