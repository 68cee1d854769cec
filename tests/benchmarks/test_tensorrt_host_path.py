"""The benchmark of the TensorRT engine's host path: it runs whole steps over its stubs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from helpers.repository import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import tensorrt_host_path


@pytest.mark.parametrize("flavour", sorted(tensorrt_host_path.VERSIONS))
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_it_measures_every_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flavour: str, dtype: str) -> None:
    monkeypatch.setattr(tensorrt_host_path, "BATCHES", 2)
    monkeypatch.setattr(tensorrt_host_path, "TOKENS", 5)
    monkeypatch.setattr(tensorrt_host_path, "ROWS", 10)
    config = tensorrt_host_path.configuration("1B", tmp_path / "1B")
    row = tensorrt_host_path.measure(config, flavour, dtype, tmp_path / "engines")
    assert 0 < row["best_us"] <= row["us_per_token"]
    engine = tensorrt_host_path.stubbed_engine(config, flavour, dtype, tmp_path / "more")
    table = tensorrt_host_path.token_table(config.decoder.hidden_size, tmp_path)
    for token in range(7):
        engine.decode_token(table[token])
    assert engine.cache.length() == 7
    engine.close()
