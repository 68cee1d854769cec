"""The state of a killed run after damage: the next run makes the same bytes, or says in one line to discard it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from helpers.calibration_data import FLOAT32, write_data
from helpers.damage import damage_state
from helpers.killed_runs import contents, stop_at
from helpers.tiny import write_checkpoint
from internvl_edge.base.errors import EdgeError
from internvl_edge.calibration import DataOptions, calibrate, pipeline
from internvl_edge.quantize import quantize_checkpoint
from internvl_edge.recipe.recipe import Automatic, Recipe, VisionInt8

RECIPES = {
    "all": Recipe(
        group_size=32,
        symmetric=True,
        kv_cache="int8",
        lm_head="int8",
        vision="int8",
        vision_int8=VisionInt8(cosine=0.5),
        automatic=Automatic(target_bits=5.0),
    ),
    "without data": Recipe("w4a16-rtn", group_size=32),
    "calibration set": None,
}
# How far a run has come when it stops, and how often what it left is damaged.
STOPS, DAMAGES = (0.6, 0.7, 0.8, 0.95), 4


@pytest.mark.parametrize("name", [pytest.param("all", marks=pytest.mark.slow), "without data", "calibration set"])
def test_damaged_state_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(pipeline, "_WAVE_BYTES", 20_000)
    checkpoint, options = write_checkpoint(tmp_path / "checkpoint"), DataOptions(write_data(tmp_path / "data"))
    run = runner(checkpoint, options, RECIPES[name])
    writes = stop_at(monkeypatch, -1, lambda: run(tmp_path / "whole"))
    whole = figures(tmp_path / "whole")
    random, outcomes = Random(0), {True: 0, False: 0}
    for stop in STOPS:
        stop_at(monkeypatch, round(stop * writes), lambda: run(tmp_path / "killed"))
        assert (tmp_path / "killed.partial").exists()
        for attempt in range(DAMAGES):
            out = tmp_path / f"{stop}-{attempt}"
            shutil.copytree(tmp_path / "killed.partial", tmp_path / f"{out.name}.partial")
            what = damage_state(tmp_path / f"{out.name}.partial", random)
            refused = refusal(run, out)
            assert "--restart" in refused or not refused, what
            outcomes[bool(refused)] += 1
            if refused:
                run(out, restart=True)
            assert figures(out) == whole, what
            assert not (tmp_path / f"{out.name}.partial").exists(), what
            shutil.rmtree(out)
        run(tmp_path / "killed", restart=True)
        shutil.rmtree(tmp_path / "killed")
    assert all(outcomes.values()), outcomes


def refusal(run: Callable[..., object], out: Path) -> str:
    """The one line of a run that does not continue, or nothing."""
    try:
        run(out)
    except EdgeError as error:
        return str(error)
    return ""


def figures(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if not name.startswith("report.")}


def runner(checkpoint: Path, options: DataOptions, recipe: Recipe | None) -> Callable[..., object]:
    def run(out: Path, restart: bool = False) -> object:
        if recipe is None:
            return calibrate(checkpoint, out, options, FLOAT32, restart=restart)
        data = options if recipe.needs_data else None
        return quantize_checkpoint(checkpoint, out, recipe, data=data, compute=FLOAT32, restart=restart)

    return run
