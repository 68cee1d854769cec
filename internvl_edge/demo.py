"""The demo: a small model that reads, shipped with this package, exported and asked about shipped pictures.

Two checkpoints with the same skill, one per text model: `qwen2` and `internlm2`. Both lie in `data/demo/` like any
other checkpoint and are read like any other.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from .errors import EdgeError

TEXT_MODELS = ("qwen2", "internlm2")
_DATA = Path(__file__).resolve().parent / "data" / "demo"


@dataclass(frozen=True)
class Question:
    """One picture's file, what is asked about it, and the right answer."""

    image: Path
    question: str
    expected: str


def demo_checkpoint(text_model: str) -> Path:
    """The folder of a demo checkpoint.

    Raises:
        EdgeError: there is none of that text model.
    """
    if text_model not in TEXT_MODELS:
        raise EdgeError(f"text model {text_model!r} is not one of {', '.join(TEXT_MODELS)}")
    return _DATA / text_model


def demo_questions() -> list[Question]:
    """The shipped pictures with their questions."""
    entries = json.loads((_DATA / "samples.json").read_text(encoding="utf-8"))
    return [Question(_DATA / entry["image"], entry["question"], entry["answer"]) for entry in entries]
