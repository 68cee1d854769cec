"""The metrics of a suite, written again from the papers and from the words of the original evaluations.

Nothing here imports the product, and nothing is written for speed: distances are a recursion, intervals are solved.
"""

from __future__ import annotations

import functools
import math
import re
import unicodedata
from collections.abc import Sequence
from fractions import Fraction


def exact(answer: str, right: Sequence[str]) -> float:
    return 1.0 if any(answer.strip() == text.strip() for text in right) else 0.0


def anls(answer: str, right: Sequence[str]) -> float:
    """The evaluation of DocVQA: smallest normalized distance first, then the threshold on the similarity."""
    distances = []
    for text in right:
        truth, found = " ".join(text.strip().lower().split()), " ".join(answer.strip().lower().split())
        length = max(len(text), len(answer))
        distances.append(levenshtein(truth, found) / length if length else 0.0)
    similarity = 1 - min(distances)
    return 0.0 if similarity < 0.5 else similarity


def levenshtein(one: str, other: str) -> int:
    """The recursion of the definition."""

    @functools.cache
    def distance(i: int, j: int) -> int:
        if i == 0 or j == 0:
            return i + j
        return min(
            distance(i - 1, j) + 1,
            distance(i, j - 1) + 1,
            distance(i - 1, j - 1) + (one[i - 1] != other[j - 1]),
        )

    return distance(len(one), len(other))


def relaxed(answer: str, right: Sequence[str]) -> float:
    """ChartQA, section 5.1: within 5 % of the gold number, else the same text."""

    def number(text: str) -> Fraction | None:
        percent = text.endswith("%")
        found = re.fullmatch(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", text.rstrip("%") if percent else text)
        return Fraction(text.rstrip("%").strip()) / (100 if percent else 1) if found else None

    for text in right:
        predicted, gold = number(answer.strip()), number(text.strip())
        if predicted is not None and gold is not None and gold != 0:
            if abs(predicted - gold) * 20 <= abs(gold):
                return 1.0
        elif answer.strip().lower() == text.strip().lower():
            return 1.0
    return 0.0


def contained(answer: str, right: Sequence[str], formula: bool) -> float:
    """OCRBench: a right answer is part of the prediction; formulas lose all spaces and keep their case."""
    hits = 0
    for text in right:
        if formula:
            truth, found = ("".join(part.split(" ")) for part in (clean(text), clean(answer)))
        else:
            truth, found = clean(text).lower(), clean(answer).lower()
        hits += found.find(truth) >= 0
    return 1.0 if hits else 0.0


def clean(text: str) -> str:
    return " ".join(text.strip().split("\n"))


def normalized(answer: str, right: Sequence[str]) -> float:
    """Without case, spaces, quotes and end stop; a single number by its value, "yes" and "no" by their first word."""
    return float(any(_same(answer, text) for text in right))


def _same(one: str, other: str) -> bool:
    return _plain(one) == _plain(other)


def _plain(text: str) -> tuple[str, Fraction | None]:
    quotes = set("\"'`“”‘’«»* ")
    characters = list(" ".join(unicodedata.normalize("NFKC", text).casefold().split()))
    while characters and characters[-1] in quotes:
        characters.pop()
    while characters and characters[0] in quotes:
        characters.pop(0)
    while characters and characters[-1] in set(".!?。 "):
        characters.pop()
    while characters and characters[-1] in quotes:
        characters.pop()
    while characters and characters[0] in quotes:
        characters.pop(0)
    plain = "".join(characters)
    for word, means in {"yes": "yes", "yeah": "yes", "yep": "yes", "no": "no", "nope": "no"}.items():
        if re.match(rf"{word}(?!\w)", plain) and re.match(r"\W*$|\s*[,;.:!]", plain[len(word) :]):
            return means, None
    numbers = list(re.finditer(r"[+-]?[$€£¥]?\s?(\d{1,3}(,\d{3})+|\d+)(\.\d+)?", plain))
    if len(numbers) != 1:
        return plain, None
    found = numbers[0]
    value = Fraction(re.sub(r"[^\d.]", "", found[0]))
    return plain[: found.start()] + "#" + plain[found.end() :], -value if found[0].startswith("-") else value


def choice(answer: str, right: Sequence[str], choices: Sequence[str]) -> float:
    """MMMU's rules in the order of `eval_utils.py`, completed as `named_choice` says, without the random guess."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(choices)]
    wanted = {choices.index(text) if text in choices else letters.index(text.strip()) for text in right}
    for place, text in enumerate(choices):
        if _same(answer, text):
            return float(place in wanted)
    response = answer
    for char in (",", ".", "!", "?", ";", ":", "'"):
        response = response.strip(char)
    spaced = " " + response + " "
    rules = [
        {place: spaced.rfind("(" + letter + ")") for place, letter in enumerate(letters)},
        {place: spaced.rfind(" " + letter + " ") for place, letter in enumerate(letters)},
        {place: 0 if re.match(rf"\s*{letter}[.:)]", response) else -1 for place, letter in enumerate(letters)},
        {
            place: response.lower().rfind(text.lower()) if len(response.split()) > 5 else -1
            for place, text in enumerate(choices)
        },
    ]
    for rule in rules:
        named = [place for place in rule if rule[place] >= 0]
        if named:
            last = max(named, key=lambda place: (rule[place], -place))
            return float(last in wanted)
    return 0.0


def wilson_ends(right: int, asked: int) -> tuple[float, float]:
    """The shares p from which the observed share is 1.96 standard errors away: by bisection, not by the formula."""
    share, z = right / asked, 1.959963984540054

    def distance(p: float) -> float:
        return abs(share - p) - z * math.sqrt(p * (1 - p) / asked)

    def root(near: float, far: float) -> float:
        for _ in range(200):
            middle = (near + far) / 2
            near, far = (middle, far) if distance(middle) <= 0 else (near, middle)
        return near

    return root(share, 0.0), root(share, 1.0)
