"""Time and memory of quantizing and exporting a full-size SAM2.1 with random weights.

    python -m samq.tools.bench_large large --config int4_svdquant --images 4
    python -m samq.tools.bench_large large --images 128 --device cuda --stages quantize

writes the checkpoint with `save_pretrained`, runs `samq-export quantize` and `samq-export export` on it, each in a
process of its own, and prints how long each took and the most memory that it held; of `quantize` also the time without
start, waiting for images, and writing. The images are drawn, as for the demo model.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from samq.tools.arguments import count
from samq.tools.demo.dataset import write_calibration_images
from samq.tools.job import MOST_SET_ASIDE
from samq.tools.outdir import OutputDir
from samq.tools.prove_parity import BACKBONES, random_sam2
from samq.tools.report.environment import environment

STAGES = ("quantize", "export")
GIB = 1 << 30
KIB = 1 << 10


def main() -> int:
    """Run both stages; returns the first exit code that is not zero."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(BACKBONES))
    parser.add_argument("--config", default="int4_svdquant")
    parser.add_argument("--images", type=count(), default=4, help="calibration images")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    arguments = parser.parse_args()
    facts = environment()
    what = f"{arguments.model}, {arguments.config}, {arguments.images} images"
    gpu = f", {torch.cuda.get_device_name()}" if arguments.device == "cuda" else ""
    print(f"{what}, {facts['cores']} cores, {facts['processor']}{gpu}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, output = Path(folder, "checkpoint"), Path(folder, "out")
        random_sam2(arguments.model).save_pretrained(checkpoint)
        images = Path(folder, "images")
        aside = min(MOST_SET_ASIDE, arguments.images // 4)  # a fifth of all, which is not calibrated on
        write_calibration_images(images, arguments.images + aside)
        data = ["--calib-data", str(images), "--num-calib-samples", str(arguments.images)]
        model = ["--model-path", str(checkpoint), "--config", arguments.config, "--device", arguments.device]
        for stage in arguments.stages:
            options = [*model, *data] if stage == "quantize" else []
            code, seconds, peak = _measured([stage, *options, "--output-dir", str(output), "--quiet"])
            print(f"{stage:<10} exit {code}, {seconds:.0f} s, peak {peak / GIB:.2f} GiB", flush=True)
            if code:
                return code
            if stage == "quantize":
                told = OutputDir.open(output).stages[stage]
                print(
                    f"itself {told['quantization_s']} s, calibration {told.get('calibration_s', 0)} s of it", flush=True
                )
        sizes = {path.relative_to(output): path.stat().st_size for path in sorted(output.rglob("*.onnx"))}
        print(", ".join(f"{path} {size / 1e6:.1f} MB" for path, size in sizes.items()))
    return 0


def _measured(command: list[str]) -> tuple[int, float, int]:
    """Exit code, seconds and peak resident bytes of `samq-export …`."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "samq.tools.cli", *command])
    _, status, usage = os.wait4(process.pid, 0)
    return os.waitstatus_to_exitcode(status), time.perf_counter() - started, usage.ru_maxrss * KIB


if __name__ == "__main__":
    sys.exit(main())
