"""The exact changes of basis that were folded into a model, kept so that its float twin can be made again.

Shifting, smoothing and rotation change what single layers put out, though not what the model does. Only the float
model with the same folds can be compared with the quantized one layer by layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import Sam2Model

from samq.errors import BadInput
from samq.files import written_whole
from samq.quant.rotate import rotate_values
from samq.quant.shift import fold_offset
from samq.quant.sites import fold_sites
from samq.quant.smooth import fold_scale
from samq.quant.streams import residual_streams, rotate_stream

FILE_NAME = "folds.safetensors"
OFFSET, SCALE, ROTATED, STREAM = ".offset", ".scale", ".rotated", ".stream"


@dataclass
class Folds:
    """What was folded where; sites are known by the name of their source (see `samq.quant.sites`).

    Args:
        offsets: source → z [K], which was then subtracted from the inputs of its site's layers.
        scales: source → s [K], by which these were then divided.
        rotated: sources whose value heads were rotated, last of all.
        streams: names of the residual streams that were rotated, before anything else (see `samq.quant.streams`).
    """

    offsets: dict[str, Tensor] = field(default_factory=dict)
    scales: dict[str, Tensor] = field(default_factory=dict)
    rotated: list[str] = field(default_factory=list)
    streams: list[str] = field(default_factory=list)

    def apply(self, model: Sam2Model) -> None:
        """Fold all of it into a float `Sam2Model`, in place."""
        for stream in residual_streams(model) if self.streams else []:
            if stream.name in self.streams:
                rotate_stream(model, stream)
        sites = fold_sites(model)
        for site in sites:
            if site.source in self.offsets:
                fold_offset(model, site, self.offsets[site.source])
        for site in sites:
            if site.source in self.scales:
                fold_scale(model, site, self.scales[site.source])
        for site in sites:
            if site.source in self.rotated:
                rotate_values(model, site)

    def save(self, directory: Path) -> Path:
        """Write folds.safetensors; returns its path.

        Raises:
            MachineLacks: the disk is full or not writable.
        """
        names = [f"{source}{ROTATED}" for source in self.rotated] + [f"{name}{STREAM}" for name in self.streams]
        tensors = {name: torch.ones(1, dtype=torch.bool) for name in names}
        for suffix, vectors in ((OFFSET, self.offsets), (SCALE, self.scales)):
            tensors |= {f"{source}{suffix}": vector.cpu().contiguous() for source, vector in vectors.items()}
        path = directory / FILE_NAME
        with written_whole(path) as temporary:
            temporary.write_bytes(save(tensors))
        return path

    @staticmethod
    def load(directory: Path) -> Folds:
        """Read what `save` wrote.

        Raises:
            BadInput: the file is missing or corrupt.
        """
        path = directory / FILE_NAME
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise BadInput(f"{path} is missing or corrupt; run `samq-export quantize` again") from error
        offsets, scales = (
            {name.removesuffix(suffix): tensor for name, tensor in tensors.items() if name.endswith(suffix)}
            for suffix in (OFFSET, SCALE)
        )
        rotated, streams = (
            [name.removesuffix(suffix) for name in tensors if name.endswith(suffix)] for suffix in (ROTATED, STREAM)
        )
        return Folds(offsets, scales, rotated, streams)
