"""The demo: a small model that reads, shipped with this package, and the pictures it is asked about.

The checkpoint lies in `qwen2/` and is read like any other. One with the same skill on the InternLM2 text model lies in
the repository, in `examples/reader/internlm2`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

_HERE = Path(__file__).resolve().parent
CHECKPOINT = _HERE / "qwen2"


@dataclass(frozen=True)
class Question:
    """One picture's file, what is asked about it, and the right answer."""

    image: Path
    question: str
    expected: str


def demo_questions() -> list[Question]:
    """The shipped pictures with their questions."""
    entries = json.loads((_HERE / "samples.json").read_text(encoding="utf-8"))
    return [Question(_HERE / entry["image"], entry["question"], entry["answer"]) for entry in entries]
