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
SMALL_ORACLE = Path(__file__).resolve().parent / "oracle"


@pytest.fixture(scope="session")
def small_oracle() -> Path:
    """The folder of committed reference checkpoints, whose vocabularies are cut; `oracle/README.md` describes it."""
    return SMALL_ORACLE


@pytest.fixture(scope="session")
def full_oracle() -> Path:
    """The folder of the same checkpoints with the full vocabularies, which is not committed.

    Its absence skips a test; INTERNVL_EDGE_REQUIRE_ORACLE=1 makes it a failure.
    """
    folder = Path(os.environ.get("INTERNVL_EDGE_ORACLE", REPOSITORY.parent / "shared" / "oracle"))
    if not folder.is_dir():
        message = f"no full reference checkpoints at {folder}; set INTERNVL_EDGE_ORACLE to their folder"
        if os.environ.get("INTERNVL_EDGE_REQUIRE_ORACLE") == "1":
            pytest.fail(message, pytrace=False)
        pytest.skip(message)
    return folder


@pytest.fixture(scope="session", params=["small", "full"])
def oracle(request: pytest.FixtureRequest) -> Path:
    """The folder of reference checkpoints, one layer after the other: a test that takes it runs on both."""
    folder: Path = request.getfixturevalue(f"{request.param}_oracle")
    return folder


@pytest.fixture(scope="session", autouse=True)
def _no_bfloat16() -> Iterator[None]:
    """Where OpenVINO is installed, the engine that is chosen rounds to bfloat16 on some CPUs and not on others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "multiplies_bfloat16", lambda: False)
        yield
