"""Memory that a pair of ONNX Runtime engines needs on the CPU.

    python -m samq.tools.engine_memory image_encoder.onnx mask_decoder.onnx

opens both in a process of their own, segments one image with one box, and prints the peak of resident memory above what
the process held before, in bytes: weights, activations and the runtime's own buffers, without Python and libraries.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from samq.calib.prompts import boxes
from samq.engines.onnxruntime import OnnxRuntimeEngine
from samq.engines.predictor import Predictor
from samq.tools.memory import peak_bytes, reset_peak, resident_bytes


def measure_engine_memory(parts: Sequence[Path]) -> int | None:
    """Peak bytes that encoder and decoder add to a fresh process; None where that cannot be measured.

    Args:
        parts: the ONNX files of the image encoder and of the mask decoder.
    """
    command = [sys.executable, "-m", "samq.tools.engine_memory", *map(str, parts)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return int(done.stdout) if done.returncode == 0 and done.stdout.strip() else None


def main() -> None:
    """Print the peak; nothing where the system does not tell it."""
    before = resident_bytes()
    if before is None or not reset_peak():
        return
    predictor = Predictor(*(OnnxRuntimeEngine(Path(part)) for part in sys.argv[1:]))
    side = int(predictor.encoder.shapes["pixel_values"][-1])
    features = predictor.encode(np.zeros((3, side, side), np.float32))
    box = boxes(np.array([[0.25, 0.25, 0.75, 0.75]], np.float32) * side)
    predictor.decode(features, box.coords, box.labels)
    peak = peak_bytes()
    assert peak is not None
    print(peak - before)


if __name__ == "__main__":
    main()
