"""Stage-one training data: tiles full of text, with the character at each small cell of the tile.

One image token covers 28 x 28 pixels; a throw-away head predicts, for its 2 x 4 cells of 14 x 7 pixels, which character
is centred there. That teaches the vision tower letters long before the decoder can use them.
"""

from __future__ import annotations

import math
import random
from functools import cache

import numpy as np

from internvl_edge.calibration.synthetic.draw import Page, damage, has_chinese, paper_and_ink, pick_face
from internvl_edge.calibration.synthetic.fonts import Face, load_font
from internvl_edge.calibration.synthetic.words import CHINESE_CHARACTERS, code, invented_chinese, invented_word, pool

CHARACTERS = "".join(map(chr, range(33, 127))) + CHINESE_CHARACTERS
CLASSES = len(CHARACTERS) + 1
IGNORE = -100
INDEX = {character: i + 1 for i, character in enumerate(CHARACTERS)}
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
_MARKS = ".,:;-+/%&#()!?$*=\"'"


def random_line(rng: random.Random, split: str) -> str:
    """Words, prices, dates, codes, digits or a row of random characters; now and then Chinese."""
    kind = rng.random()
    if kind < 0.2:
        return invented_chinese(rng, split, 5)
    if kind < 0.5:
        words = []
        for _ in range(rng.randint(1, 3)):
            word = rng.choice(pool(rng.choice(["items", "places", "names"]), split))
            words.append(word if rng.random() < 0.3 else invented_word(rng, split, 9))
        style = rng.choice([str.upper, str.title, str.title, str.lower])
        return style(" ".join(words))
    if kind < 0.62:
        return f"{rng.randint(0, 99)}.{rng.randint(0, 99):02d} {rng.choice(_MARKS)} {rng.randint(0, 9999)}"
    if kind < 0.7:
        return f"{rng.randint(2020, 2031)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"
    if kind < 0.8:
        return code(rng, split, rng.randint(4, 8)) + " " + str(rng.randint(10, 99999))
    return "".join(rng.choice(_LETTERS if rng.random() < 0.85 else _MARKS) for _ in range(rng.randint(5, 14)))


@cache
def character_width(face: Face, size: int, character: str) -> float:
    """Advance of one character in pixels (kerning is less than a cell and is left out)."""
    return load_font(face, size).getlength(character)


def dense_tile(rng: random.Random, size: int = 112, split: str = "train") -> tuple[np.ndarray, np.ndarray]:
    """(uint8 [size, size, 3], int64 [tokens, 8]): class 0 is 'no character', IGNORE where two share a cell."""
    paper, ink = paper_and_ink(rng, 0.25)
    page = Page(size, size, paper)
    cells = np.zeros((size // 14, size // 7), np.int64)
    y = rng.uniform(-4, 8)
    while y < size - 8:
        em = rng.randint(15, 26)
        line = random_line(rng, split)
        face = pick_face(rng, split, line)
        middle = y + em * 0.6
        x = rng.uniform(-3, 12) if rng.random() < 0.8 else rng.uniform(0, 60)
        page.text(x, middle, line, face, em, ink)
        left, row = x, int(middle // 14)
        for character in line:
            advance = character_width(face, em, character)
            column = math.floor((left + advance / 2) / 7)
            if character != " " and 0 <= column < cells.shape[1] and row < cells.shape[0]:
                cells[row, column] = IGNORE if cells[row, column] else INDEX[character]
            left += advance
        y += em * rng.uniform(1.15, 1.7) + (3 if has_chinese(line) else 0)
    image = damage(page.image, rng, 1.0, paper, rotate=False) if rng.random() < 0.4 else page.image
    half = size // 28
    labels = cells.reshape(half, 2, half, 4).transpose(0, 2, 1, 3).reshape(half * half, 8)
    return np.asarray(image), labels
