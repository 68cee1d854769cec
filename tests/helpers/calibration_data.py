"""Calibration data for tiny checkpoints, and the compute type that tests calibrate with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from internvl_edge.calibration import choose_compute

FLOAT32 = choose_compute("cpu", "float32")


def write_data(folder: Path, count: int = 6, size: int = 56) -> Path:
    """Write a JSON Lines file: images of one and of several tiles, one text without image, answers in half of them."""
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(3)
    lines = []
    for index in range(count):
        width = size * (1 + index % 3)
        Image.fromarray(random.integers(0, 256, (size, width, 3), np.uint8)).save(folder / f"{index}.png")
        images = [] if index == 1 else [f"{index}.png"]
        line: dict[str, Any] = {"images": images, "prompt": f"what is the number {index} in this picture"}
        lines.append(line | ({"answer": f"the total is {index * 37}"} if index % 2 else {}))
    path = folder / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return path
