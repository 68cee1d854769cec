"""Runs that kill themselves halfway, and the files that they and the runs after them leave in a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.commands import run_code
from internvl_edge.checkpoint.record import RECORD


def run_and_be_killed(script: str, *arguments: object) -> None:
    """Run a script that must end by killing itself."""
    done = run_code(script, *arguments)
    assert done.returncode == -9, done.stderr


def run_to_the_end(script: str, *arguments: object) -> None:
    """Run a script that must succeed, in a process like those of `run_and_be_killed`.

    What a test process has imported can change the last bit of a sum on some CPUs.
    """
    done = run_code(script, *arguments)
    assert done.returncode == 0, done.stderr


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file of a folder by name.

    For a record of a quantization, omit the fields that depend on the time.
    """
    files = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    if RECORD in files:
        files[RECORD] = json.dumps({**json.loads(files[RECORD]), "run": None}).encode()
    return files


def stop_at(monkeypatch: pytest.MonkeyPatch, moment: int, run: Callable[[], object]) -> int:
    """Run something and interrupt it where it puts its `moment`-th file into place; returns how many it has put."""
    replace, count = Path.replace, 0

    def stopping(path: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        if count == moment:
            raise KeyboardInterrupt
        return replace(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", stopping)
        try:
            run()
        except KeyboardInterrupt:
            assert count == moment
    return count
