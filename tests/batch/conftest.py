"""The demo model, which reads its pictures, and tables that ask about them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from internvl_edge import InternVL, export_bundle
from internvl_edge.demo import CHECKPOINT, demo_questions


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_bundle(CHECKPOINT, tmp_path_factory.mktemp("batch") / "bundle")


@pytest.fixture(scope="session")
def model(bundle: Path) -> Iterator[InternVL]:
    with InternVL.load(bundle, engine="onnxruntime", rows=4, threads=1, prompts_first=True) as loaded:
        yield loaded


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Twelve rows: three questions about three pictures, four times over."""
    rows: list[dict[str, Any]] = [
        {"id": f"{number}-{turn}", "images": [str(each.image)], "prompt": each.question}
        for turn in range(4)
        for number, each in enumerate(demo_questions())
    ]
    path = tmp_path / "table.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
