"""Where the goldens of the original code lie, and arithmetic that rounds alike everywhere."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from internvl_edge.base import machine

pytest.register_assert_rewrite("helpers")  # a failed assertion there shows its values, as in a test

# A shell that runs the tests in the background ignores Ctrl-C for them and for all programs that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The numbers of quantized bundles must not depend on whether this machine has a compiler; the tests of the native
# operators turn them on.
os.environ["INTERNVL_EDGE_NATIVE"] = "0"

settings.register_profile("shared machines stall", deadline=None)
settings.load_profile("shared machines stall")

REPOSITORY = Path(__file__).resolve().parent.parent
SMALL_ORACLE = Path(__file__).resolve().parent / "oracle"


@pytest.fixture(scope="session")
def small_oracle() -> Path:
    """The folder of committed reference checkpoints, whose vocabularies are cut; `oracle/README.md` describes it."""
    return SMALL_ORACLE


# The checkpoints of other families: those that are committed, and those of the full oracle.
SMALL_FAMILIES = ("internvl3_5-qwen3-tiny", "internvl2-internlm2-tiny")
FAMILIES = (*SMALL_FAMILIES, "internvl3_5-hf-qwen3-tiny", "internvl3-qwen2-tiny", "internvl2-qwen2-tiny")


@pytest.fixture(
    scope="session",
    params=[*(f"small/{name}" for name in SMALL_FAMILIES), *(f"full/{name}" for name in FAMILIES)],
)
def family(request: pytest.FixtureRequest) -> Path:
    """The folder of a checkpoint of another family with its goldens; the images are in `../../images`."""
    layer, name = request.param.split("/")
    oracle: Path = request.getfixturevalue(f"{layer}_oracle")
    return oracle / "families" / name


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


@pytest.fixture
def float_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without rounding activations to int8, graphs must compute what the reference computes."""
    from internvl_edge.export import quantized
    from internvl_edge.runtime.engines import onnxruntime as engine_module

    monkeypatch.setitem(engine_module._CONFIG, "session.qdq_matmulnbits_accuracy_level", "1")
    monkeypatch.setattr(quantized, "_ACCURACY_LEVEL", 1)
