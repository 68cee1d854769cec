"""From a drawn page to the tiles that a model sees: the sizes, the cut, and shapes that the typefaces do not have."""

from __future__ import annotations

import random

import numpy as np
from PIL import Image

from internvl_edge.model.preprocess import tile_image

TILE_SIZE = 112
MAX_TILES = 6
SIDE = 4
"""Image tokens along one side of a tile."""
IMAGE_TOKENS_PER_TILE = SIDE * SIDE


def tiles(image: Image.Image) -> np.ndarray:
    """uint8 [tiles, TILE_SIZE, TILE_SIZE, 3], cut as the runtime cuts them."""
    return tile_image(image, image_size=TILE_SIZE, max_tiles=MAX_TILES)


def distorted(image: Image.Image, rng: random.Random, fill: tuple[int, int, int]) -> Image.Image:
    """Narrower, lower and slanted by a little: more letter shapes than the training typefaces have."""
    narrow, low, slant = rng.uniform(1, 1.13), rng.uniform(1, 1.13), rng.uniform(-0.1, 0.1)
    x, y = image.width / 2, image.height / 2
    # Output to input positions, the centre stays where it is.
    matrix = (narrow, slant, x - narrow * x - slant * y, 0.0, low, y - low * y)
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=fill)
