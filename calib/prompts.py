"""The two prompts that a mask implies: its bounding box, and one click at its deepest point.

Coordinates are SAM's: pixel indices, x before y; the model itself adds the half pixel to a pixel's centre.
"""

import numpy as np
import numpy.typing as npt
from scipy import ndimage  # type: ignore[import-untyped]

Mask = npt.NDArray[np.bool_]
Coordinates = npt.NDArray[np.float32]


def box_of(mask: Mask) -> Coordinates:
    """The smallest box that holds every pixel of a mask.

    Args:
        mask: [H, W], bool.

    Returns:
        float32 [4], (x1, y1, x2, y2) in pixels; the last column and row are inclusive, as in SAM.

    Raises:
        ValueError: the mask is not two-dimensional, or has no pixel.
    """
    _require_pixels(mask)
    columns = np.flatnonzero(mask.any(axis=0))
    rows = np.flatnonzero(mask.any(axis=1))
    return np.array([columns[0], rows[0], columns[-1], rows[-1]], dtype=np.float32)


def click_of(mask: Mask) -> Coordinates:
    """The pixel of a mask that is farthest from everything outside it, the image's border included.

    Ties go to the first such pixel in row-major order.

    Args:
        mask: [H, W], bool.

    Returns:
        float32 [2], (x, y) in pixels.

    Raises:
        ValueError: the mask is not two-dimensional, or has no pixel.
    """
    _require_pixels(mask)
    x1, y1, x2, y2 = box_of(mask).astype(int)
    # One ring of zeros around the box: pixels beyond it are no nearer than the ring, so the crop is exact.
    crop = np.pad(mask[y1 : y2 + 1, x1 : x2 + 1], 1)
    depth = ndimage.distance_transform_edt(crop)
    y, x = np.unravel_index(int(np.argmax(depth)), depth.shape)
    return np.array([x + x1 - 1, y + y1 - 1], dtype=np.float32)


def _require_pixels(mask: Mask) -> None:
    if mask.ndim != 2:
        raise ValueError(f"a mask is [H, W]; got shape {mask.shape}. Pass one instance at a time.")
    if not mask.any():
        raise ValueError("the mask has no pixel, so it implies no prompt; drop empty instances first.")
