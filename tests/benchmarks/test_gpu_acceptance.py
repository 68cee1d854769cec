"""The GPU acceptance run where parts of it are missing: it says what, and never stops half-way."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers import tiny
from helpers.fake_gpu import FakeCuda
from helpers.repository import REPOSITORY
from internvl_edge import export_bundle
from internvl_edge.base.errors import EngineError
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine
from internvl_edge.runtime.engines.tensorrt.cuda import Cuda

BENCHMARKS = REPOSITORY / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu_acceptance  # noqa: E402
import gpu_rows  # noqa: E402


def has_gpu() -> bool:
    try:
        Cuda().close()
    except EngineError:
        return False
    return True


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_without_a_gpu_the_run_says_so_and_writes_nothing() -> None:
    results = BENCHMARKS / "results" / "gpu-acceptance.json"
    before = results.read_bytes() if results.exists() else None
    script = [sys.executable, str(BENCHMARKS / "gpu_acceptance.py")]
    result = subprocess.run(script, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "no acceptance without a GPU" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert (results.read_bytes() if results.exists() else None) == before


def test_what_crashes_hangs_or_refuses_is_a_row_and_the_next_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gpu_rows.py").write_text(
        "import os, sys, time\n"
        "engine = sys.argv[1]\n"
        "if engine == 'crashes': os.kill(os.getpid(), 11)\n"
        "if engine == 'hangs': time.sleep(60)\n"
        "if engine == 'fails': sys.exit('a line\\nthe last | line')\n"
        "if engine == 'chats': print('hello')\n"
        'print(\'{"engine": "%s", "memory_mb": 7}\' % engine)\n'
    )
    monkeypatch.setattr(gpu_acceptance, "HERE", tmp_path)
    monkeypatch.setattr(gpu_acceptance, "models", lambda work: [gpu_acceptance.Model("small", tmp_path)])
    monkeypatch.setattr(gpu_acceptance, "make", lambda model, work, deadline: (tmp_path, tmp_path / "bundle"))
    engines = ["crashes", "fails", "chats", "works", "hangs", "late"]
    rows = list(gpu_acceptance.run_all(tmp_path, engines, time.monotonic() + 10))
    assert [row["engine"] for row in rows] == engines
    refused = {row["engine"]: row.get("refused") for row in rows}
    assert refused["works"] is refused["chats"] is None
    assert refused["crashes"] == "exit status -11: no message"
    assert refused["fails"] == "exit status 1: the last | line"
    assert refused["hangs"] == refused["late"] == "not finished within the time; give --minutes"
    gpu_acceptance.print_table(rows)
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 2 + len(engines)
    assert {line.count("|") for line in table} == {3 + len(gpu_acceptance.COLUMNS)}


def test_a_model_that_cannot_be_made_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = gpu_acceptance.Model("broken", tmp_path / "nowhere")
    monkeypatch.setattr(gpu_acceptance, "models", lambda work: [broken])
    rows = list(gpu_acceptance.run_all(tmp_path, ["tensorrt_rtx"], time.monotonic() + 120))
    assert [(row["model"], row["engine"]) for row in rows] == [("broken", "-")]
    assert "does not exist" in rows[0]["refused"]


def test_parity_sees_a_wrong_position(tmp_path: Path) -> None:
    """The comparison that the run rests on: the same engine agrees, one that forgets a token does not."""
    bundle = Bundle.open(export_bundle(tiny.write_checkpoint(tmp_path / "c"), tmp_path / "bundle", "float16"))

    class Forgetful(OnnxRuntimeEngine):
        def prefill(self, embeds: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            return super().prefill(embeds[1:])

    right = gpu_rows.parity(OnnxRuntimeEngine(bundle, capacity=256), bundle)
    assert (right["logits_cosine"], right["same_token"]) == (1, 1)
    wrong = gpu_rows.parity(Forgetful(bundle, capacity=256), bundle)
    assert wrong["logits_cosine"] < gpu_acceptance.LOGITS_COSINE


def test_speed_has_every_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(export_bundle(tiny.write_checkpoint(tmp_path / "c"), tmp_path / "bundle", "float16"))
    monkeypatch.setattr(gpu_rows, "PROMPT", 20)
    monkeypatch.setattr(gpu_rows, "STEPS", 2)
    row = gpu_rows.speed(OnnxRuntimeEngine(bundle, capacity=2100), bundle, 1e9)
    assert row.keys() | {"vision_cosine", "logits_cosine", "same_token", "memory_mb"} >= gpu_acceptance.COLUMNS.keys()
    assert all(value >= 0 for value in row.values())
    json.dumps(row)


def test_the_bandwidth_test_gives_its_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_rows, "COPIED", 1 << 20)
    cuda = FakeCuda()
    assert gpu_rows.copy_bandwidth(Cuda(cuda)) > 0
    assert cuda.leaks == {}
