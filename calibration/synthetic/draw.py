"""The parts that all synthetic pictures share: paper, ink and damage.

A `Page` is measured in design units. `scale` converts them to pixels, so one layout can be drawn at any resolution.
This module does not know tasks, questions or words.
"""

from __future__ import annotations

import io
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from .fonts import CHINESE, LATIN, Face, load_font

Colour = tuple[int, int, int]


def has_chinese(text: str) -> bool:
    """Return whether any character is a CJK ideograph, which only the Chinese faces can draw."""
    return any("\u4e00" <= character <= "\u9fff" for character in text)


def pick_face(rng: random.Random, split: str, text: str) -> Face:
    """Choose a face of the split that can draw `text`."""
    return rng.choice((CHINESE if has_chinese(text) else LATIN)[split])


def paper_and_ink(rng: random.Random, inverse: float = 0.15) -> tuple[Colour, Colour]:
    """Choose a light paper and a dark ink, or the reverse with probability `inverse`."""
    light = rng.randint(200, 255)
    paper = tuple(min(255, max(0, light + rng.randint(-14, 14))) for _ in range(3))
    dark = rng.randint(0, 70)
    ink = tuple(min(255, max(0, dark + rng.randint(-30, 50))) for _ in range(3))
    pair = (paper, ink) if rng.random() >= inverse else (ink, paper)
    return (pair[0][0], pair[0][1], pair[0][2]), (pair[1][0], pair[1][1], pair[1][2])


@dataclass(frozen=True)
class Picture:
    """A drawn page and its questions: (question, exact answer) pairs, never empty."""

    image: Image.Image
    paper: Colour
    questions: tuple[tuple[str, str], ...]
    transcript: str
    """The whole content of the page, line by line in reading order: its text, or its shapes."""
    drill: tuple[tuple[str, str], ...] = ()
    """More questions like the others. They are too many for one picture, except in training."""
    bonds: tuple[tuple[float, float, str], ...] = ()
    """(x, y, text) in design units: the text that belongs to the name at this place, such as its price."""


@dataclass
class Page:
    """A picture that is being drawn. All positions and sizes are in design units."""

    width: float
    height: float
    paper: Colour
    scale: float = 1.0

    def __post_init__(self) -> None:
        size = (round(self.width * self.scale), round(self.height * self.scale))
        self.image = Image.new("RGB", size, self.paper)
        self.pen = ImageDraw.Draw(self.image)
        self.bonds: list[tuple[float, float, str]] = []

    def font(self, face: Face, size: float) -> ImageFont.FreeTypeFont:
        """Return the face at `size` units per em."""
        return load_font(face, max(6, round(size * self.scale)))

    def text_width(self, text: str, face: Face, size: float) -> float:
        """Return the advance width of a line, in units."""
        return self.font(face, size).getlength(text) / self.scale

    def picture(
        self, questions: list[tuple[str, str]], transcript: str = "", drill: list[tuple[str, str]] | None = None
    ) -> Picture:
        """Return the finished page with its questions, as a `Picture`."""
        return Picture(self.image, self.paper, tuple(questions), transcript, tuple(drill or ()), tuple(self.bonds))

    def fit(self, text: str, face: Face, size: float, width: float) -> float:
        """Return the largest font size, at most `size`, at which `text` is no wider than `width`."""
        return size * min(1.0, width / max(1.0, self.text_width(text, face, size)))

    def text(self, x: float, y: float, text: str, face: Face, size: float, ink: Colour, anchor: str = "lm") -> None:
        """Draw one line of text. `anchor` is PIL's (lm: left end at half height, mm: centre, rm: right end)."""
        self.pen.text((x * self.scale, y * self.scale), text, ink, self.font(face, size), anchor)

    def box(self, x0: float, y0: float, x1: float, y1: float, fill: Colour | None, ink: Colour | None) -> None:
        """Draw a rectangle, filled or not, with or without a one-unit outline of `ink`."""
        s = self.scale
        self.pen.rectangle((x0 * s, y0 * s, x1 * s, y1 * s), fill, ink, max(1, round(s)))

    def line(self, x0: float, y0: float, x1: float, y1: float, ink: Colour, width: float = 1.0) -> None:
        """Draw a straight line."""
        s = self.scale
        self.pen.line((x0 * s, y0 * s, x1 * s, y1 * s), ink, max(1, round(width * s)))


def damage(image: Image.Image, rng: random.Random, scale: float, fill: Colour, rotate: bool = True) -> Image.Image:
    """Apply defects of a phone photo, each to some pictures: small rotation, blur, weak contrast, noise, JPEG."""
    if rotate and rng.random() < 0.35:
        most = 3.0 * min(image.size) / max(image.size)
        image = image.rotate(rng.uniform(-most, most), Image.Resampling.BILINEAR, fillcolor=fill)
    if rng.random() < 0.25:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.7) * scale))
    if rng.random() < 0.3:
        middle = rng.randint(90, 170)
        strength = rng.uniform(0.6, 1.0)
        image = image.point([round(middle + (value - middle) * strength) for value in range(256)] * 3)
    if rng.random() < 0.25:
        noise = np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(2, 10), (image.height, image.width, 3))
        image = Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))
    if rng.random() < 0.3:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=rng.randint(40, 95))
        image = Image.open(buffer).convert("RGB")
    return image
