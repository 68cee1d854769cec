"""Synthetic pictures with questions and exact answers. The demo model is trained and evaluated on them.

They have three uses: the training of the demo model, the built-in calibration set, and `evaluate --suite reader`. A
sample depends only on (split, index, seed). The splits have different seeds, fonts and words. This package needs the
extra `synthetic` (font packages), but not torch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from PIL import Image

from internvl_edge.base.errors import EdgeError

from . import documents, pictures
from .draw import Picture, damage
from .words import SPLITS

__all__ = ["SPLITS", "TASKS", "SyntheticSample", "draw_picture", "sample"]

_DRAW: dict[str, tuple[Callable[[random.Random, str, float], Picture], float]] = {
    "sign": (documents.sign, 1.0),
    "page": (documents.page, 1.0),
    "label": (documents.label, 1.0),
    "receipt": (documents.receipt, 1.5),
    "meter": (documents.meter, 1.0),
    "chart": (pictures.chart, 1.0),
    "scene": (pictures.scene, 1.0),
    "sign-zh": (documents.sign_zh, 0.4),
    "receipt-zh": (documents.receipt_zh, 0.4),
    "scene-zh": (pictures.scene_zh, 0.4),
}
"""The drawing function of each task, and its share of the stream."""

TASKS: tuple[str, ...] = tuple(_DRAW)

_UPSIDE = 1.4
"""The largest scale. Above it the tiling rule cuts a square page into four tiles instead of one."""


@dataclass(frozen=True)
class SyntheticSample:
    """One picture, one question about it, the exact answer, and its task (one of `TASKS`)."""

    image: Image.Image
    question: str
    answer: str
    task: str


def draw_picture(rng: random.Random, split: str, tasks: Sequence[str] | None = None) -> tuple[Picture, str]:
    """Draw a damaged picture with all its questions. Return it with its task.

    The task is drawn from `tasks` (default: all) by the tasks' shares.
    """
    chosen = TASKS if tasks is None else tuple(tasks)
    unknown = [task for task in chosen if task not in _DRAW]
    if split not in SPLITS or unknown or not chosen:
        found = f"split {split!r}" if split not in SPLITS else f"tasks {unknown}"
        raise EdgeError(f"unknown {found}; splits are {', '.join(SPLITS)}, tasks are {', '.join(TASKS)}")
    task = rng.choices(chosen, [_DRAW[name][1] for name in chosen])[0]
    scale = 1.0 if rng.random() < 0.5 else rng.uniform(1.0, _UPSIDE)
    picture = _DRAW[task][0](rng, split, scale)
    image = damage(picture.image, rng, scale, picture.paper)
    return replace(picture, image=image), task


def sample(split: str, index: int, seed: int = 0, tasks: Sequence[str] | None = None) -> SyntheticSample:
    """Return SyntheticSample `index` of a split's endless stream.

    Equal arguments give the same sample on every machine. `split` is train, validation or test. `tasks` restricts the
    stream (default: all). Raises EdgeError for an unknown split or task and for a font package that is not installed.
    """
    rng = random.Random(f"{split}/{seed}/{index}")
    picture, task = draw_picture(rng, split, tasks)
    question, answer = rng.choice(picture.questions)
    return SyntheticSample(picture.image, question, answer, task)
