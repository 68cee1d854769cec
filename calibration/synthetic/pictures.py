"""Bar charts and simple scenes: pictures whose questions need counting, comparing and colours as well as reading.

Each function draws one undamaged page and returns a `Picture`, as in documents.py.
"""

from __future__ import annotations

import math
import random
from itertools import product
from operator import itemgetter

from .documents import TILE, word
from .draw import Colour, Page, Picture, paper_and_ink, pick_face

COLOURS: dict[str, Colour] = {
    "red": (215, 35, 35),
    "green": (35, 150, 55),
    "blue": (40, 75, 210),
    "yellow": (240, 200, 30),
    "purple": (140, 50, 160),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "star")

_COLOURS_ZH = {"red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色", "purple": "紫色", "black": "黑色"}
_SHAPES_ZH = {"circle": "圆形", "square": "方形", "triangle": "三角形", "star": "星形"}


def _bars(rng: random.Random, split: str, count: int, longest: int) -> list[tuple[str, int]]:
    """Return (name, value) of each bar. Values differ enough for their heights to be told apart."""
    names: list[str] = []
    while len(names) < count:
        name = word(rng, split, "names", longest, 0.7)
        if name not in names:
            names.append(name)
    style = rng.choice((str.upper, str.title))
    values: list[int] = []
    while len(values) < count:
        value = rng.randint(5, 99)
        if all(abs(value - other) >= 6 for other in values):
            values.append(value)
    return [(style(name), value) for name, value in zip(names, values, strict=True)]


def _draw_bars(rng: random.Random, split: str, page: Page, bars: list[tuple[str, int]], ink: Colour) -> None:
    """Draw the bars with names below and values above.

    In half of the training charts, values are at any height along their bars, most of them near the foot. The model
    learns to find a value close to its name long before it finds one far away.
    """
    face = pick_face(rng, split, "a")
    pitch = (page.width - 6) / len(bars)
    name_size = min(page.fit(name, face, rng.uniform(16, 19), pitch - 4) for name, _ in bars)
    value_size = rng.uniform(16, 19)
    floor, ceiling = page.height - 22, 24
    fixed = rng.choice(list(COLOURS.values())) if rng.random() < 0.6 else None
    near = split == "train" and rng.random() < 0.5
    largest = max(value for _, value in bars)
    for i, (name, value) in enumerate(bars):
        x = 3 + pitch * (i + 0.5)
        top = floor - (floor - ceiling) * value / largest
        page.box(x - pitch * 0.3, top, x + pitch * 0.3, floor, fixed or rng.choice(list(COLOURS.values())), None)
        y = top - 10
        if near:
            y = max(y, floor - 10 - (floor - ceiling) * rng.random() ** 2)
            half = page.text_width(str(value), face, value_size) / 2 + 1
            page.box(x - half, y - 8, x + half, y + 8, page.paper, None)
        page.text(x, y, str(value), face, value_size, ink, "mm")
        page.text(x, floor + 11, name, face, name_size, ink, "mm")
        page.bonds += [(x + side, floor + 11, str(value)) for side in (-4, 4)]  # a name may be in either of two tokens
    page.line(3, floor, page.width - 3, floor, ink)


def chart(rng: random.Random, split: str, scale: float) -> Picture:
    """Draw three to five bars, each with a name below and its value above.

    The questions ask for a value, the tallest bar and the shortest bar.
    """
    wide = rng.random() < 0.25
    paper, ink = paper_and_ink(rng, 0.08)
    page = Page(TILE * (2 if wide else 1), TILE, paper, scale)
    bars = _bars(rng, split, rng.randint(3, 5) if wide else 3, 4 if wide else 3)
    _draw_bars(rng, split, page, bars, ink)
    questions = [(f"What is the value of {name}?", str(value)) for name, value in bars]
    questions.append(("Which bar is the tallest?", max(bars, key=itemgetter(1))[0]))
    questions.append(("Which bar is the shortest?", min(bars, key=itemgetter(1))[0]))
    drill = [(f"What is the value of bar {number}?", str(value)) for number, (_, value) in enumerate(bars, 1)]
    drill += [(f"What is the name of bar {number}?", name) for number, (name, _) in enumerate(bars, 1)]
    drill += [(f"What is the number of {name}?", str(number)) for number, (name, _) in enumerate(bars, 1)]
    drill += [(f"How much is the {name}?", str(value)) for name, value in bars]  # as receipts ask, where it is easier
    return page.picture(questions, "\n".join(f"{name} {value}" for name, value in bars), drill)


def _draw_shape(page: Page, shape: str, x: float, y: float, radius: float, fill: Colour, turn: float) -> None:
    s = page.scale
    if shape == "circle":
        page.pen.ellipse([(x - radius) * s, (y - radius) * s, (x + radius) * s, (y + radius) * s], fill)
        return
    corners = {"square": 4, "triangle": 3, "star": 10}[shape]
    start = turn + (math.pi / 4 if shape == "square" else -math.pi / 2)
    points = []
    for i in range(corners):
        r = radius * (0.42 if shape == "star" and i % 2 else 1.15 if shape != "star" else 1.2)
        angle = start + 2 * math.pi * i / corners
        points.append(((x + r * math.cos(angle)) * s, (y + r * math.sin(angle)) * s))
    page.pen.polygon(points, fill)


def _scene_objects(rng: random.Random) -> list[tuple[str, str]]:
    """Return one to six (colour, shape) pairs. There are few kinds, so that repeated ones must be counted."""
    colours = rng.sample(list(COLOURS), rng.randint(1, 3))
    shapes = rng.sample(SHAPES, rng.randint(1, 3))
    return [(rng.choice(colours), rng.choice(shapes)) for _ in range(rng.randint(1, 6))]


def _draw_scene(rng: random.Random, scale: float, objects: list[tuple[str, str]]) -> tuple[Page, list[int]]:
    """Return the page, and each object's cell in the 3x3 grid, numbered in reading order."""
    light = rng.randint(215, 255)
    page = Page(TILE, TILE, (light, light, min(255, light + rng.randint(-8, 8))), scale)
    cells = rng.sample(range(9), len(objects))
    for (colour, shape), cell in zip(objects, cells, strict=True):
        x = (cell % 3 + 0.5) * TILE / 3 + rng.uniform(-3, 3)
        y = (cell // 3 + 0.5) * TILE / 3 + rng.uniform(-3, 3)
        red, green, blue = (min(255, max(0, level + rng.randint(-15, 15))) for level in COLOURS[colour])
        _draw_shape(page, shape, x, y, rng.uniform(10, 14), (red, green, blue), rng.uniform(-0.15, 0.15))
    return page, cells


def _plural(shape: str) -> str:
    return shape + "s"


def _asked_pair(rng: random.Random, objects: list[tuple[str, str]]) -> tuple[str, str]:
    """Return a (colour, shape) to ask about: half the time one that is present, otherwise a similar one that is not."""
    if rng.random() < 0.5:
        return rng.choice(objects)
    present = {colour for colour, _ in objects} | {rng.choice(list(COLOURS))}
    missing = [(colour, shape) for colour in sorted(present) for shape in SHAPES if (colour, shape) not in objects]
    return rng.choice(missing) if missing else rng.choice(objects)


def _with_as_many_others(colours: list[str]) -> list[str]:
    """Return these colours and the same number of others, so that each colour is as often absent as present.

    The others are those that follow the first of these colours.
    """
    names = list(COLOURS)
    start = names.index(colours[0])
    others = [name for name in names[start:] + names[:start] if name not in colours]
    return colours + others[: len(colours)]


def scene(rng: random.Random, split: str, scale: float) -> Picture:
    """Draw coloured shapes.

    The questions ask for the number of a shape or colour, the colour of a shape, and whether an object is present.
    """
    objects = _scene_objects(rng)
    page, cells = _draw_scene(rng, scale, objects)
    counts = {shape: sum(s == shape for _, s in objects) for shape in SHAPES}
    shape = rng.choice([s for s in SHAPES if counts[s]] if rng.random() < 0.9 else SHAPES)
    colour = rng.choice(objects)[0]
    questions = [
        (f"How many {_plural(shape)} are there?", str(counts[shape])),
        ("How many shapes are there?", str(len(objects))),
        (f"How many shapes are {colour}?", str(sum(c == colour for c, _ in objects))),
    ]
    for single in (s for s in SHAPES if counts[s] == 1):
        questions.append((f"What colour is the {single}?", next(c for c, s in objects if s == single)))
    asked = _asked_pair(rng, objects)
    questions.append((f"Is there a {asked[0]} {asked[1]}?", "yes" if asked in objects else "no"))
    listed = [f"{c} {s}" for _, (c, s) in sorted(zip(cells, objects, strict=True))]
    shapes, colours = sorted({s for _, s in objects}), sorted({c for c, _ in objects})
    drill = [(f"How many {_plural(s)} are there?", str(counts[s])) for s in SHAPES if s in shapes]
    drill += [(f"How many shapes are {c}?", str(sum(c == other for other, _ in objects))) for c in colours]
    drill += [(f"Is there a {s}?", "yes" if s in shapes else "no") for s in SHAPES]
    drill += [(f"Is there a {c} shape?", "yes" if c in colours else "no") for c in _with_as_many_others(colours)]
    drill += [(f"Is there a {c} {s}?", "yes" if (c, s) in objects else "no") for c, s in product(colours, shapes)]
    return page.picture(questions, "\n".join(listed), drill)


def scene_zh(rng: random.Random, split: str, scale: float) -> Picture:
    """Draw the same as `scene`, with questions in Chinese."""
    objects = _scene_objects(rng)
    page, cells = _draw_scene(rng, scale, objects)
    shape = rng.choice(objects)[1]
    questions = [
        (f"有几个{_SHAPES_ZH[shape]}？", str(sum(s == shape for _, s in objects))),
        ("一共有几个图形？", str(len(objects))),
    ]
    for single in (s for s in SHAPES if sum(other == s for _, other in objects) == 1):
        found = next(c for c, s in objects if s == single)
        questions.append((f"{_SHAPES_ZH[single]}是什么颜色？", _COLOURS_ZH[found]))
    asked = _asked_pair(rng, objects)
    there = {True: "有", False: "没有"}
    questions.append((f"有没有{_COLOURS_ZH[asked[0]]}的{_SHAPES_ZH[asked[1]]}？", there[asked in objects]))
    listed = [_COLOURS_ZH[c] + _SHAPES_ZH[s] for _, (c, s) in sorted(zip(cells, objects, strict=True))]
    shapes, colours = sorted({s for _, s in objects}), sorted({c for c, _ in objects})
    drill = [(f"有几个{_SHAPES_ZH[s]}？", str(sum(s == other for _, other in objects))) for s in SHAPES if s in shapes]
    drill += [(f"有没有{_SHAPES_ZH[s]}？", there[s in shapes]) for s in SHAPES]
    drill += [(f"有没有{_COLOURS_ZH[c]}？", there[c in colours]) for c in _with_as_many_others(colours)]
    pairs = product(colours, shapes)
    drill += [(f"有没有{_COLOURS_ZH[c]}的{_SHAPES_ZH[s]}？", there[(c, s) in objects]) for c, s in pairs]
    return page.picture(questions, "\n".join(listed), drill)
