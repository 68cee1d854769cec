"""The dynamic tiling of InternVL 2.5, as the runtime does it, with the reader's own tile size."""

from __future__ import annotations

import numpy as np
from PIL import Image


def tile_grid(width: int, height: int, size: int, most: int) -> tuple[int, int]:
    """(columns, rows) whose ratio is nearest to the picture's; of two equally near, the larger if the picture is."""
    every = ((c, r) for c in range(1, most + 1) for r in range(1, most + 1) if c * r <= most)
    grids = sorted(every, key=lambda grid: grid[0] * grid[1])
    best, nearest = (1, 1), float("inf")
    for columns, rows in grids:
        distance = abs(width / height - columns / rows)
        if distance < nearest:
            nearest, best = distance, (columns, rows)
        elif distance == nearest and width * height > 0.5 * size * size * columns * rows:
            best = (columns, rows)
    return best


def tiles(image: Image.Image, size: int = 112, most: int = 6) -> np.ndarray:
    """uint8 [tiles, size, size, 3], row by row; the whole picture comes last when there is more than one tile."""
    columns, rows = tile_grid(*image.size, size, most)
    image = image.convert("RGB")
    resized = np.asarray(image.resize((size * columns, size * rows), Image.Resampling.BICUBIC))
    cut = resized.reshape(rows, size, columns, size, 3).transpose(0, 2, 1, 3, 4).reshape(-1, size, size, 3)
    if columns * rows == 1:
        return cut
    return np.concatenate([cut, np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))[None]])
