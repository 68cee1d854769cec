"""Exported tiny bundles for engines over a fake GPU, and windows of the cache that suit them."""

from __future__ import annotations

import pytest

from helpers import tiny
from helpers.kv_scales import write_scales
from internvl_edge import export_bundle
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.runtime.engines.tensorrt import steps


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("gpu")
    return Bundle.open(export_bundle(tiny.write_checkpoint(folder / "checkpoint"), folder / "bundle", "float16"))


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same with an int8 KV cache."""
    folder = tmp_path_factory.mktemp("rounded")
    checkpoint = tiny.write_checkpoint(folder / "checkpoint")
    write_scales(checkpoint)
    return Bundle.open(export_bundle(checkpoint, folder / "bundle", "float16"))


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "WINDOW", 32)
    monkeypatch.setattr(steps, "SMALLEST_STEP", 4)
