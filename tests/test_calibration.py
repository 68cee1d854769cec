"""Calibration sees what the device sees: statistics against a plain forward, data in every form, kills and damage."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from reference import Reference
from safetensors.torch import load_file, save_file
from tiny import write_checkpoint
from torch import Tensor

from internvl_edge.calibration import CalibrationSet, DataOptions, calibrate, choose_compute, read_statistics
from internvl_edge.calibration.items import read_items
from internvl_edge.calibration.statistics import Observer, Wanted, whole_gram
from internvl_edge.errors import EdgeError

FLOAT32 = choose_compute("cpu", "float32")
KINDS: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "internlm2 dynamic": {
        "text": "internlm2",
        "max_position_embeddings": 16,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
    },
    "internlm2 linear, v1": {
        "text": "internlm2",
        "bias": True,
        "ps_version": "v1",
        "rope_scaling": {"type": "linear", "factor": 4.0},
    },
    "6b": {"vision": "6b", "text": "internlm2", "vision_hidden_size": 96, "vision_num_attention_heads": 6},
    "native llama": {"layout": "native", "text": "llama", "bias": True},
    "earlier layer": {"select_layer": -2, "vision_num_hidden_layers": 3},
}


def write_data(folder: Path, count: int = 6, size: int = 56) -> Path:
    """A JSON Lines file: images of one and of several tiles, one text without image, answers in half of them."""
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


class Recorder(Reference):
    """The reference, remembering the input of every linear layer."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, torch.float64)
        self.seen: dict[str, list[Tensor]] = {}

    def _linear(self, x: Tensor, name: str) -> Tensor:
        self.seen.setdefault(name, []).append(x.flatten(0, -2))
        return super()._linear(x, name)


RENAMES = {
    "vision.layers.": "vision_model.encoder.layers.",
    "decoder.layers.": "language_model.model.layers.",
    "projector.fc1": "mlp1.1",
    "projector.fc2": "mlp1.3",
}


def reference_name(name: str) -> str:
    for ours, theirs in RENAMES.items():
        name = name.replace(ours, theirs)
    return name


def tiles_of(path: Path, max_tiles: int) -> dict[str, np.ndarray]:
    from reference import tile_image

    return {image.name: tile_image(Image.open(image), max_tiles, size=56) for image in path.parent.glob("*.png")}


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_are_those_of_a_plain_forward(tmp_path: Path, kind: str) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", **KINDS[kind])
    data = write_data(tmp_path / "data")
    made = calibrate(checkpoint, tmp_path / "stats", DataOptions(data, max_tiles=2), FLOAT32)
    recorder, tiles = Recorder(checkpoint), tiles_of(data, 2)
    ids = np.split(np.load(made.folder / "tokens.npy"), np.cumsum(made.lengths)[:-1])
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    embeddings = []
    for name, sample in zip(made.names, ids, strict=True):
        images = lines[int(name.rpartition(":")[2]) - 1]["images"]
        pixels = tiles[images[0]] if images else None
        embeddings.append(recorder.embed(sample.tolist(), pixels))
        recorder.logits(sample.tolist(), pixels)
    torch.testing.assert_close(
        torch.from_numpy(np.array(made.embeddings())), torch.cat(embeddings).float(), atol=2e-5, rtol=1e-5
    )
    statistics = read_statistics(made.folder)
    names = {name.removesuffix(".mean_abs") for name in statistics if name.endswith(".mean_abs")}
    same_input = (".k_proj", ".v_proj", ".up_proj", "lm_head")
    unused = "vision_model.encoder.layers.2."  # with select_layer -2 nothing depends on the third block
    expected = {name for name in recorder.seen if not name.endswith(same_input) and not name.startswith(unused)}
    assert {reference_name(name) for name in names} == expected
    for name in names:
        seen = torch.cat(recorder.seen[reference_name(name)]).abs()
        torch.testing.assert_close(
            torch.from_numpy(statistics[f"{name}.mean_abs"]).double(), seen.mean(0), rtol=1e-3, atol=1e-5
        )
        torch.testing.assert_close(
            torch.from_numpy(statistics[f"{name}.max_abs"]).double(), seen.amax(0), rtol=1e-3, atol=1e-4
        )
