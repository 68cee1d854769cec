"""A deployment that is killed continues to the same bytes, and no stage that was done is done again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.calibration_data import write_data
from helpers.repository import REPOSITORY
from helpers.tiny import write_checkpoint

SCRIPT = REPOSITORY / "tests" / "helpers" / "killed_deployments.py"
# Moment of the kill -> the stages that the second start must find done.
MOMENTS = {
    "-deployment.json#3": [],  # what was decided is not noted yet
    "vision-choice.json#1": ["plan"],
    "checkpoint#1": ["plan", "quantize"],
    "report.html#1": ["plan", "quantize"],
    "bundle#1": ["plan", "quantize", "export"],
    "bundle#2": ["plan", "quantize", "export"],  # the reference of the evaluation
    "manifest.json#3": ["plan", "quantize", "export", "evaluate"],
}


def kill(folder: Path, *moments: str, seconds: int) -> dict[str, Any]:
    checkpoint = write_checkpoint(folder / "checkpoint")
    data = write_data(folder / "data")
    made = folder / "made"
    made.mkdir()
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}", "OMP_NUM_THREADS": "1"}
    environment |= {"XDG_CACHE_HOME": str(folder / "cache"), "TMPDIR": str(folder)}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, (checkpoint, data, made)), *moments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["stages"] == ["plan", "quantize", "export", "evaluate", "build"]
    for moment, result in found["results"].items():
        assert result["killed"], moment
        assert result["finished"], (moment, done.stderr)
        assert (result["different"], result["beside"]) == ([], []), moment
    return found


@pytest.mark.slow
def test_killed_in_every_stage(tmp_path: Path) -> None:
    found = kill(tmp_path, *MOMENTS, seconds=600)
    assert {moment: result["kept"] for moment, result in found["results"].items()} == MOMENTS


@pytest.mark.slow
def test_killed_around_every_file(tmp_path: Path) -> None:
    found = kill(tmp_path, seconds=7200)
    assert len(found["results"]) == 2 * len(found["moments"])
    assert {moment.removeprefix("-") for moment in MOMENTS} <= set(found["moments"])
