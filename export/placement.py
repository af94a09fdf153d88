"""Where INT8 pays: which layers run in INT8, with or without their low-rank branch, and which in FP16.

A placement is a YAML file that `samq-export place` measures, and that can be read, edited, reused and committed:

    gpu: NVIDIA H100 80GB HBM3          # where it was measured; neither is needed
    tensorrt: 8.6.0
    layers:                             # the first pattern that a layer's name matches decides, * for anything
      vision_encoder.backbone.blocks.12.*: fp16
      "*": int8
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from samq.files import write_text
from samq.quant.config_file import load_yaml

Form = Literal["fp16", "int8", "branch", "fold"]


class Placement(BaseModel):
    """The form that each layer takes on TensorRT."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    gpu: Annotated[str, Field(description="where it was measured: the driver's name of the GPU, or a part of it")] = ""
    tensorrt: Annotated[str, Field(description="version that it was measured with")] = ""
    layers: Annotated[
        dict[str, Form],
        Field(description="pattern of layer names → fp16, int8 (branches as --low-rank says), branch or fold"),
    ] = {}
    milliseconds: Annotated[
        dict[str, dict[Form, float]], Field(description="block → form → median of its runs alone")
    ] = {}

    def form(self, layer: str) -> Form:
        """The form of a layer; int8 where no pattern matches."""
        return next((form for pattern, form in self.layers.items() if fnmatchcase(layer, pattern)), "int8")

    def save(self, path: Path) -> Path:
        """Write the file; `load_placement` reads it back equal."""
        write_text(path, yaml.safe_dump(self.model_dump(), sort_keys=False))
        return path


EVERYWHERE = Placement()
SHIPPED = Path(__file__).parent / "placements"


def load_placement(path: Path) -> Placement:
    """Read a placement.

    Raises:
        UsageError: the file cannot be read or holds none; the message names line and key.
    """
    return load_yaml(path, Placement)


def fastest(milliseconds: dict[str, dict[Form, float]], gpu: str, tensorrt: str) -> Placement:
    """For each block the form that took least, of those that could be built.

    Args:
        milliseconds: block → form → median of its runs.
    """
    layers: dict[str, Form] = {}
    for block, times in milliseconds.items():
        if times:
            layers[f"{block}.*"] = min(times, key=times.__getitem__)
    return Placement(gpu=gpu, tensorrt=tensorrt, layers=layers, milliseconds=milliseconds)


def shipped_for(gpu: str, tensorrt: str) -> Placement:
    """The placement that samq ships for a GPU and TensorRT's major version; everything in INT8 where there is none.

    Args:
        gpu: as the driver calls it, such as "NVIDIA H100 80GB HBM3".
        tensorrt: version, such as "8.6.0".
    """
    for path in sorted(SHIPPED.glob("*.yaml")):
        placement = load_placement(path)
        if placement.gpu in gpu and placement.tensorrt.partition(".")[0] == tensorrt.partition(".")[0]:
            return placement
    return EVERYWHERE
