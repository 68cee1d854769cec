"""Exact match per task. Teacher-forced: an answer counts when every one of its tokens, the end included, is the argmax.

That is what greedy decoding would have said, up to numerical ties, at the price of one forward pass.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import torch
from batches import IGNORE, Batch, join, make_row
from pages import tiles
from torch import Tensor

from internvl_edge.calibration.synthetic import sample


def validation_rows(
    count: int,
    split: str = "validation",
    batch: int = 25,
    tasks: Sequence[str] | None = None,
    blank: bool = False,
    bos: bool = False,
) -> list[Batch]:
    """`count` samples of a split in batches; `blank` replaces every picture by mid-grey."""
    rows = []
    for i in range(count):
        s = sample(split, i, tasks=tasks)
        pixels = tiles(s.image)
        if blank:
            pixels = np.full_like(pixels, 128)
        rows.append(make_row(pixels, [(s.question, s.answer, s.task)], bos))
    return [join(rows[i : i + batch], []) for i in range(0, count, batch)]


def judge(rows: list[Batch], answer: Callable[[Batch], Tensor]) -> dict[str, float]:
    """Share of exact answers, per task and under `all`; `answer` gives the logits at a batch's answer positions."""
    hits: dict[str, list[bool]] = defaultdict(list)
    with torch.no_grad():
        for batch in rows:
            logits = answer(batch).cpu()
            where = torch.from_numpy(batch.targets) != IGNORE
            targets = torch.from_numpy(batch.targets)[where]
            wrong_rows = set(where.nonzero()[:, 0][logits.argmax(-1) != targets].tolist())
            for row, _, task in batch.branches:
                hits[task].append(row not in wrong_rows)
                hits["all"].append(row not in wrong_rows)
    return {task: round(sum(h) / len(h), 4) for task, h in sorted(hits.items())}
