"""Output directories with TensorRT plans that no GPU has built: dummy files with the sidecars of real ones."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import onnx

from samq.calib.parts import PARTS
from samq.engines.tensorrt_plan import BuildOptions, PlanInfo, PlanTensor, save_info
from samq.tools.outdir import OutputDir

MODELS = {"image_encoder": "sam_image_encoder", "mask_decoder": "sam_mask_decoder"}
MOST = {"batch": 2, "prompts": 5, "points": 7}


def built(out: Path, folder: str, make: Callable[[Path, str], list[Path]]) -> Path:
    """The same job with another engine: `make(folder, part)` writes its files."""
    directory = OutputDir.open(out)
    engine = out / "engines" / folder
    engine.mkdir()
    directory.record("build", [path for part in PARTS for path in make(engine, part)], seconds=0.0)
    return out


def with_plans(
    out: Path, capability: tuple[int, int] = (9, 0), *, dynamic: Collection[str] = tuple(MOST), sha256: str = "0" * 64
) -> Path:
    """Dummy plans in FP16, with the sidecars of real ones; sides that are not dynamic are 1."""

    def make(engine: Path, part: str) -> list[Path]:
        graph = onnx.load(out / "engines" / "onnxruntime" / f"{part}.onnx", load_external_data=False).graph

        def size(side: Any) -> int | str:
            name: str = side.dim_param
            return (name if name in dynamic else 1) if name else int(side.dim_value)

        def tensors(values: Any) -> tuple[PlanTensor, ...]:
            return tuple(
                PlanTensor(
                    value.name,
                    tuple(map(size, value.type.tensor_type.shape.dim)),
                    "int64" if value.name == "point_labels" else "float16",
                )
                for value in values
            )

        plan = engine / f"{part}.plan"
        plan.write_bytes(f"plan of {part} for {capability}".encode())
        options = BuildOptions(ranges={side: (1, 1, most) for side, most in MOST.items()})
        info = PlanInfo(
            gpu="a GPU", capability=capability, tensorrt="10.16.1", onnx=f"{part}.onnx", onnx_sha256=sha256,
            strongly_typed=True, inputs=tensors(graph.input), outputs=tensors(graph.output), options=options,
            seconds=1.0, plan_bytes=plan.stat().st_size, gemms=(), layers=(), warnings=(),
        )  # fmt: skip
        save_info(plan, info)
        return [plan, plan.with_name(f"{plan.name}.json")]

    return built(out, "trt10", make)
