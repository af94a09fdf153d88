"""Every preset on the demo model: accuracy through the engine, size, and GPTQ against round-to-nearest.

    python -m samq.tools.bench_presets --json docs/presets.json

runs the main job for each preset on the 500 held-out scenes and prints one table:
    relative mIoU    quantized / FP32, both through ONNX Runtime, by prompt kind
    layers           bytes of the quantized layers against FP16
    GPTQ ≤ RTN       share of layers whose output error ‖(W − Ŵ) X‖² GPTQ leaves no larger than rounding does
Speed is in each job's report, not here: accuracy does not depend on the machine's load.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from samq.calib.checkpoint import load_checkpoint
from samq.calib.sources import open_source, take
from samq.files import write_json
from samq.quant.config import Recipe, preset_names
from samq.quant.quantize import quantize
from samq.tools.demo.dataset import CHECKPOINT, IMAGES, SCENES
from samq.tools.job import Job, open_data
from samq.tools.markdown_table import line
from samq.tools.progress import Reporter
from samq.tools.report.environment import environment
from samq.tools.stages import claim, load, recipe_of, run_stages

STAGES = ("quantize", "export", "build", "validate")


def main() -> None:
    """Print the table; with --json also write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=preset_names(), help="presets or YAML files")
    parser.add_argument("--scenes", type=int, default=SCENES)
    parser.add_argument("--json", type=Path, help="also write the figures here, after each preset")
    arguments = parser.parse_args()
    rows = []
    for preset in arguments.presets:
        rows.append(_measure(preset, arguments.scenes))
        print(_line(rows[-1]) if len(rows) > 1 else f"{HEAD}\n{_line(rows[-1])}", flush=True)
        if arguments.json is not None:
            write_json(arguments.json, {"scenes": arguments.scenes, "environment": environment(), "presets": rows})


def _measure(preset: str, scenes: int) -> dict[str, Any]:
    recipe = recipe_of(preset, None)
    job = Job.of(recipe, model=str(CHECKPOINT), calib_data=str(IMAGES), num_eval_samples=scenes)
    checkpoint, data = load(job), open_data(job, recipe)
    with tempfile.TemporaryDirectory() as folder:
        out = claim(Path(folder), job, recipe, checkpoint, data, force=False)
        report = run_stages(out, job, recipe, STAGES, (None, None), Reporter(quiet=True), data, checkpoint)
    by_kind = report["accuracy"]["by_kind"]
    return {
        "preset": preset,
        **{
            f"{kind}_{key}": part[key]
            for kind, part in by_kind.items()
            for key in ("miou_baseline", "miou_quantized", "miou_relative", "agreement_iou", "count")
        },
        "quantized_layers": report["size"]["quantized_layers"],
        "quantized_layers_ratio": report["size"]["quantized_layers_ratio"],
        "file_ratio": report["size"]["file_ratio"],
        "disagreements": report["disagreements"],
        "gptq_no_worse": _gptq_against_rtn(recipe),
    }


def _gptq_against_rtn(recipe: Recipe) -> dict[str, int] | None:
    """Number of layers, and of those in which GPTQ's output error is no larger than round-to-nearest's."""
    if recipe.wgts.kernel_gptq is None:
        return None
    values = recipe.model_dump()
    values["wgts"]["kernel_gptq"] = None
    errors = [_output_errors(recipe), _output_errors(Recipe.model_validate(values))]
    better = sum(errors[0][layer] <= errors[1][layer] for layer in errors[0])
    return {"layers": len(errors[0]), "no_worse": better}


def _output_errors(recipe: Recipe) -> dict[str, float]:
    checkpoint = load_checkpoint(str(CHECKPOINT))
    source = open_source(IMAGES)
    count = min(recipe.calib.num_samples, len(source))
    batches = (
        torch.from_numpy(checkpoint.processor(sample.image).pixel_values)[None] for sample in take(source, count)
    )
    result = quantize(checkpoint.model, recipe, batches, measure=True)
    return {name: notes.output_error for name, notes in result.notes.items() if notes.output_error is not None}


HEAD = (
    "| preset | box: FP32 | quantized | relative | click: FP32 | quantized | relative | layers | ONNX | GPTQ ≤ RTN |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


def _line(row: dict[str, Any]) -> str:
    compared = row["gptq_no_worse"]
    cells = [
        row["preset"],
        *(f"{row[f'{kind}_{key}']:.4f}" for kind in ("box", "click") for key in _SHOWN),
        f"{row['quantized_layers_ratio']:.3f}",
        f"{row['file_ratio']:.3f}",
        "—" if compared is None else f"{compared['no_worse']}/{compared['layers']}",
    ]
    return line(cells)


_SHOWN = ("miou_baseline", "miou_quantized", "miou_relative")


if __name__ == "__main__":
    main()
