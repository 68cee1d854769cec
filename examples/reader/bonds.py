"""What belongs to a name in a picture, such as the value of a bar, as labels of image tokens.

A throw-away head on the image tokens of names says the first two characters of what belongs to them. A text model so
small does not learn to follow a bar from its name to its value; the vision tower sees both at once.
"""

from __future__ import annotations

import random

import numpy as np
from dense import INDEX
from pages import IMAGE_TOKENS_PER_TILE, SIDE, TILE_SIZE, tiles

from internvl_edge.calibration.synthetic import draw_picture
from internvl_edge.calibration.synthetic.draw import Picture

# (image token, class, class): where a name is, and the first two characters of what belongs to it.
Bonds = list[tuple[int, int, int]]
_TOKEN_SIZE = TILE_SIZE // SIDE


def bond_labels(picture: Picture, count: int) -> Bonds:
    """Those of a picture's bonds that are in its first `count` tiles."""
    across = max(1, round(picture.image.width / picture.image.height))
    found = []
    for x, y, text in picture.bonds:
        column, row = int(x // _TOKEN_SIZE), int(y // _TOKEN_SIZE)
        tile = row // SIDE * across + column // SIDE
        if tile < count:
            token = tile * IMAGE_TOKENS_PER_TILE + row % SIDE * SIDE + column % SIDE
            found.append((token, INDEX[text[0]], INDEX[text[1]] if len(text) > 1 else 0))
    return found


def chart_tile(rng: random.Random) -> tuple[np.ndarray, Bonds]:
    """A chart of one tile, uint8 [S, S, 3], with its bonds."""
    while True:
        picture, _ = draw_picture(rng, "train", ["chart"])
        pixels = tiles(picture.image)
        if len(pixels) == 1:
            return pixels[0], bond_labels(picture, 1)


def joined_bonds(parts: list[tuple[int, Bonds]]) -> np.ndarray:
    """int64 [n, 3]: the bonds of pictures of so many tiles, one behind the other."""
    starts = np.cumsum([0, *(IMAGE_TOKENS_PER_TILE * count for count, _ in parts)])
    found = [(start + token, *text) for start, (_, bonds) in zip(starts, parts, strict=False) for token, *text in bonds]
    return np.array(found, np.int64).reshape(-1, 3)
