"""Token rows for training: one picture, its prompt prefix once, and several questions that see only that prefix.

A row is `prefix, image tokens, question 1 + answer 1, question 2 + answer 2, ...`. The mask hides the questions from
one another and every question's positions start where the prefix ends, so each one is exactly the single-turn prompt
of the runtime, while the picture and the prefix are computed once.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from bonds import Bonds, bond_labels, chart_tile, joined_bonds
from dense import dense_tile
from pages import IMAGE_TOKENS_PER_TILE, distorted, tiles
from tokenizers import Tokenizer
from torch import Tensor
from vocabulary import SYSTEM, qwen2_tokenizer

from internvl_edge.calibration.synthetic import draw_picture

IGNORE = -100
BLOCKED = -30000.0
PLACES = 6
"""Bars of a chart and lines of a receipt, at most."""
GROUP = 8
"""Batches that are drawn together."""
BEFORE = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n<img>"
AFTER = "</img>\n"
ASK = "<|im_end|>\n<|im_start|>assistant\n"
TRANSCRIBE = {"scene": "List all the shapes.", "scene-zh": "List all the shapes."}
READ = "Read all the text."
"""What asks for a picture's transcript: by task, and of every other task."""
BOS_STAND_IN = "<|endoftext|>"
"""The token that plays `<s>`, which the Qwen2 side does not have, while the InternLM2 layout is trained."""
DISTORTED = 0.2
"""Share of the training pictures that are distorted."""


@dataclass
class Batch:
    """Everything of one training step, as numpy arrays (they cross a process boundary)."""

    pixels: np.ndarray
    """uint8 [tiles of all rows, S, S, 3]."""
    ids: np.ndarray
    """int64 [rows, seq]; image positions hold the <IMG_CONTEXT> id."""
    positions: np.ndarray
    """int64 [rows, seq]."""
    segments: np.ndarray
    """int64 [rows, seq]: 0 the shared prefix, 1.. the questions, -1 padding."""
    targets: np.ndarray
    """int64 [rows, seq]: the token to predict here, or IGNORE."""
    branches: list[tuple[int, int, str]]
    """(row, segment, task) of every question."""
    bonds: np.ndarray
    """int64 [n, 3]: the bonds of `pixels` and, behind them, `dense`, their tokens counted from the batch's first."""
    places: np.ndarray
    """int64 [n, 3]: row and position at which an answer begins, and which bar or line it is about."""
    dense: np.ndarray
    """uint8 [tiles, S, S, 3] that no question is about: full of text, then of charts."""
    dense_labels: np.ndarray
    """int64 [tiles of text, tokens, 8], see dense.py."""


@dataclass(frozen=True)
class Row:
    """A tokenised picture before padding."""

    pixels: np.ndarray
    ids: list[int]
    positions: list[int]
    segments: list[int]
    targets: list[int]
    tasks: list[str]
    places: list[tuple[int, int]]
    bonds: Bonds


@cache
def encoder() -> Tokenizer:
    """The training tokenizer, made once per process."""
    return qwen2_tokenizer()


def encode(text: str) -> list[int]:
    return encoder().encode(text, add_special_tokens=False).ids


def make_row(
    pixels: np.ndarray,
    questions: list[tuple[str, str, str]],
    bos: bool = False,
    bonds: Bonds | None = None,
    transcript: str = "",
) -> Row:
    """Tokens of one picture with its (question, answer, task) triples; `bos` begins with InternLM2's `<s>`.

    `transcript` tells which line of the picture a question is about.
    """
    context = encoder().token_to_id("<IMG_CONTEXT>")
    ids = (
        [encoder().token_to_id(BOS_STAND_IN)] * bos
        + encode(BEFORE)
        + [context] * (IMAGE_TOKENS_PER_TILE * len(pixels))
        + encode(AFTER)
    )
    start = len(ids)
    positions, segments, targets = list(range(start)), [0] * start, [IGNORE] * start
    places = []
    for number, (question, answer, _) in enumerate(questions, 1):
        asked, said = encode(question + ASK), encode(answer + "<|im_end|>")
        if (place := place_of(question, answer, transcript)) is not None:
            places.append((len(ids) + len(asked) - 1, place))
        ids += asked + said[:-1]
        length = len(asked) + len(said) - 1
        positions += range(start, start + length)
        segments += [number] * length
        targets += [IGNORE] * (len(asked) - 1) + said
    return Row(pixels, ids, positions, segments, targets, [task for _, _, task in questions], places, bonds or [])


def place_of(question: str, answer: str, transcript: str) -> int | None:
    """The line "name value" of the transcript that is meant, counted from 0; None without one.

    Meant is the line whose name the question ends with and whose value is the answer (a price), or whose name is the
    answer (the dearest item) and no other line's.
    """
    lines = [line.rpartition(" ") for line in transcript.splitlines()[:PLACES]]
    names = [name for name, _, _ in lines]
    for place, (name, _, value) in enumerate(lines):
        looked_up = value == answer and (f" {name}?" in question or question.startswith(name))
        if name and (looked_up or (name == answer and names.count(name) == 1)):
            return place
    return None


def pad(rows: list[Row]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """ids, positions, segments and targets of all rows, each [rows, longest]."""
    longest = max(len(row.ids) for row in rows)

    def table(name: str, filler: int) -> np.ndarray:
        out = np.full((len(rows), longest), filler, np.int64)
        for i, row in enumerate(rows):
            values = getattr(row, name)
            out[i, : len(values)] = values
        return out

    return table("ids", 0), table("positions", 0), table("segments", -1), table("targets", IGNORE)


def join(
    rows: list[Row], dense: list[tuple[np.ndarray, np.ndarray]], charts: list[tuple[np.ndarray, Bonds]] | None = None
) -> Batch:
    """One batch of rows; `dense` and `charts` add tiles for the vision tower alone, which keep it from forgetting."""
    branches = [(r, s, task) for r, row in enumerate(rows) for s, task in enumerate(row.tasks, 1)]
    extra = [pixels for pixels, _ in (*dense, *(charts or []))]
    labels = [cells for _, cells in dense]
    places = [(r, *place) for r, row in enumerate(rows) for place in row.places]
    bonds = [(len(row.pixels), row.bonds) for row in rows] + [(len(dense), [])]
    bonds += [(1, found) for _, found in charts or []]
    return Batch(
        np.concatenate([row.pixels for row in rows]),
        *pad(rows),
        branches,
        joined_bonds(bonds),
        np.array(places, np.int64).reshape(-1, 3),
        np.stack(extra) if extra else np.zeros(0, np.uint8),
        np.stack(labels) if labels else np.zeros(0, np.int64),
    )


@dataclass(frozen=True)
class Recipe:
    """What a training batch is made of."""

    seed: int
    pictures: int
    """Rows of a batch."""
    dense: int
    """Stage-one tiles added to a batch."""
    charts: int
    """Tiles of charts added to a batch."""
    questions: int
    """Questions asked about one picture, at most."""
    drill: int
    """More of them from its drill, at most."""
    transcribe: float
    """Share of the pictures that are also read out in full."""
    tasks: tuple[str, ...]
    """Tasks to draw, by their shares."""
    bos: float
    """Share of the prompts that begin with `<s>`, as InternLM2's do."""


def training_group(number: int, recipe: Recipe) -> list[Batch]:
    """`GROUP` batches of the endless training stream; rows are sorted by length before the cut, to save padding."""
    rng = random.Random(f"reader-{recipe.seed}-{number}")
    rows = []
    for _ in range(recipe.pictures * GROUP):
        picture, task = draw_picture(rng, "train", recipe.tasks)
        asked = rng.sample(picture.questions, min(recipe.questions, len(picture.questions)))
        asked += rng.sample(picture.drill, min(recipe.drill, len(picture.drill)))
        triples = [(question, answer, task) for question, answer in asked]
        if picture.transcript and rng.random() < recipe.transcribe:
            triples.append((TRANSCRIBE.get(task, READ), picture.transcript, "transcript"))
        image = distorted(picture.image, rng, picture.paper) if rng.random() < DISTORTED else picture.image
        pixels = tiles(image)
        bos = rng.random() < recipe.bos
        rows.append(make_row(pixels, triples, bos, bond_labels(picture, len(pixels)), picture.transcript))
    rows.sort(key=lambda row: len(row.ids))
    cut = [rows[i : i + recipe.pictures] for i in range(0, len(rows), recipe.pictures)]
    rng.shuffle(cut)
    return [
        join(part, [dense_tile(rng) for _ in range(recipe.dense)], [chart_tile(rng) for _ in range(recipe.charts)])
        for part in cut
    ]


def attention_bias(segments: Tensor) -> Tensor:
    """[rows, seq] segments -> additive mask [rows, seq, seq]: causal, own question and prefix only."""
    query, key = segments[:, :, None], segments[:, None, :]
    causal = torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool, device=segments.device).tril()
    allowed = causal & ((key == 0) | (key == query))
    return torch.where(allowed, 0.0, BLOCKED)
