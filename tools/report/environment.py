"""Machine and versions, for every figure that depends on them."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import onnxruntime  # type: ignore[import-untyped]
import torch
import transformers


def environment() -> dict[str, Any]:
    """Machine and versions, as JSON values."""
    return {
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "onnxruntime": onnxruntime.__version__,
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
