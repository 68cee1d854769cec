"""What a model is asked: questions about images from a user's data, from the built-in set, or of a named suite.

The forms of a user's data are those of `calibrate`: a folder of images, or JSON Lines with prompts and answers. Knows
no model; pictures are drawn or read when they are needed.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from internvl_edge.base.errors import EdgeError
from internvl_edge.calibration.items import read_items
from internvl_edge.calibration.texts import TEXTS
from internvl_edge.runtime.options import ChatOptions

# One built-in case in this many is text alone.
_TEXT_EVERY = 4


@dataclass(frozen=True)
class Case:
    """One question.

    Attributes:
        name: for messages.
        question: may hold `<image>` marks.
        images: paths or pictures, in the order of the marks.
        answer: the right answer, "" where none is known.
        also_right: other right answers.
        choices: the texts of the possible answers, where the question has them. The right answer is one of them, or the
            letter of its place.
        tags: what kinds of question it is; suites count per tag.
        is_formula: whether the answer is a formula, whose spaces mean nothing (see `metrics.contains`).
        history: earlier questions and answers, whose marks take the first images.
        system: system text; None is the checkpoint's own.
    """

    name: str
    question: str
    images: tuple[Path | Image.Image, ...] = ()
    answer: str = ""
    also_right: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    is_formula: bool = False
    history: tuple[tuple[str, str], ...] = ()
    system: str | None = None

    @property
    def answers(self) -> tuple[str, ...]:
        """All right answers."""
        return (self.answer, *self.also_right)

    def options(self, limits: ChatOptions) -> ChatOptions:
        """Return the limits together with what goes before the question, as a model takes them."""
        return {**limits, "history": self.history, "system": self.system}


@dataclass(frozen=True)
class QuestionSettings:
    """Which questions are asked, and the limits of each.

    Attributes:
        data: the data set's or the suite's name, for people.
        seed: which questions of it, and in which order.
        max_tiles: most tiles of an image; None is the checkpoint's own limit.
        max_new_tokens: most tokens of an answer.
    """

    data: str = ""
    seed: int = 0
    max_tiles: int | None = None
    max_new_tokens: int = 64

    @property
    def options(self) -> ChatOptions:
        """Return the limits as a model takes them."""
        return {"max_tiles": self.max_tiles, "max_new_tokens": self.max_new_tokens}


def read_cases(source: Path | None, count: int, seed: int = 0) -> list[Case]:
    """The first `count` cases of a folder, of a JSON Lines file, or (None) of the built-in set.

    Raises:
        EdgeError: no data, or an entry that cannot be understood (named): figures over what is left would mislead.
    """
    if source is None:
        return list(itertools.islice(_built_in(seed), count))
    cases = []
    for item in itertools.islice(read_items(source, seed), count):
        if item.problem:
            raise EdgeError(f"{item.name}: {item.problem}; mend or remove it")
        cases.append(Case(item.name, item.prompt, item.images, item.answer, history=item.history, system=item.system))
    return cases


def _built_in(seed: int) -> Iterator[Case]:
    """Synthetic pictures with fonts and words that calibration never sees, and short texts in two languages."""
    texts = list(TEXTS)
    random.Random(f"evaluate/{seed}").shuffle(texts)
    for index in itertools.count():
        if index % _TEXT_EVERY == _TEXT_EVERY - 1:
            question, answer = texts[index // _TEXT_EVERY % len(texts)]
            yield Case(f"text {index}", question, (), answer, tags=("text",))
        else:
            yield _drawn(index, seed)


def _drawn(index: int, seed: int) -> Case:
    from internvl_edge.calibration.synthetic import sample  # fonts are packages of an extra; only this needs them

    drawn = sample("test", index, seed)
    return Case(f"{drawn.task} {index}", drawn.question, (drawn.image,), drawn.answer, tags=(drawn.task,))


def _reader(seed: int) -> Iterator[Case]:
    return (_drawn(index, seed) for index in itertools.count())


# A built-in suite is an endless stream of cases with exact answers, made from a seed.
SUITES: dict[str, Callable[[int], Iterator[Case]]] = {"reader": _reader}
