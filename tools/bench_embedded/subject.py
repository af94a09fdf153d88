"""The two models that are measured, and what every row's graph is made from."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import onnx_ir as ir

from samq.calib.parts import PARTS
from samq.calib.sources import open_source, take
from samq.export.lower_onnxruntime import lower_for_onnxruntime
from samq.export.parts import float_part, quantized_part, save_part
from samq.export.trace import trace
from samq.tools.bench_gpu.cells import DEMO
from samq.tools.bench_gpu.subject import NOISE_IMAGES, Pixels, Subject, noise
from samq.tools.demo.dataset import IMAGES

MOST_CALIBRATION = 32


class Graphs:
    """ONNX parts of one model, each written when it is first asked for.

    Args:
        name: "tiny" with random weights, which is timed, or "demo", whose masks are compared with the truth.
        folder: where to; what is there already is used.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.subject = Subject.load(name, "cpu")
        self.folder = folder

    def fp32(self, part: str) -> Path:
        """As samq exports it; peers start from this encoder too."""
        path = self.folder / "fp32" / f"{part}.onnx"
        if not path.exists():
            save_part(float_part(self._traces[part], self.subject.model, half=False), path)
        return path

    def rewritten(self, part: str) -> Path:
        """FP32, with samq's exact rewrites for ONNX Runtime on the CPU."""
        path = self.folder / "rewritten" / f"{part}.onnx"
        if not path.exists():
            save_part(lower_for_onnxruntime(ir.load(self.fp32(part))), path)
        return path

    def preset(self, preset: str, part: str) -> Path:
        """Quantized by a preset and lowered, as `samq-export build` does."""
        path = self.folder / preset / f"{part}.onnx"
        if not path.exists():
            made = self.subject.quantized(preset)
            save_part(lower_for_onnxruntime(quantized_part(self._traces[part], made.model, made.codes)), path)
        return path

    def peer(self, key: str, suffix: str = "onnx") -> Path:
        """Where a peer's encoder goes; its folder exists."""
        path = self.folder / key / f"image_encoder.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    @cached_property
    def calibration(self) -> list[Pixels]:
        """Images [1, 3, S, S] for peers to calibrate on: noise for random weights, else shipped scenes."""
        if self.subject.name != DEMO:
            return [noise(self.subject.model, 1, seed) for seed in range(1, 1 + NOISE_IMAGES)]  # as `Subject.quantized`
        shipped = take(open_source(str(IMAGES)), MOST_CALIBRATION)
        return [self.subject.processor(sample.image).pixel_values[None] for sample in shipped]

    @cached_property
    def _traces(self) -> dict[str, ir.Model]:
        return {part: trace(self.subject.model, part) for part in PARTS}
