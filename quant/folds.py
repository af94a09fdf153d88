"""The exact changes of basis that were folded into a model, kept so that its float twin can be made again.

Rotation and smoothing change what single layers put out, though not what the model does. Only the float model with the
same folds can be compared with the quantized one layer by layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from samq.errors import BadInput
from samq.files import written_whole
from samq.quant.rotate import rotate_values
from samq.quant.sites import fold_sites
from samq.quant.smooth import fold_scale

FILE_NAME = "folds.safetensors"
ROTATED, SCALE = ".rotated", ".scale"


@dataclass
class Folds:
    """What was folded where; sites are known by the name of their source (see `samq.quant.sites`).

    Args:
        rotated: sources whose value heads were rotated, before any scale.
        scales: source → s [K], by which the inputs of its site's layers were divided.
    """

    rotated: list[str] = field(default_factory=list)
    scales: dict[str, Tensor] = field(default_factory=dict)

    def apply(self, model: nn.Module) -> None:
        """Fold all of it into a float `Sam2Model`, in place."""
        sites = fold_sites(model)
        for site in sites:
            if site.source in self.rotated:
                rotate_values(model, site)
        for site in sites:
            if site.source in self.scales:
                fold_scale(model, site, self.scales[site.source])

    def save(self, directory: Path) -> Path:
        """Write folds.safetensors; returns its path.

        Raises:
            MachineLacks: the disk is full or not writable.
        """
        tensors = {f"{source}{ROTATED}": torch.ones(1, dtype=torch.bool) for source in self.rotated}
        tensors |= {f"{source}{SCALE}": scale.cpu().contiguous() for source, scale in self.scales.items()}
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
        rotated = [name.removesuffix(ROTATED) for name in tensors if name.endswith(ROTATED)]
        scales = {name.removesuffix(SCALE): tensor for name, tensor in tensors.items() if name.endswith(SCALE)}
        return Folds(rotated, scales)
