"""Bounds of what a bundle is loaded with, checked before anything is opened."""

from __future__ import annotations

from pathlib import Path

import pytest

from internvl_edge import InternVL
from internvl_edge.base.errors import EngineError


@pytest.mark.parametrize("threads", [0, -1, 100_000])
def test_threads_that_no_machine_runs_are_refused(tmp_path: Path, threads: int) -> None:
    with pytest.raises(EngineError, match=f"threads is {threads}, expected 1 to"):
        InternVL.load(tmp_path, threads=threads)


@pytest.mark.parametrize("context", [-1, 0, 1])
def test_a_context_without_room_is_refused(tmp_path: Path, context: int) -> None:
    with pytest.raises(EngineError, match=f"a context of {context} tokens has no room"):
        InternVL.load(tmp_path, context=context)
