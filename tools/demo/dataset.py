"""The demo's scenes as data: held-out ones with their masks, and the shipped folder of calibration images.

`python -m samq.tools.demo.dataset FOLDER` writes the calibration images anew; their seeds are those
of training scenes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from PIL import Image

from samq.tools.demo.scenes import HELD_OUT_SCENES, draw_scene, held_out_scene

CHECKPOINT = Path(__file__).with_name("checkpoint")
IMAGES = Path(__file__).with_name("images")
HELD_OUT = "samq.tools.demo.dataset:HeldOutScenes"

SCENES = 500
CALIBRATION_IMAGES = 64
JPEG_QUALITY = 92


class HeldOutScenes:
    """The 500 held-out scenes on which every figure about the demo model is measured."""

    def __len__(self) -> int:
        return SCENES

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < SCENES:
            raise IndexError(index)
        scene = held_out_scene(index)
        return {"image": scene.image, "masks": scene.masks}


def write_calibration_images(folder: Path, count: int = CALIBRATION_IMAGES) -> None:
    """Draw the calibration images, or others like them, as JPEG files."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        image = Image.fromarray(draw_scene(HELD_OUT_SCENES + index).image)
        image.save(folder / f"scene_{index:02d}.jpg", quality=JPEG_QUALITY)


if __name__ == "__main__":
    write_calibration_images(Path(sys.argv[1]))
