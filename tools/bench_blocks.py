"""Every block of an encoder alone on TensorRT: FP16 against INT8 with its low-rank branches kept and folded.

    samq-export quantize --output-dir OUT …; samq-export export --output-dir OUT --target trt8
    python -m samq.tools.bench_blocks OUT --json FILE

prints a table of milliseconds (median of 100 runs by CUDA events, static shapes, batch 1), a row a block. Blocks of one
structure are measured once. A block that TensorRT does not take has the reason instead of a figure.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from samq.calib.parts import IMAGE_ENCODER
from samq.engines import tensorrt
from samq.engines.tensorrt_plan import BuildOptions
from samq.errors import SamqError
from samq.export.lower_tensorrt import Branch, lower_for_tensorrt
from samq.export.parts import save_part
from samq.export.regions import cut_blocks, structure
from samq.export.tensorrt_rewrites import REWRITES
from samq.files import write_json
from samq.tools.targets import target_at_hand

FORMS: dict[str, tuple[str, Branch]] = {
    "fp16": ("fp32/", "branch"),
    "int8_branch": ("", "branch"),
    "int8_fold": ("", "fold"),
}
Cell = float | str


def main() -> None:
    """Print the table; with --json also write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="an output directory whose `export` is done, with static shapes")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument(
        "--without", nargs="+", choices=REWRITES, default=[], help="leave these rewrites out, to see what they gain"
    )
    parser.add_argument("--level", type=int, default=3, help="the builder's optimization level")
    parser.add_argument("--timing-cache", help="folder of kernel timings")
    arguments = parser.parse_args()
    options = BuildOptions(optimization_level=arguments.level, timing_cache=arguments.timing_cache)
    rewrites = [name for name in REWRITES if name not in arguments.without]
    version, gpu = tensorrt.about()
    rows: dict[str, dict[str, Cell]] = {}
    for form in arguments.forms:
        known: dict[tuple[object, ...], Cell] = {}
        for block, graph in _blocks(arguments.out, form, rewrites):
            key = structure(graph)
            if key not in known:
                known[key] = _measured(graph, options)
                print(f"{form:<12} {block}: {known[key]}", flush=True)
            rows.setdefault(block, {})[form] = known[key]
    print("\n".join(_table(rows, arguments.forms)))
    if arguments.json is not None:
        machine = {"tensorrt": version, "gpu": gpu.name}
        write_json(arguments.json, {**machine, "level": arguments.level, "rewrites": rewrites, "blocks": rows})


def _blocks(out: Path, form: str, rewrites: Collection[str]) -> list[tuple[str, ir.Model]]:
    folder, low_rank = FORMS[form]
    model = ir.load(out / "onnx" / f"{folder}{IMAGE_ENCODER}.onnx")
    return list(cut_blocks(lower_for_tensorrt(model, target_at_hand(), low_rank, rewrites=rewrites).model))


def _measured(graph: ir.Model, options: BuildOptions) -> Cell:
    """Milliseconds of a run on random inputs, or why there is no such figure."""
    with tempfile.TemporaryDirectory() as folder:
        path, plan = Path(folder) / "block.onnx", Path(folder) / "block.plan"
        try:
            save_part(graph, path)
            info = tensorrt.build_engine(path, plan, options)
            random = np.random.default_rng(0)
            feeds: dict[str, Any] = {
                tensor.name: random.standard_normal([int(side) for side in tensor.shape], dtype=np.float32)
                for tensor in info.inputs
            }
            engine = tensorrt.open_engine(plan)
            milliseconds = statistics.median(engine.time(feeds, 100))
            engine.close()
        except SamqError as error:
            return str(error)
        return round(milliseconds, 4)


def _table(rows: dict[str, dict[str, Cell]], forms: list[str]) -> list[str]:
    lines = [["block", *forms], ["---"] * (1 + len(forms))]
    for block, cells in rows.items():
        lines.append([block, *(f"{cells[f]:.3f}" if isinstance(cells[f], float) else "fails" for f in forms)])
    return [f"| {' | '.join(line)} |" for line in lines]


if __name__ == "__main__":
    main()
