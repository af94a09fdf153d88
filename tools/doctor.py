"""`samq-export doctor`: what this machine can do, and what its engines would execute for each preset."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
from typing import Any

import onnxruntime  # type: ignore[import-untyped]
import torch

from samq.engines import tensorrt
from samq.engines.tensorrt_log import ANOTHER_PYTHON
from samq.errors import MachineLacks
from samq.quant.config import load_recipe, preset_names
from samq.tools.report.environment import environment
from samq.tools.targets import executions, target_for


def examine() -> dict[str, Any]:
    """Facts about the machine, as JSON values."""
    return {
        **environment(),
        "onnxruntime_providers": onnxruntime.get_available_providers(),
        "gpu": _gpu(),
        "torch_cuda": torch.cuda.is_available(),
        "tensorrt": _tensorrt(),
        "cupti_python": _version("cupti-python"),
        "modelopt": _version("nvidia-modelopt"),
        "triton_client": _version("tritonclient"),
        "int8_instructions": _int8_instructions(),
        "free_disk_gb": round(shutil.disk_usage(".").free / 1e9, 1),
        "presets": {name: executions(load_recipe(name)) for name in preset_names()},
    }


def as_text(facts: dict[str, Any]) -> str:
    """The facts for a person."""
    lines = [f"{key:<22} {_shown(value)}" for key, value in facts.items() if key != "presets"]
    lines += ["", "what a quantized layer is lowered to (`validate` reads what the runtime makes of it):"]
    for name, engines in facts["presets"].items():
        lines += [f"  {name:<18} {engine}: {compute}" for engine, compute in engines.items()]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if value is None:
        return "not installed"
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _tensorrt() -> str | None:
    """Version of the TensorRT that samq uses, which may be another interpreter's, and what is wrong with it."""
    python = os.environ.get(ANOTHER_PYTHON)
    try:
        version = tensorrt.about()[0] if python else _version("tensorrt")
    except MachineLacks as error:
        return f"unknown ({error})"
    if version is None:
        return None
    told = f"{version}, of {python}" if python else version
    try:
        target_for(version)
    except MachineLacks as error:
        return f"{told} ({error})"
    return told


def _gpu() -> list[str]:
    """GPUs by nvidia-smi, which needs no Python package."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError):  # a driver that hangs is no GPU to count on
        return []
    return answer.stdout.strip().splitlines() if answer.returncode == 0 else []


def _int8_instructions() -> list[str]:
    """CPU instructions that make INT8 GEMMs fast."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            flags = next((line for line in file if line.startswith("flags")), "").split()
    except OSError:
        return []
    return [flag for flag in ("avx2", "avx512_vnni", "avx_vnni", "amx_int8") if flag in flags]
