"""Pages of text: signs, lines, labels, receipts and meter displays, with questions that only reading can answer.

Each function draws one page at `scale` pixels per unit (a tile is 112 units wide) in fonts and words of `split` and
returns a `Picture`. The page is undamaged: the caller rotates, blurs and compresses it.
"""

from __future__ import annotations

import random

from .draw import Colour, Page, Picture, has_chinese, paper_and_ink, pick_face
from .fonts import Face
from .words import code, invented_chinese, invented_word, pool

TILE = 112
_MARGIN = 6.0
_SIGN_COLOURS: tuple[Colour, ...] = ((20, 70, 150), (10, 110, 60), (170, 25, 30), (30, 30, 30), (90, 40, 110))


# Training uses fewer words of the lists, because the model would memorize them before it could read them.
_REAL = {"train": 0.4, "validation": 1.0, "test": 1.0}


def word(rng: random.Random, split: str, name: str, max_length: int, real: float = 0.6) -> str:
    """Return a word of the list `name`, or an invented one, of at most `max_length` letters."""
    if rng.random() < real * _REAL[split]:
        candidates = [w for w in pool(name, split) if len(w) <= max_length]
        if candidates:
            return rng.choice(candidates)
    return invented_word(rng, split, max_length)


def chinese_word(rng: random.Random, split: str, name: str, max_length: int) -> str:
    """Return a Chinese word of the list `name`, or a row of known characters."""
    candidates = [w for w in pool(name, split) if len(w) <= max_length]
    if candidates and rng.random() < 0.5 * _REAL[split]:
        return rng.choice(candidates)
    return invented_chinese(rng, split, max_length)


def _shape(rng: random.Random, square: float) -> tuple[int, int]:
    """Return width and height in tiles: a square page with probability `square`, otherwise two tiles side by side."""
    return (1, 1) if rng.random() < square else (2, 1)


def _rows(rng: random.Random, page: Page, lines: list[str], face: Face, align: str, size: float, ink: Colour) -> None:
    """Draw `lines` over the page's height, at a size that fits and with small random offsets."""
    pitch = (page.height - _MARGIN) / len(lines)
    size = min(size, pitch * 0.8)
    size = min(page.fit(line, face, size, page.width - 2 * _MARGIN) for line in lines)
    slack = page.width - 2 * _MARGIN - max(page.text_width(line, face, size) for line in lines)
    left = _MARGIN + rng.uniform(0, max(0.0, slack)) if align == "left" else _MARGIN
    for i, line in enumerate(lines):
        y = _MARGIN / 2 + pitch * (i + 0.5) + rng.uniform(-0.06, 0.06) * pitch
        if align == "left":
            page.text(left, y, line, face, size, ink)
        else:
            page.text(page.width / 2 + rng.uniform(-3, 3), y, line, face, size, ink, "mm")


def sign(rng: random.Random, split: str, scale: float) -> Picture:
    """Draw one to three short lines on a coloured or plain plate. The answer is the words, joined by spaces."""
    columns, rows = _shape(rng, 0.75)
    paper, ink = paper_and_ink(rng)
    if rng.random() < 0.5:
        paper, ink = rng.choice(_SIGN_COLOURS), (255, 255, 255)
    page = Page(TILE * columns, TILE * rows, paper, scale)
    longest = 8 if columns == 1 else 12
    lines = [word(rng, split, "places", longest) for _ in range(rng.choice((1, 2, 2, 3)))]
    if rng.random() < 0.3:
        lines[-1] = f"{rng.choice(('Room', 'Gate', 'Exit', 'Floor', 'Bus'))} {rng.randint(1, 99)}"
    style = rng.choice((str.upper, str.title, str.title))
    lines = [style(line) for line in lines]
    face = pick_face(rng, split, "a")
    if rng.random() < 0.4:
        page.box(2, 2, page.width - 3, page.height - 3, None, ink)
    _rows(rng, page, lines, face, "centre", rng.uniform(19, 27), ink)
    return page.picture([("What does the sign say?", " ".join(lines))], "\n".join(lines))


def sign_zh(rng: random.Random, split: str, scale: float) -> Picture:
    """Draw a sign with one or two lines of Chinese characters."""
    paper, ink = paper_and_ink(rng)
    if rng.random() < 0.5:
        paper, ink = rng.choice(_SIGN_COLOURS), (255, 255, 255)
    page = Page(TILE, TILE, paper, scale)
    lines = [chinese_word(rng, split, "places-zh", 4) for _ in range(rng.choice((1, 1, 2)))]
    _rows(rng, page, lines, pick_face(rng, split, lines[0]), "centre", rng.uniform(22, 28), ink)
    return page.picture([("牌子上写着什么？", "".join(lines))], "\n".join(lines))


def _page_line(rng: random.Random, split: str, length: int) -> str:
    kind = rng.random()
    if kind < 0.5:
        text = word(rng, split, rng.choice(("items", "places", "names")), min(length, 9), 0.4)
        return rng.choice((str.upper, str.title, str.lower))(text)
    if kind < 0.62:
        return f"{rng.randint(2020, 2035)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"
    if kind < 0.8:
        return f"{rng.randint(0, 999)}.{rng.randint(0, 99):02d}"
    return code(rng, split, rng.randint(4, min(8, length)))


def page(rng: random.Random, split: str, scale: float) -> Picture:
    """Draw two to four unrelated lines: words, dates, prices, serial numbers.

    A question asks for one, by its number.
    """
    columns, rows = _shape(rng, 0.85)
    paper, ink = paper_and_ink(rng)
    sheet = Page(TILE * columns, TILE * rows, paper, scale)
    length = 9 if columns == 1 else 16
    lines = [_page_line(rng, split, length) for _ in range(rng.randint(2, 4))]
    _rows(rng, sheet, lines, pick_face(rng, split, "a"), "left", rng.uniform(17, 25), ink)
    drill = [(f"Which line is {line}?", str(i)) for i, line in enumerate(lines, 1) if lines.count(line) == 1]
    return sheet.picture([(f"Read line {i}.", line) for i, line in enumerate(lines, 1)], "\n".join(lines), drill)


_FIELDS = ("Name", "Date", "Lot", "Size", "Code", "Room", "Net")


def _field_value(rng: random.Random, split: str, field: str) -> str:
    if field == "Name":
        return word(rng, split, "names", 6, 0.7).title()
    if field == "Date":
        return f"{rng.randint(1, 28):02d}.{rng.randint(1, 12):02d}"
    if field == "Size":
        return rng.choice(("S", "M", "L", "XL", str(rng.randint(34, 48))))
    if field == "Room":
        return str(rng.randint(1, 499))
    if field == "Net":
        return f"{rng.randint(5, 950)} {rng.choice(('g', 'kg', 'ml'))}"
    return code(rng, split, rng.randint(4, 5))


def label(rng: random.Random, split: str, scale: float) -> Picture:
    """Draw two to four `Field: value` lines. A question asks for the value of one field."""
    columns, rows = _shape(rng, 0.85)
    paper, ink = paper_and_ink(rng, 0.1)
    sheet = Page(TILE * columns, TILE * rows, paper, scale)
    fields = rng.sample(_FIELDS, rng.randint(2, 4))
    values = [_field_value(rng, split, field) for field in fields]
    lines = [f"{field}: {value}" for field, value in zip(fields, values, strict=True)]
    if rng.random() < 0.5:
        sheet.box(1, 1, sheet.width - 2, sheet.height - 2, None, ink)
    _rows(rng, sheet, lines, pick_face(rng, split, "a"), "left", rng.uniform(17, 22), ink)
    asked = {field: "net weight" if field == "Net" else field.lower() for field in fields}
    questions = [(f"What is the {asked[field]}?", value) for field, value in zip(fields, values, strict=True)]
    return sheet.picture(questions, "\n".join(lines))


def _price(rng: random.Random) -> int:
    return rng.randint(1, 19) * 100 + rng.choice((0, 10, 20, 25, 30, 40, 49, 50, 60, 75, 80, 90, 95, 99))


def _money(cents: int) -> str:
    return f"{cents // 100}.{cents % 100:02d}"


def _receipt_layout(rng: random.Random) -> tuple[int, int, int, int]:
    """Return columns and rows of tiles, number of items, and the longest item name."""
    kind = rng.random()
    if kind < 0.55:
        return 1, 1, rng.randint(2, 3), 5
    if kind < 0.8:
        return 1, 2, rng.randint(3, 5), 5
    return 2, 1, rng.randint(2, 3), 10


def _draw_receipt(rng: random.Random, page: Page, rows: list[tuple[str, str]], face: Face, ink: Colour) -> None:
    """Draw names flush left and prices flush right, with a rule above the total (the last row)."""
    pitch = (page.height - _MARGIN) / len(rows)
    gap = rng.uniform(6, 10) if page.width < 150 else rng.uniform(10, 60)
    room = page.width - 2 * _MARGIN
    size = min(rng.uniform(18, 23), pitch * 0.8)
    size = min(page.fit(left + right, face, size, room - gap) for left, right in rows)
    right_edge = page.width - _MARGIN
    if page.width > 150 and rng.random() < 0.5:
        widest = max(page.text_width(left, face, size) + page.text_width(right, face, size) for left, right in rows)
        right_edge = min(right_edge, _MARGIN + widest + gap)
    for i, (left, right) in enumerate(rows):
        y = _MARGIN / 2 + pitch * (i + 0.5)
        page.text(_MARGIN, y, left, face, size, ink)
        if page.width <= TILE:  # on wider pages the two are in different tiles, which do not see each other
            page.bonds.append((_MARGIN + page.text_width(left, face, size) / 2, y, right))
        page.text(right_edge, y, right, face, size, ink, "rm")
    if rng.random() < 0.6:
        y = _MARGIN / 2 + pitch * (len(rows) - 1)
        page.line(_MARGIN, y, right_edge, y, ink)


def _dearest(names: list[str], cents: list[int]) -> str:
    return names[max(range(len(cents)), key=cents.__getitem__)]


def _receipt(rng: random.Random, split: str, scale: float, chinese: bool) -> Picture:
    columns, tile_rows, count, longest = _receipt_layout(rng)
    paper, ink = paper_and_ink(rng, 0.05)
    sheet = Page(TILE * columns, TILE * tile_rows, paper, scale)
    names: list[str] = []
    while len(names) < count:
        new = chinese_word(rng, split, "items-zh", 2) if chinese else word(rng, split, "items", longest, 0.7)
        if new not in names:
            names.append(new)
    cents: list[int] = []
    while len(cents) < count:
        value = _price(rng)
        if value not in cents:
            cents.append(value)
    style = rng.choice((str.upper, str.title))
    names = [style(name) for name in names]
    total = "总计" if chinese else style("total")
    rows = [(name, _money(value)) for name, value in zip(names, cents, strict=True)] + [(total, _money(sum(cents)))]
    face = pick_face(rng, split, names[0])
    if chinese and not has_chinese(names[0]):
        raise AssertionError("a Chinese receipt lists Chinese items")
    _draw_receipt(rng, sheet, rows, face, ink)
    if chinese:
        questions = [("总计是多少？", rows[-1][1]), ("最贵的是什么？", _dearest(names, cents))]
        questions += [(f"{name}多少钱？", price) for name, price in rows[:-1]]
    else:
        questions = [("What is the total?", rows[-1][1]), ("Which item costs most?", _dearest(names, cents))]
        questions += [(f"How much is the {name}?", price) for name, price in rows[:-1]]
    lines = [f"{left} {right}" for left, right in rows]
    drill = [(f"Read line {i}.", line) for i, line in enumerate(lines, 1)]
    drill += [(f"Which line is {name}?", str(i)) for i, name in enumerate(names, 1)]
    drill += [(f"What is the value of {name}?", price) for name, price in rows[:-1]]  # the wording of charts
    return sheet.picture(questions, "\n".join(lines), drill)


def receipt(rng: random.Random, split: str, scale: float) -> Picture:
    """Draw items with prices and their total.

    The questions ask for the total, one price, and the most expensive item.
    """
    return _receipt(rng, split, scale, chinese=False)


def receipt_zh(rng: random.Random, split: str, scale: float) -> Picture:
    """Draw the same as `receipt`, in Chinese."""
    return _receipt(rng, split, scale, chinese=True)


_SEGMENTS = {
    "0": "abcdef", "1": "bc", "2": "abged", "3": "abgcd", "4": "fgbc", "5": "afgcd", "6": "afgedc", "7": "abc",
    "8": "abcdefg", "9": "abcdfg", "-": "g",
}  # fmt: skip


def _seven_segments(page: Page, x: float, y: float, width: float, height: float, digit: str, ink: Colour) -> None:
    """Draw one digit of an LCD: a top, b and c right, d bottom, e and f left, g middle."""
    gap, middle, bottom, right = height * 0.07, y + height / 2, y + height, x + width
    strokes = {
        "a": (x + gap, y, right - gap, y), "g": (x + gap, middle, right - gap, middle),
        "d": (x + gap, bottom, right - gap, bottom), "f": (x, y + gap, x, middle - gap),
        "e": (x, middle + gap, x, bottom - gap), "b": (right, y + gap, right, middle - gap),
        "c": (right, middle + gap, right, bottom - gap),
    }  # fmt: skip
    for segment in _SEGMENTS[digit]:
        page.line(*strokes[segment], ink, height * 0.13)


def meter(rng: random.Random, split: str, scale: float) -> Picture:
    """Draw a display of two to four digits, in seven segments or in type, with its unit.

    The question asks for the number.
    """
    paper, ink = paper_and_ink(rng, 0.4)
    page_ = Page(TILE, TILE, paper, scale)
    digits = "".join(rng.choice("0123456789") for _ in range(rng.randint(2, 4)))
    digits = digits.lstrip("0") or "0"
    shown = digits if len(digits) < 2 or rng.random() < 0.4 else f"{digits[:-1]}.{digits[-1]}"
    unit = rng.choice(("kWh", "m3", "kg", "bar", "C", "V", "kPa", "%"))
    glass, lit = paper_and_ink(rng, 0.5)
    height = rng.uniform(26, 42)
    top = rng.uniform(14, 96 - 22 - height)
    page_.box(4, top - 9, TILE - 5, top + height + 9, glass, ink)
    face = pick_face(rng, split, "a")
    if rng.random() < 0.65:
        height = min(height, (TILE - 22) / len(digits) / 0.78)
        cell = height * 0.78
        x = 13 + rng.uniform(0, max(0.0, TILE - 22 - cell * len(digits)))
        for i, digit in enumerate(digits):
            _seven_segments(page_, x + cell * i, top, cell * 0.5, height, digit, lit)
            if "." in shown and i == len(digits) - 2:
                dot = height * 0.06
                cx = x + cell * (i + 0.75)
                page_.box(cx - dot, top + height - dot, cx + dot, top + height + dot, lit, None)
    else:
        page_.text(TILE / 2, top + height / 2, shown, face, page_.fit(shown, face, height, TILE - 24), lit, "mm")
    page_.text(TILE - 8, min(TILE - 10, top + height + 22), unit, face, 17, ink, "rm")
    return page_.picture([("What does the meter show?", shown)], f"{shown}\n{unit}")
