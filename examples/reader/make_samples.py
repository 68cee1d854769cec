"""Write the demo's three pictures and their questions: `python make_samples.py` draws them from the test stream."""

from __future__ import annotations

import json
from pathlib import Path

import internvl_edge.demo
from internvl_edge.calibration.synthetic import sample

CHOSEN = {"receipt": 9, "chart": 29, "sign": 32}
"""Task -> index in that task's test stream; chosen for their size, before any model had seen them."""


def main() -> None:
    """Draw and write."""
    folder = Path(internvl_edge.demo.__file__).resolve().parent
    entries = []
    for task, index in CHOSEN.items():
        s = sample("test", index, tasks=[task])
        s.image.save(folder / f"{task}.png", optimize=True)
        entries.append({"image": f"{task}.png", "question": s.question, "answer": s.answer})
    (folder / "samples.json").write_text(json.dumps(entries, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
