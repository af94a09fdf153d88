"""Train the demo model on procedural scenes, on one CUDA device.

    python -m samq.tools.demo.train --out DIR (--minutes N | --steps N) [--resume]

`DIR/checkpoint` is the model as `Sam2Model.from_pretrained` loads it (the moving average of the weights, in
FP16); `DIR/state.pt` is what `--resume` continues from. Both are rewritten while training goes on. A step
(drawing prompts, both passes, optimizer, moving average) is captured once as a CUDA graph and then replayed.
"""

import argparse
import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Sam2Model

from samq.tools.demo.bank import SceneBank
from samq.tools.demo.losses import expose_all_masks, losses
from samq.tools.demo.model import IMAGE_MEAN, IMAGE_SIZE, IMAGE_STD, demo_config, pixel_values
from samq.tools.demo.sampling import sample_prompts, turned

WARM_UP_STEPS = 500
FINAL_LEARNING_RATE_SHARE = 0.01
WEIGHT_DECAY = 0.05
GRADIENT_NORM = 1.0
AVERAGE_DECAY = 0.999


class Trainer:
    """The model, its moving average, the optimizer and one step of them on batches from a bank of scenes."""

    def __init__(self, bank: SceneBank, options: argparse.Namespace) -> None:
        self.device = torch.device(options.device)
        self.bank, self.batch, self.peak = bank, options.batch, options.learning_rate
        self.model, self.average = new_model(self.device), new_model(self.device)
        self.average.load_state_dict(self.model.state_dict())
        expose_all_masks(self.model)
        self.optimizer = _optimizer(self.model, self.device)
        self.step, self.seconds = 0, 0.0
        self.log = torch.zeros(3, device=self.device)
        self._losses = torch.compile(losses, dynamic=False) if options.compile else losses
        self._graph: torch.cuda.CUDAGraph | None = None

    def advance(self, progress: float) -> None:
        """Make one step, `progress` (0 to 1) of the way through training."""
        warm_up = min(1.0, (self.step + 1) / WARM_UP_STEPS)
        cosine = 0.5 + 0.5 * math.cos(math.pi * min(progress, 1.0))
        share = FINAL_LEARNING_RATE_SHARE + (1 - FINAL_LEARNING_RATE_SHARE) * cosine
        for group in self.optimizer.param_groups:
            group["lr"].fill_(self.peak * warm_up * share)
        if self._graph is None:
            self._run_step()
        else:
            self._graph.replay()
        self.step += 1

    def capture(self) -> None:
        """Capture a step as a CUDA graph, after some ordinary ones have settled memory and compilation."""
        for _ in range(3):
            self.advance(0.0)
        torch.cuda.synchronize(self.device)
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with self.bank.lock, torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._run_step()
        self._graph = graph

    def _run_step(self) -> None:
        images, ids = turned(*self.bank.sample(self.batch))
        prompts = sample_prompts(ids)
        noise = torch.rand(self.batch, IMAGE_SIZE // 2, IMAGE_SIZE // 2, device=self.device)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            result = self._losses(self.model, pixel_values(images), prompts, noise)
        torch.autograd.backward(result.total)
        nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_NORM)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.average.parameters()), list(self.model.parameters()), 1 - AVERAGE_DECAY
            )
            self.log.lerp_(torch.stack(result), 0.02)

    def state(self) -> dict[str, Any]:
        """Everything that `restore` needs to go on from here."""
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "next_scene": self.bank.next_scene,
            "random": torch.get_rng_state(),
            "cuda_random": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state; call it before `capture`."""
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group["lr"] = torch.tensor(0.0, device=self.device)
        self.step, self.seconds = state["step"], state["seconds"]
        torch.set_rng_state(state["random"])
        if state["cuda_random"] is not None:
            torch.cuda.set_rng_state(state["cuda_random"], self.device)


def new_model(device: torch.device) -> Sam2Model:
    """A model with random weights; as in SAM 2, prompts and image share one positional encoding."""
    model = Sam2Model(demo_config())
    shared = model.shared_image_embedding.positional_embedding.half().float()
    model.shared_image_embedding.positional_embedding.copy_(shared)
    model.prompt_encoder.shared_embedding.positional_embedding.copy_(shared)
    model.train(False)
    nn.Module.to(model, device)
    return model


def _optimizer(model: nn.Module, device: torch.device) -> torch.optim.AdamW:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY, "lr": torch.tensor(0.0, device=device)},
        {"params": vectors, "weight_decay": 0.0, "lr": torch.tensor(0.0, device=device)},
    ]
    return torch.optim.AdamW(groups, fused=True, capturable=device.type == "cuda")


def write_checkpoint(model: Sam2Model, folder: Path) -> None:
    """Write a model's weights in FP16, its configuration and its image processor's to a folder."""
    draft = folder.with_name(folder.name + ".draft")
    weights = {name: tensor.half().cpu() for name, tensor in model.state_dict().items()}
    model.save_pretrained(draft, state_dict=weights)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = {
        "image_processor_type": "Sam2ImageProcessor",
        "processor_class": "Sam2Processor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": size,
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": IMAGE_MEAN,
        "image_std": IMAGE_STD,
        "mask_size": {"height": IMAGE_SIZE // 4, "width": IMAGE_SIZE // 4},
    }
    (draft / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)


def save(trainer: Trainer, out: Path) -> None:
    """Write the checkpoint and the state to resume from."""
    write_checkpoint(trainer.average, out / "checkpoint")
    draft = out / "state.pt.draft"
    torch.save(trainer.state(), draft)
    os.replace(draft, out / "state.pt")


def train(trainer: Trainer, out: Path, steps: int | None, minutes: float | None, save_seconds: float) -> None:
    """Train up to the given step, or for the given time over all runs; save now and then and at the end."""
    before, start, saved = trainer.seconds, time.monotonic(), time.monotonic()
    progress = 0.0
    while progress < 1:
        trainer.advance(progress)
        if trainer.step % 10 == 0:
            trainer.log.sum().item()  # wait for the device, so that the clock below is the device's
        trainer.seconds = before + time.monotonic() - start
        progress = trainer.step / steps if steps else trainer.seconds / (60 * (minutes or 1))
        if trainer.step % 500 == 0 or progress >= 1:
            total, box, click = trainer.log.tolist()
            print(
                f"step {trainer.step} ({trainer.seconds:.0f} s, {trainer.bank.next_scene} scenes):"
                f" loss {total:.3f}, IoU {box:.3f} from a box, {click:.3f} from a click",
                flush=True,
            )
        if time.monotonic() - saved > save_seconds or progress >= 1:
            save(trainer, out)
            saved = time.monotonic()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint and the state")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="train for this long, over all runs")
    length.add_argument("--steps", type=int, help="train for this many steps, over all runs")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --out")
    parser.add_argument("--batch", type=int, default=96, help="images per step (default: 96)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="its peak (default: 0.001)")
    parser.add_argument("--workers", type=int, default=14, help="processes that draw scenes (default: 14)")
    parser.add_argument("--bank", type=int, default=100_000, help="scenes on the device (default: 100000)")
    parser.add_argument("--save-seconds", type=float, default=60, help="between two saves (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and prompts (default: 0)")
    parser.add_argument(
        "--device", default="cuda", help="a CUDA device, or cpu to try the script (default: cuda)"
    )
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="run the step uncompiled")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    state = torch.load(options.out / "state.pt", map_location="cpu") if options.resume else None
    first_scene = state["next_scene"] if state else 0
    bank = SceneBank(options.bank, options.workers, first_scene, torch.device(options.device))
    trainer = Trainer(bank, options)
    if state:
        trainer.restore(state)
    bank.wait()
    if trainer.device.type == "cuda":
        trainer.capture()
    train(trainer, options.out, options.steps, options.minutes, options.save_seconds)


if __name__ == "__main__":
    main()
