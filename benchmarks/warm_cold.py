"""Whether an answer depends on what the model was asked before.

    python benchmarks/warm_cold.py WORK [--conversations 500] [--row NAME ...]

Random conversations with the demo model: one to four turns, with up to two images, long and short texts, and between
them answers that are thrown away half read, sampled or guessed ahead. The same model object answers all of them, and
each turn is asked again of a model that has answered nothing: a second object whose prompts and images are forgotten,
and for every fiftieth turn a bundle that is loaded anew. Both follow their own most probable tokens. Tokens and
logits are compared, to the bit.

"any position" is the peer: the same, where the end of the prefix that is used again may lie anywhere in a prompt. The
rows that end in it stand for what the rule of `runtime/prefixes.py` prevents.

WORK keeps bundles and rows. Results: results/warm-cold.json, for each row the turns, those with other tokens or other
logits, the largest difference of a logit, and the share of prompt tokens that were not computed again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image
from record import write_results

from internvl_edge import InternVL, export_bundle
from internvl_edge.calibration import DataOptions, choose_compute
from internvl_edge.demo import CHECKPOINT, demo_questions
from internvl_edge.quantize import quantize_checkpoint
from internvl_edge.recipe.files import make_recipe
from internvl_edge.runtime import prefixes
from internvl_edge.runtime.image_cache import ImageCache

READER = Path(__file__).resolve().parents[1] / "examples" / "reader" / "internlm2"
CONTEXT = 2048
LOADED_EVERY = 50
AWQ = {"decoder": "w4a16-awq", "group_size": 64}
WORDS = ["value", "of", "Dora", "Bagel", "total", "price", "line", "sign", "museum", "gate", "count", "colour", "28"]


@dataclass(frozen=True)
class Row:
    """One bundle on one engine."""

    name: str
    bundle: str
    engine: str = "onnxruntime"
    dialect: str | None = None
    any_position: bool = False
    share: float = 1.0  # of the conversations

    def load(self, work: Path) -> InternVL:
        options: dict[str, Any] = {"engine": self.engine, "dialect": self.dialect, "context": CONTEXT, "threads": 1}
        return InternVL.load(work / self.bundle, **options)


ROWS = [
    Row("onnxruntime, int4", "int4"),
    Row("onnxruntime, int4, standard", "int4", dialect="standard"),
    Row("onnxruntime, int4, int8 prompts", "int4-prompts"),
    Row("onnxruntime, float32", "float32"),
    Row("onnxruntime, float16", "float16"),
    Row("openvino, float32", "float32", "openvino"),
    Row("openvino, float16", "float16", "openvino"),
    Row("openvino, int4", "int4", "openvino"),
    Row("onnxruntime, int4, any position", "int4", any_position=True),
    Row("onnxruntime, int4, int8 prompts, any position", "int4-prompts", any_position=True, share=0.2),
    Row("onnxruntime, float32, any position", "float32", any_position=True, share=0.2),
    Row("openvino, float32, any position", "float32", "openvino", any_position=True, share=0.2),
    Row("onnxruntime, int4, internlm2", "int4-internlm2"),
    Row("onnxruntime, float32, standard", "float32", dialect="standard"),
    Row("onnxruntime, w8a8", "w8a8"),
    Row("onnxruntime, float32, int8 cache", "int8-cache"),
    Row("openvino, int4, int8 prompts", "int4-prompts", "openvino"),
]


@click.command()
@click.argument("work", type=click.Path(path_type=Path))
@click.option("--conversations", default=500, show_default=True)
@click.option("--row", "chosen", multiple=True, help="Measure these rows alone; the others stay as they are.")
def main(work: Path, conversations: int, chosen: tuple[str, ...]) -> None:
    """Measure and write `results/warm-cold.json`."""
    work.mkdir(parents=True, exist_ok=True)
    make_bundles(work)
    kept = work / "rows.json"
    found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    for row in ROWS:
        if (row.name in found and row.name not in chosen) or (chosen and row.name not in chosen):
            continue
        found[row.name] = measure(row, work, round(row.share * conversations))
        print(row.name, json.dumps(found[row.name]), flush=True)
        kept.write_text(json.dumps(found), encoding="utf-8")
    rows = {row.name: found[row.name] for row in ROWS if row.name in found}
    write_results("warm-cold", {"context": CONTEXT, "threads": 1, "rows": rows})


# Bundle: checkpoint, fields of the recipe (none for floats), options of the export.
BUNDLES: dict[str, tuple[Path, dict[str, Any], dict[str, Any]]] = {
    "float32": (CHECKPOINT, {}, {"dtype": "float32"}),
    "float16": (CHECKPOINT, {}, {"dtype": "float16"}),
    "int4": (CHECKPOINT, AWQ, {}),
    "int4-internlm2": (READER, AWQ, {}),
    "int4-prompts": (CHECKPOINT, AWQ, {"int8_prompts": True}),
    "w8a8": (CHECKPOINT, {"decoder": "w8a8"}, {}),
    "int8-cache": (CHECKPOINT, {"decoder": "fp", "kv_cache": "int8"}, {"dtype": "float32"}),
}


def make_bundles(work: Path) -> None:
    """Export the demo model in every kind; what is there stays."""
    for name, (checkpoint, fields, options) in BUNDLES.items():
        if (work / name).exists():
            continue
        source = work / f"{name}-checkpoint" if fields else checkpoint
        if fields and not source.exists():
            compute = choose_compute("cpu", "float32")
            quantize_checkpoint(checkpoint, source, make_recipe(fields), data=DataOptions(samples=32), compute=compute)
        export_bundle(source, work / name, **options)


@dataclass
class Turn:
    """One question, and what it has beside it."""

    question: str
    images: list[Image.Image]
    history: list[tuple[str, str]]
    options: dict[str, Any]


class Talk:
    """Random conversations, the same ones for every row."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._pictures = [self._picture(asked.image) for asked in demo_questions()]

    def conversation(self) -> Iterator[Turn]:
        """Yield turns; the answer of each is appended to the history by `answered`."""
        random = self._random
        self._history: list[tuple[str, str]] = []
        images: list[Image.Image] = []
        options = {"max_tiles": int(random.integers(1, 4)), "max_new_tokens": int(random.integers(2, 13))}
        if random.random() < 0.2:
            options["system"] = self._text(1, 12)
        for number in range(random.integers(1, 5)):
            new = [self._some_picture() for _ in range(random.choice([0, 1, 2], p=[0.4, 0.5, 0.1]))]
            images += new
            text = self._asked() if random.random() < 0.5 else self._text(1, 90 if number == 0 else 15)
            self._question = "<image>\n" * len(new) + text
            yield Turn(self._question, list(images), list(self._history), options)

    def answered(self, text: str) -> None:
        """Say what the answer to the last turn was."""
        self._history.append((self._question, text))

    def disturb(self, model: InternVL) -> None:
        """Ask something else, in one of the ways that leave something in a model, or nothing."""
        random = self._random
        way = random.integers(9)
        if way == 0:
            next(model.stream(self._text(1, 60), max_new_tokens=int(random.integers(2, 9))), None)
        elif way == 1:
            model.chat(
                self._asked(), self._some_picture(), temperature=1.0, seed=int(random.integers(99)), max_new_tokens=9
            )
        elif way == 2:
            model.chat(self._text(3, 20) * 2, max_new_tokens=20, speculate=True)

    def _asked(self) -> str:
        return str(self._random.choice([asked.question for asked in demo_questions()]))

    def _text(self, least: int, most: int) -> str:
        return " ".join(self._random.choice(WORDS, int(self._random.integers(least, most + 1))))

    def _some_picture(self) -> Image.Image:
        return self._pictures[self._random.integers(len(self._pictures))]

    @staticmethod
    def _picture(path: Path) -> Image.Image:
        with Image.open(path) as image:
            return image.convert("RGB")


def measure(row: Row, work: Path, conversations: int) -> dict[str, Any]:
    """Ask the same conversations of a model that keeps what it has and of one that has nothing."""
    kept = prefixes.common_steps
    if row.any_position:
        prefixes.common_steps = lambda one, other, longest: [longest] if longest else []  # type: ignore[attr-defined]
    talk, began = Talk(0), time.perf_counter()
    turns = tokens = computed = other_tokens = other_logits = loaded = 0
    largest = 0.0
    try:
        with row.load(work) as warm, row.load(work) as cold:
            for _ in range(conversations):
                for turn in talk.conversation():
                    options: dict[str, Any] = {**turn.options, "history": turn.history}
                    talk.disturb(warm)
                    got = warm.trace(turn.question, turn.images, **options)
                    if turns % LOADED_EVERY:
                        forget(cold)
                        expected = cold.trace(turn.question, turn.images, **options)
                    else:
                        with row.load(work) as fresh:
                            expected = fresh.trace(turn.question, turn.images, **options)
                        loaded += 1
                    talk.answered(expected.reply.text)
                    turns += 1
                    tokens += len(got.reply.prompt_ids)
                    computed += int(got.reply.timings["prefill_tokens"])
                    other_tokens += got.reply.output_ids != expected.reply.output_ids
                    other_logits += not np.array_equal(got.logits, expected.logits)
                    largest = max(largest, float(np.abs(got.logits[0] - expected.logits[0]).max()))
    finally:
        prefixes.common_steps = kept  # type: ignore[attr-defined]
    return {
        "conversations": conversations,
        "turns": turns,
        "compared_with_a_new_load": loaded,
        "turns_with_other_tokens": other_tokens,
        "turns_with_other_logits": other_logits,
        "largest_difference_of_first_logits": largest,
        "prompt_tokens": tokens,
        "share_used_again": round(1 - computed / tokens, 4),
        "seconds": round(time.perf_counter() - began, 1),
    }


def forget(model: InternVL) -> None:
    """Leave nothing of earlier questions in a model but what its libraries keep."""
    model._images = ImageCache(model.engine)  # asking for the engine forgets the rows


if __name__ == "__main__":
    main()
