"""Where the goldens of the original code lie, and arithmetic that rounds alike everywhere."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from internvl_edge.base import machine

pytest.register_assert_rewrite("helpers")  # a failed assertion there shows its values, as in a test

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


@pytest.fixture
def float_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without rounding activations to int8, graphs must compute what the reference computes."""
    from internvl_edge.export import quantized
    from internvl_edge.runtime.engines import onnxruntime as engine_module

    monkeypatch.setitem(engine_module._CONFIG, "session.qdq_matmulnbits_accuracy_level", "1")
    monkeypatch.setattr(quantized, "_ACCURACY_LEVEL", 1)
