"""Draw the training logs: `python plot.py --out FOLDER` reads vision.jsonl and reader.jsonl and writes curves.png."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of one log; none when the stage has not run."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def draw(folder: Path) -> Path:
    """Characters of dense tiles, where stage one ran; answer loss and token accuracy; exact match per task."""
    mpl.use("Agg")
    vision, reader = read_log(folder / "vision.jsonl"), read_log(folder / "reader.jsonl")
    count = 3 if vision else 2
    figure, panels = plt.subplots(1, count, figsize=(5 * count, 4.5))
    middle, right = panels[-2:]
    if vision:
        panels[0].plot([e["tiles"] / 1e3 for e in vision], [e["accuracy"] for e in vision])
        panels[0].set(title="Stage 1: letters in dense tiles", xlabel="thousand tiles", ylabel="accuracy", ylim=(0, 1))
    x = [e["pictures"] / 1e3 for e in reader]
    middle.plot(x, [e["loss"] for e in reader], color="tab:red")
    middle.set(title="Stage 2: answers", xlabel="thousand pictures", ylabel="loss (red)", ylim=(0, None))
    tokens = middle.twinx()
    tokens.plot(x, [e["token"] for e in reader])
    tokens.set(ylabel="token accuracy (blue)", ylim=(0, 1))
    judged = [e for e in reader if "validation" in e]
    for task in sorted({task for e in judged for task in e["validation"]}):
        scores = [e["validation"].get(task) for e in judged]
        right.plot([e["pictures"] / 1e3 for e in judged], scores, label=task, linewidth=3 if task == "all" else 1)
    right.set(title="Exact match, unseen fonts and words", xlabel="thousand pictures", ylim=(0, 1))
    if judged:
        right.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(folder / "curves.png", dpi=80)
    return folder / "curves.png"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    print(draw(parser.parse_args().out))
