"""Synthetic pictures of the golden pack, rebuilt bit for bit from integer arithmetic."""

import numpy as np
from PIL import Image


def synth(width: int, height: int, mode: str = "RGB", kind: int = 0) -> Image.Image:
    """A colour ramp over a checkerboard, with a disk; `kind` moves and colours the disk."""
    y, x = np.mgrid[0:height, 0:width].astype(np.int64)
    red = (x * 255) // max(width - 1, 1)
    green = (y * 255) // max(height - 1, 1)
    blue = (((x // max(width // 8, 1)) + (y // max(height // 8, 1))) % 2) * 200 + 20
    centre_x, centre_y = width // 2 + kind * width // 10, height // 2 - kind * height // 12
    radius = max(min(width, height) // 3, 1)
    disk = ((x - centre_x) ** 2 + (y - centre_y) ** 2) < radius * radius
    array = np.stack([red, green, blue], -1)
    if kind % 2:
        array = 255 - array
    array[disk] = [(250, 40, 90), (20, 200, 60), (70, 70, 240)][kind % 3]
    array = array.astype(np.uint8)
    if mode == "L":
        return Image.fromarray(array).convert("L")
    if mode == "RGBA":
        return Image.fromarray(np.dstack([array, ((x + y) % 256).astype(np.uint8)]))
    if mode == "P":
        return Image.fromarray(array).quantize(32)
    return Image.fromarray(array)
