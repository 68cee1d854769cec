"""The demo: a small model that is shipped with this package, and images with questions about them.

The model reads text in images. Its checkpoint is in `qwen2/` and is loaded like any other. The repository has a similar
one with the InternLM2 text model in `examples/reader/internlm2`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

_HERE = Path(__file__).resolve().parent
CHECKPOINT = _HERE / "qwen2"


@dataclass(frozen=True)
class Question:
    """The file of an image, a question about it, and the correct answer."""

    image: Path
    question: str
    expected: str


def demo_questions() -> list[Question]:
    """Return the questions about the shipped images."""
    entries = json.loads((_HERE / "samples.json").read_text(encoding="utf-8"))
    return [Question(_HERE / entry["image"], entry["question"], entry["answer"]) for entry in entries]
