"""Train the demo model on procedural scenes, on one CUDA device or several.

    python -m samq.tools.demo.train --out DIR (--minutes N | --steps N) [--resume]
    torchrun --nproc-per-node 2 -m samq.tools.demo.train --out DIR ...          (on two devices)

`DIR/checkpoint` is the model as `Sam2Model.from_pretrained` loads it (the moving average of the weights, in
FP16); `DIR/state-0.pt` is what `--resume` continues from, with one more such file per further process. They are
rewritten while training goes on. A step is captured once as CUDA graphs and then replayed, so that neither
launches nor the drawing of scenes hold the device up.
"""

import argparse
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Sam2Model

from samq.tools.demo.bank import SceneBank
from samq.tools.demo.losses import compare_masks, losses, prepare
from samq.tools.demo.model import IMAGE_MEAN, IMAGE_SIZE, IMAGE_STD, demo_config, pixel_values
from samq.tools.demo.sampling import sample_prompts, turned, zoomed

FINAL_LEARNING_RATE_SHARE = 0.01
WEIGHT_DECAY = 0.05
GRADIENT_NORM = 1.0
AVERAGE_DECAY = 0.999

RANK, RANKS = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
"""This process and how many there are, as torchrun says."""
SCENES_PER_RANK = 100_000_000


class Trainer:
    """The model, its moving average, the optimizer and one step of them on batches from a bank of scenes.

    With several processes each has a device, a bank and a trainer, and they share the mean of their gradients.
    """

    def __init__(self, bank: SceneBank, options: argparse.Namespace) -> None:
        self.device = bank.device
        self.bank, self.batch = bank, options.batch
        self.peak, self.warm_up = options.learning_rate, options.warm_up
        torch.manual_seed(options.seed)
        self.model, self.average = new_model(self.device), new_model(self.device)
        if options.weights:
            self.model.load_state_dict(Sam2Model.from_pretrained(options.weights).state_dict())
        self.average.load_state_dict(self.model.state_dict())
        prepare(self.model)
        torch.manual_seed(options.seed + RANK)
        self.gradients = _flat_gradients(self.model)
        self.optimizer = _optimizer(self.model, self.device)
        self.step, self.seconds = 0, 0.0
        self.log = torch.zeros(3, device=self.device)
        self._compare = torch.compile(compare_masks, dynamic=False) if options.compile else compare_masks
        self._find_gradients, self._update = self.find_gradients, self.update

    def advance(self, progress: float) -> None:
        """Make one step, `progress` (0 to 1) of the way through training."""
        warm_up = min(1.0, (self.step + 1) / self.warm_up)
        cosine = 0.5 + 0.5 * math.cos(math.pi * min(progress, 1.0))
        share = FINAL_LEARNING_RATE_SHARE + (1 - FINAL_LEARNING_RATE_SHARE) * cosine
        for group in self.optimizer.param_groups:
            group["lr"].fill_(self.peak * warm_up * share)
        self._find_gradients()
        if RANKS > 1:
            torch.distributed.all_reduce(self.gradients)
        self._update()
        self.step += 1

    def capture(self) -> None:
        """Capture a step as two CUDA graphs, after some ordinary steps have settled memory and compilation."""
        for _ in range(3):
            self.advance(0.0)
        self._find_gradients = self._captured(self.find_gradients)
        self._update = self._captured(self.update)

    def _captured(self, work: Callable[[], None]) -> Callable[[], None]:
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with self.bank.lock, torch.cuda.graph(graph, capture_error_mode="thread_local"):
            work()
        return graph.replay

    def find_gradients(self) -> None:
        """Draw a batch and prompts, ask the model, and leave the gradients of the loss in `gradients`."""
        images, ids = zoomed(*turned(*self.bank.sample(self.batch)))
        prompts = sample_prompts(ids)
        noise = torch.rand(self.batch, IMAGE_SIZE // 2, IMAGE_SIZE // 2, device=self.device)
        self.gradients.zero_()
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            result = losses(self.model, pixel_values(images), prompts, noise, self._compare)
        torch.autograd.backward(result.total / RANKS)
        self.log.lerp_(torch.stack(result).detach(), 0.02)

    @torch.no_grad()
    def update(self) -> None:
        """Clip the gradients, make an optimizer's step and move the average."""
        self.gradients.mul_((GRADIENT_NORM / self.gradients.norm()).clamp(max=1))
        self.optimizer.step()
        average: list[Tensor] = list(self.average.parameters())
        torch._foreach_lerp_(average, list[Tensor](self.model.parameters()), 1 - AVERAGE_DECAY)

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


def _flat_gradients(model: nn.Module) -> Tensor:
    """One vector that holds the gradients of all parameters, each of which is a view into it from now on."""
    parameters = list(model.parameters())
    flat = torch.zeros(sum(parameter.numel() for parameter in parameters), device=parameters[0].device)
    parts = torch.split(flat, [parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter)
    return flat


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
    """Write the state of this process to resume from and, by the first one, the checkpoint."""
    if RANK == 0:
        write_checkpoint(trainer.average, out / "checkpoint")
    draft = state_file(out).with_suffix(".draft")
    torch.save(trainer.state(), draft)
    os.replace(draft, state_file(out))


def state_file(out: Path) -> Path:
    return out / f"state-{RANK}.pt"


def train(trainer: Trainer, out: Path, steps: int | None, minutes: float | None, save_steps: int) -> None:
    """Train up to the given step, or for the given time over all runs; save now and then and at the end."""
    before, start = trainer.seconds, time.monotonic()
    progress = 0.0
    while progress < 1:
        trainer.advance(progress)
        if trainer.step % 10 == 0 or trainer.step == steps:
            trainer.seconds = _agreed(before + time.monotonic() - start, trainer.device)
            progress = trainer.step / steps if steps else trainer.seconds / (60 * (minutes or 1))
        if RANK == 0 and (trainer.step % 500 == 0 or progress >= 1):
            total, box, click = trainer.log.tolist()
            print(
                f"step {trainer.step} ({trainer.seconds:.0f} s, {trainer.bank.next_scene} scenes):"
                f" loss {total:.3f}, IoU {box:.3f} from a box, {click:.3f} from a click",
                flush=True,
            )
        if trainer.step % save_steps == 0 or progress >= 1:
            save(trainer, out)


def _agreed(seconds: float, device: torch.device) -> float:
    """The first process's seconds, once its device has done all its work."""
    value = torch.tensor(seconds, device=device)
    if RANKS > 1:
        torch.distributed.broadcast(value, src=0)
    return value.item()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint and the state")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="train for this long, over all runs")
    length.add_argument("--steps", type=int, help="train for this many steps, over all runs")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --out")
    parser.add_argument("--batch", type=int, default=64, help="images per step and process (default: 64)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="its peak (default: 0.001)")
    parser.add_argument("--warm-up", type=int, default=500, help="steps until its peak (default: 500)")
    parser.add_argument("--weights", type=Path, help="start from this checkpoint's weights, not random ones")
    parser.add_argument("--workers", type=int, default=14, help="per process, to draw scenes (default: 14)")
    parser.add_argument("--bank", type=int, default=100_000, help="scenes on the device (default: 100000)")
    parser.add_argument("--save-steps", type=int, default=2000, help="between two saves (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and prompts (default: 0)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: to try the script")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="compile no losses")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    state = torch.load(state_file(options.out), map_location="cpu") if options.resume else None
    first_scene = state["next_scene"] if state else RANK * SCENES_PER_RANK
    device = torch.device("cuda", RANK) if options.device == "cuda" else torch.device("cpu")
    bank = SceneBank(options.bank, options.workers, first_scene, device)
    if RANKS > 1:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    trainer = Trainer(bank, options)
    if state:
        trainer.restore(state)
    bank.wait()
    if device.type == "cuda":
        trainer.capture()
    train(trainer, options.out, options.steps, options.minutes, options.save_steps)
    if RANKS > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
