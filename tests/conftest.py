"""Where the goldens of the original code lie."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def oracle() -> Path:
    """The folder of reference checkpoints; its absence skips a test, except on CI, where it fails it."""
    folder = Path(os.environ.get("INTERNVL_EDGE_ORACLE", REPOSITORY.parent / "shared" / "oracle"))
    if not folder.is_dir():
        message = f"no reference checkpoints at {folder}; set INTERNVL_EDGE_ORACLE to their folder"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return folder
