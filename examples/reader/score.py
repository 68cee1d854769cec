"""Score a training state on a held-out stream: `python score.py --state STATE [--split test] [--count 500] [--blank]`.

Prints one JSON object: exact match per task of the averaged weights, rounded to bfloat16 as in the checkpoint and
computed in float32. `--blank` shows the model grey pictures instead: what is left is guessing.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from export_reader import LAYOUTS, rounded_reader
from judge import judge, validation_rows
from train import Student


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--layout", choices=LAYOUTS, default="qwen2")
    parser.add_argument("--split", default="test")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--blank", action="store_true")
    a = parser.parse_args()
    state = torch.load(a.state, weights_only=True)
    student = Student(0.0, a.layout)
    student.reader = rounded_reader(state["average"], a.layout)
    rows = validation_rows(a.count, a.split, blank=a.blank, bos=a.layout == "internlm2")
    scores = judge(rows, lambda batch: student.answers(batch, bf16=False))
    print(json.dumps({"step": state["step"], "split": a.split, "count": a.count, "blank": a.blank} | scores, indent=1))


if __name__ == "__main__":
    main()
