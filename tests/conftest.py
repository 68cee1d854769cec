"""Where the goldens of the original code lie, and a CPU that rounds alike everywhere."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from internvl_edge.base import machine

settings.register_profile("shared machines stall", deadline=None)
settings.load_profile("shared machines stall")

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


@pytest.fixture(scope="session", autouse=True)
def _no_bfloat16() -> Iterator[None]:
    """Where OpenVINO is installed, the engine that is chosen rounds to bfloat16 on some CPUs and not on others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "multiplies_bfloat16", lambda: False)
        yield
