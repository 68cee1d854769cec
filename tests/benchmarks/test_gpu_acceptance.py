"""The GPU acceptance run where parts of it are missing: it says what, and never stops half-way."""

from __future__ import annotations

import json
import math
import re
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
from internvl_edge.demo import CHECKPOINT
from internvl_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine
from internvl_edge.runtime.engines.tensorrt.cuda import Cuda

BENCHMARKS = REPOSITORY / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu_acceptance  # noqa: E402
import gpu_cuda  # noqa: E402
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
    rows = list(gpu_acceptance.run_all(tmp_path, ["tensorrt"], engines, time.monotonic() + 10))
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
    rows = list(gpu_acceptance.run_all(tmp_path, ["tensorrt"], ["tensorrt_rtx"], time.monotonic() + 120))
    assert [(row["model"], row["engine"]) for row in rows] == [("broken", "-")]
    assert "does not exist" in rows[0]["refused"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("acceptance")
    return Bundle.open(export_bundle(tiny.write_checkpoint(folder / "c"), folder / "bundle", "float16"))


class Forgetful(OnnxRuntimeEngine):
    """Forgets the first token of a prompt."""

    def prefill(self, embeds: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return super().prefill(embeds[1:])


class ShortSighted(OnnxRuntimeEngine):
    """Attention that goes wrong over many slots: every number of a long prompt is a little off."""

    def decode(self, embed: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        logits = super().decode(embed)
        if self.cache.length() < 1300:
            return logits
        return logits + 0.1 * logits.std() * np.random.default_rng(self.cache.length()).standard_normal(logits.shape)


class Blind(OnnxRuntimeEngine):
    """Mixes up the tiles of a batch of more than four."""

    def encode(self, pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return super().encode(pixels[::-1] if len(pixels) > 4 else pixels)


class Rambling(OnnxRuntimeEngine):
    """Is right for the first tokens of an answer, and wrong from then on."""

    def decode(self, embed: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        logits = super().decode(embed)
        return logits if self.cache.length() < 220 or self.cache.length() > 1000 else -logits


@pytest.mark.parametrize(
    ("kind", "verdict"),
    [
        (OnnxRuntimeEngine, "agrees"),
        (Forgetful, "logits_cosine is "),
        (ShortSighted, "logits@long.* as far from the CPU's|logits_cosine@long is "),
        (Blind, "vision_cosine is "),
        (Rambling, "a token of the answer is "),
    ],
)
def test_parity_sees_what_is_wrong(bundle: Bundle, kind: type[OnnxRuntimeEngine], verdict: str) -> None:
    row = gpu_rows.parity(kind(bundle, capacity=gpu_rows.CAPACITY), bundle)
    found = gpu_rows.judge(row)
    assert re.match(verdict, found), (found, row)
    if kind is OnnxRuntimeEngine:
        assert (row["logits_cosine"], row["same_token@long"], row["greedy_same"]) == (1, 1, gpu_rows.ANSWER)
    row["engine"], row["model"], row["verdict"] = "x", "y", found
    assert (gpu_acceptance.status([row]) == 0) == (kind is OnnxRuntimeEngine)


def test_numbers_that_are_not_finite_do_not_agree(bundle: Bundle) -> None:
    row = {"finite": False, "vision_cosine": math.nan}
    assert gpu_rows.judge(row) == "numbers that are not finite"
    row = {"finite": True, "vision_cosine": math.nan}
    assert gpu_rows.judge(row).startswith("vision_cosine is nan")


@pytest.mark.parametrize("name", ["torch-bfloat16", "torch-float16", "torch-bfloat16-decomposed"])
def test_the_graphs_for_tensorrt_agree_in_torch(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """In the types in which engines compute, with the operators of both dialects."""
    monkeypatch.setattr(gpu_rows, "CASES", {"": (64, 6), "@long": (600, 3), "@longer": (1030, 3)})
    monkeypatch.setattr(gpu_rows, "CAPACITY", 1100)
    monkeypatch.setattr(gpu_rows, "ANSWER", 8)
    row = gpu_rows.interpreted(name, bundle, bundle)
    assert gpu_rows.judge(row) == "agrees", row
    assert row["logits_cosine"] > (0.995 if "bfloat16" in name else 0.9999)


def test_the_cuda_half_is_checked_value_by_value() -> None:
    made: list[FakeCuda] = []

    def connect() -> Cuda:
        made.append(FakeCuda())
        return Cuda(made[-1])

    row = gpu_cuda.check(connect)
    assert len(row["checks"]) == 7
    assert row["graph_launches"] > gpu_cuda.STEPS
    assert [cuda.leaks for cuda in made] == [{}] * len(made)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("cudaMemcpy2DAsync", "past_key_values.0.key: .* values are not those that were sent"),
        ("cudaGraphLaunch", "the positions that came back"),
        ("cudaMemcpyAsync", "part a of a block"),
    ],
)
def test_the_cuda_half_sees_a_call_that_does_nothing(
    monkeypatch: pytest.MonkeyPatch, method: str, message: str
) -> None:
    monkeypatch.setattr(FakeCuda, method, lambda self, *arguments: (0,))
    with pytest.raises(AssertionError, match=message):
        gpu_cuda.check(lambda: Cuda(FakeCuda()))


def test_stages_follow_the_card() -> None:
    assert gpu_acceptance.default_stages(["tensorrt_rtx"], 89) == ["cuda", "tensorrt", "onnxruntime", "torch"]
    refused = ["cuda", "graphs", "onnxruntime", "torch"]
    assert gpu_acceptance.default_stages(["tensorrt_rtx"], 90) == refused
    assert gpu_acceptance.default_stages([], 89) == refused
    assert "tensorrt" in gpu_acceptance.default_stages(["tensorrt"], 87)


def test_one_stage_runs_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_acceptance, "models", lambda work: pytest.fail("no model is needed"))
    monkeypatch.setattr(gpu_acceptance, "child", lambda script, **options: {"engine": script, "checks": ["all"]})
    rows = list(gpu_acceptance.run_all(tmp_path, ["cuda"], ["tensorrt_rtx"], time.monotonic() + 10))
    assert rows == [{"model": "-", "engine": "gpu_cuda.py", "checks": ["all"]}]
    assert gpu_acceptance.status(rows) == 0


def test_the_status_is_what_was_found() -> None:
    agrees = {"model": "m", "engine": "e", "verdict": "agrees"}
    assert gpu_acceptance.status([agrees, {"model": "m", "engine": "f", "refused": "no kernel"}]) == 0
    assert gpu_acceptance.status([{"model": "m", "engine": "f", "refused": "no kernel"}]) != 0
    wrong = {"model": "m", "engine": "g", "verdict": "vision_cosine is 0.3"}
    assert gpu_acceptance.status([agrees, wrong]) == "m, g: vision_cosine is 0.3"
    assert gpu_acceptance.status([agrees, {"model": "-", "engine": "c", "wrong": "part a"}]) == "-, c: part a"


def test_onnx_runtime_gets_a_bundle_that_computes_in_float16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(gpu_acceptance, "child", lambda *arguments, **options: asked.append(arguments) or {"ok": True})
    row = gpu_acceptance.on_cuda(CHECKPOINT, tmp_path / "bundle", tmp_path, time.monotonic() + 120)
    assert row == {"ok": True}
    assert asked == [("gpu_rows.py", "onnxruntime", str(tmp_path / "bundle-float16"), str(tmp_path / "bundle"))]


def test_speed_has_every_column(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_rows, "PROMPT", 20)
    monkeypatch.setattr(gpu_rows, "STEPS", 2)
    row = gpu_rows.speed(OnnxRuntimeEngine(bundle, capacity=2100), bundle, 1e9)
    compared = {"verdict", "vision_cosine", "logits_cosine", "logits_cosine@long", "greedy_same"}
    assert row.keys() | compared | {"memory_mb"} >= gpu_acceptance.COLUMNS.keys()
    assert all(value >= 0 for value in row.values())
    json.dumps(row)


def test_the_bandwidth_test_gives_its_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_rows, "COPIED", 1 << 20)
    cuda = FakeCuda()
    assert gpu_rows.copy_bandwidth(Cuda(cuda)) > 0
    assert cuda.leaks == {}
