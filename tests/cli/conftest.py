"""A tiny checkpoint, its bundle made by the command line, and a photograph."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from helpers import tiny
from helpers.commands import internvl_edge


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "bundle"
    result = internvl_edge("export", checkpoint, "-o", out, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["bytes"] == sum(path.stat().st_size for path in out.iterdir())
    return out


@pytest.fixture(scope="session")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real photograph."""
    from skimage import data

    path = tmp_path_factory.mktemp("photo") / "coffee.jpg"
    Image.fromarray(data.coffee()).save(path)
    return path
