"""A bank of training scenes in device memory, filled by processes that draw while the model trains."""

import multiprocessing as mp
import threading
from collections.abc import Iterator
from multiprocessing.queues import Queue

import numpy as np
import torch
from torch import Tensor

from samq.tools.demo.model import IMAGE_SIZE
from samq.tools.demo.scenes import Scene, train_scene

CHUNK = 32


class SceneBank:
    """The scenes drawn last, up to a capacity: images uint8 [N, H, W, 3] and object numbers uint8 [N, H, W].

    Object numbers start at 1; 0 is the background. Create the bank before anything else touches the device,
    since its processes are forked.
    """

    def __init__(self, capacity: int, workers: int, first_scene: int, device: torch.device) -> None:
        context = mp.get_context("fork")
        self._chunks: Queue[tuple[np.ndarray, np.ndarray]] = context.Queue(maxsize=2 * workers)
        for worker in range(workers):
            start = first_scene + worker * CHUNK
            arguments = (self._chunks, start, workers * CHUNK)
            context.Process(target=_draw_forever, args=arguments, daemon=True).start()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        self.device = device
        self.images = torch.empty(capacity, IMAGE_SIZE, IMAGE_SIZE, 3, dtype=torch.uint8, device=device)
        self.ids = torch.empty(capacity, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8, device=device)
        self.filled = torch.zeros((), dtype=torch.int64, device=device)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.next_scene = first_scene
        self.lock = threading.Lock()
        """Held while scenes are copied to the device; hold it where nothing else may use the device."""
        self._started = threading.Event()
        threading.Thread(target=self._fill_forever, daemon=True).start()

    def wait(self) -> None:
        """Block until there are scenes to sample from."""
        self._started.wait()

    def sample(self, count: int) -> tuple[Tensor, Tensor]:
        """Random scenes: images [count, H, W, 3] and object numbers [count, H, W]."""
        index = (torch.rand(count, device=self.device) * self.filled).long()
        return self.images[index], self.ids[index]

    def _fill_forever(self) -> None:
        for start in self._slots():
            images, ids = self._chunks.get()
            with self.lock, torch.cuda.stream(self._stream):
                self.images[start : start + CHUNK].copy_(torch.from_numpy(images))
                self.ids[start : start + CHUNK].copy_(torch.from_numpy(ids))
                self.filled.clamp_(min=start + CHUNK)
            self.next_scene += CHUNK
            self._started.set()

    def _slots(self) -> Iterator[int]:
        """Where the next chunk goes: round and round."""
        while True:
            yield from range(0, len(self.images) - CHUNK + 1, CHUNK)


def _draw_forever(chunks: "Queue[tuple[np.ndarray, np.ndarray]]", start: int, stride: int) -> None:
    """Draw the chunks of scenes from `start` on, every `stride` scenes."""
    while True:
        scenes = [train_scene(index) for index in range(start, start + CHUNK)]
        images = np.stack([scene.image for scene in scenes])
        chunks.put((images, np.stack([object_numbers(scene) for scene in scenes])))
        start += stride


def object_numbers(scene: Scene) -> np.ndarray:
    """The number of the object at each pixel, from 1; 0 for none: uint8 [H, W]."""
    numbers = np.arange(1, len(scene.masks) + 1, dtype=np.uint8)
    return np.asarray(np.max(scene.masks * numbers[:, None, None], axis=0))
