"""`inspect`: numbers with their units in the names for programs, and the same facts as text for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.commands import internvl_edge
from helpers.tiny import write_checkpoint
from helpers.tiny_quantized import write_quantized
from internvl_edge import export_bundle
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.bundle.manifest import Manifest
from internvl_edge.bundle.quality import Measurement
from internvl_edge.bundle.quality_record import quality_of, record_quality
from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.runtime.engines.tensorrt.record import ENGINES, BuildOptions, EngineRecord, graph_inputs


def facts_of(path: Path) -> dict[str, Any]:
    result = internvl_edge("inspect", path, "--json")
    assert result.returncode == 0, result.stderr
    values: dict[str, Any] = json.loads(result.stdout)
    return values


def text_of(path: Path) -> dict[str, str]:
    result = internvl_edge("inspect", path)
    assert result.returncode == 0, result.stderr
    width = len(result.stdout) - len(result.stdout[len("kind") :].lstrip())
    return {line[:width].strip(): line[width:] for line in result.stdout.splitlines()}


def write_engine(bundle: Path, name: str, inputs: dict[str, str]) -> None:
    folder = bundle / "engines" / name
    folder.mkdir(parents=True)
    for engine in ENGINES.values():
        (folder / engine).write_bytes(b"engine")
    files = {engine: {"bytes": 6, "sha256": "0" * 64} for engine in ENGINES.values()}
    options = BuildOptions("float16")
    EngineRecord(name, "tensorrt_rtx", "1.7.1", (86, 89), options, inputs, files).write(folder)


def test_a_checkpoint_is_numbers(checkpoint: Path, tmp_path: Path) -> None:
    quantized, _ = write_quantized(checkpoint, tmp_path)
    opened = Checkpoint(quantized)
    facts = facts_of(quantized)
    assert facts["parameters"] == opened.parameters
    assert facts["bytes"] == sum(path.stat().st_size for path in quantized.iterdir())
    assert facts["quantization_method"] == "awq"
    assert sum(facts["quantized_linears"].values()) == len(opened.schemes)
    assert sum(part["bytes"] for part in facts["components"]) < facts["bytes"]
    assert facts_of(checkpoint)["quantization_method"] is None
    assert facts["family"] == "InternVL2.5"
    shown = text_of(quantized)
    assert shown["parameters"].endswith(" million")
    assert "awq" in shown["quantized"]


def test_a_bundle_lists_engines_and_the_runs_behind_its_quality(checkpoint: Path, tmp_path: Path) -> None:
    bundle = export_bundle(checkpoint, tmp_path / "bundle", "float16")
    manifest = Manifest.read(bundle)
    write_engine(bundle, "rtx", graph_inputs(Bundle.open(bundle)))
    write_engine(bundle, "older", {"vision.onnx": "0" * 64})
    (bundle / "engines" / "torn").mkdir()
    (bundle / "engines" / "torn" / "engine.json").write_text("{")
    measured = Measurement("reader", 60, 0, "cpu", "onnxruntime", "2026-01-02 03:04", answer_tokens=64)
    quality = quality_of(manifest).with_figures({"exact_match": 0.975}, {"suite": measured}, [])
    record_quality(bundle, quality)
    facts = facts_of(bundle)
    assert facts["bytes"] == sum(entry.bytes for entry in manifest.files.values())
    assert facts["parameters"] == Checkpoint(checkpoint).parameters
    assert (facts["weights_dtype"], facts["activations_dtype"], facts["kv_cache_dtype"]) == (
        *("float16", "float32"),
        "float32",
    )
    assert facts["int8_tower"] is None
    assert facts["quality"]["figures"] == {"exact_match": 0.975}
    assert facts["quality"]["measured"]["suite"]["questions"] == 60
    engines = {engine.pop("name"): engine for engine in facts["engines"]}
    assert {name: engine["state"] for name, engine in engines.items()} == {
        "rtx": "fresh",
        "older": "stale",
        "torn": "unreadable",
    }
    assert engines["rtx"]["compute_capabilities"] == [8.6, 8.9]
    assert (engines["rtx"]["dtype"], engines["rtx"]["bytes"]) == ("float16", 12)
    shown = text_of(bundle)
    assert shown["engine rtx"].startswith("tensorrt_rtx 1.7.1 for compute capability 8.6, 8.9, float16, context 4096")
    assert "stale: built from other files" in shown["engine older"]
    assert shown["engine torn"].startswith("unreadable")
    assert "60 questions of reader" in shown["measured"]
    assert shown["weights alone"].endswith("16.00 bits per weight, each counted once")


def test_no_number_is_text(checkpoint: Path, bundle: Path) -> None:
    def check(values: Any, place: str) -> None:
        if isinstance(values, dict):
            for name, value in values.items():
                assert " " not in name or place in (".quantized_linears", ".tensors"), f"{place}.{name}"
                check(value, f"{place}.{name}")
        elif isinstance(values, list):
            for value in values:
                check(value, place)
        elif isinstance(values, str):
            assert not any(unit in values.split() for unit in ("MB", "GB", "kB", "billion", "million")), place

    for path in (checkpoint, bundle):
        check(facts_of(path), "")


@pytest.mark.parametrize("name", ["parameters", "bytes"])
def test_sizes_are_whole_numbers(checkpoint: Path, bundle: Path, name: str) -> None:
    for path in (checkpoint, bundle):
        assert isinstance(facts_of(path)[name], int)


@pytest.mark.parametrize(
    ("choices", "name"),
    [
        ({"text": "qwen3", "head_dim": 32}, "InternVL3.5"),
        ({"text": "qwen3", "layout": "native"}, "InternVL3.5"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "InternVL3"),
        ({"text": "internlm2", "template": "internlm2-chat"}, "InternVL2"),
    ],
)
def test_the_family_is_named(tmp_path: Path, choices: dict[str, Any], name: str) -> None:
    made = write_checkpoint(tmp_path / "checkpoint", **choices)
    bundle = export_bundle(made, tmp_path / "bundle")
    for path in (made, bundle):
        assert text_of(path)["family"] == name
        assert facts_of(path)["family"] == name
