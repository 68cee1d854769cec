"""Adapters: what they refuse without their library, and what they do where it is installed."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from helpers import tiny
from internvl_edge.adapters import optimum as optimum_adapter
from internvl_edge.adapters.autoawq import quantize_with_autoawq
from internvl_edge.base.errors import EdgeError
from internvl_edge.calibration import DataOptions, calibrate, choose_compute
from internvl_edge.checkpoint.reader import Checkpoint

WIDE = {"num_key_value_heads": 4, "hidden_size": 64, "intermediate_size": 128}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("checkpoint"), dtype="float32", **WIDE)


@pytest.fixture(scope="module")
def calibration(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibration")
    lines = [f'{{"images": [], "prompt": "Why is {index} larger than {index // 2}?"}}' for index in range(6)]
    (folder / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
    calibrate(checkpoint, folder / "set", DataOptions(folder / "data.jsonl"), choose_compute("cpu", "float32"))
    return folder / "set"


def test_autoawq_is_refused_for_internlm2_with_the_reason(tmp_path: Path) -> None:
    internlm2 = tiny.write_checkpoint(tmp_path / "internlm2", text="internlm2")
    with pytest.raises(EdgeError, match="not the value rows"):
        quantize_with_autoawq(internlm2, tmp_path / "none", tmp_path / "out")


@pytest.mark.parametrize("module", ["awq", "awq.models.qwen2"])
def test_a_missing_autoawq_names_its_extra(
    module: str, checkpoint: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(EdgeError, match=r"internvl-edge\[autoawq\]"):
        quantize_with_autoawq(checkpoint, calibration, tmp_path / "out", group_size=32)
    assert not (tmp_path / "out").exists()


def test_autoawq_writes_a_checkpoint_near_the_original(checkpoint: Path, calibration: Path, tmp_path: Path) -> None:
    pytest.importorskip("awq", reason="the extra autoawq is not installed")
    made = Checkpoint(quantize_with_autoawq(checkpoint, calibration, tmp_path / "out", group_size=32))
    source = Checkpoint(checkpoint)
    assert len(made.schemes) == 7 * source.config.decoder.num_hidden_layers
    # Scales move between a norm and the weights behind it: the product stays, but for rounding to 4 bits.
    products = []
    for folder in (source, made):
        norm = folder.tensor("decoder.layers.0.input_layernorm.weight").astype(np.float64)
        products.append(folder.tensor("decoder.layers.0.self_attn.q_proj.weight").astype(np.float64) * norm)
    error = np.linalg.norm(products[1] - products[0]) / np.linalg.norm(products[0])
    assert 0.01 < error < 0.2


def test_a_missing_optimum_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optimum", None)
    with pytest.raises(EdgeError, match=r"internvl-edge\[optimum\]"):
        optimum_adapter.register()


@pytest.mark.parametrize("model_type", optimum_adapter.MODEL_TYPES)
def test_optimum_finds_the_exporter_after_registration(model_type: str, checkpoint: Path, tmp_path: Path) -> None:
    tasks = pytest.importorskip("optimum.exporters.tasks", reason="the extra optimum is not installed")
    optimum_adapter.register()
    constructor = tasks.TasksManager.get_exporter_config_constructor(
        "onnx", model_type=model_type, task="image-text-to-text", library_name="transformers"
    )
    found = constructor(None)
    bundle = found.export(checkpoint, tmp_path / "bundle")
    assert (bundle / "manifest.json").is_file()
    with pytest.raises(EdgeError, match="not exported by tracing"):
        found.inputs  # noqa: B018  (what a tracing exporter asks first)
