"""What "auto" takes on a CPU, and which graph computes prompts: docs/performance.md and the code say the same."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from helpers import tiny
from helpers.tiny_quantized import write_quantized
from internvl_edge import export_bundle
from internvl_edge.base import machine
from internvl_edge.bundle import names
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.model.linear import Scheme
from internvl_edge.runtime.engines import choice, onnxruntime, openvino

PAGE = Path(__file__).parents[2] / "docs/performance.md"
ASKED = {"exact numbers": {"exact": True}, "a dialect": {"dialect": "onnxruntime"}, "nothing": {}}
YES = {"yes": True, "no": False}
INT8 = {"inexact": (False, False), "exact": (True, False), "AMX": (True, True)}


def table(heading: str) -> list[list[str]]:
    """The rows of the first table under a heading, without its head."""
    part = PAGE.read_text(encoding="utf-8").split(f"{heading}\n", 1)[1]
    lines = re.search(r"(?:^\|.*\n)+", part, re.MULTILINE)
    assert lines is not None
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[0].splitlines()[2:]]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """4-bit bundles without and with int8 prompts."""
    folder = tmp_path_factory.mktemp("auto")
    source, body = tiny.write_checkpoint(folder / "float"), Scheme(4, 64, symmetric=True)
    quantized, _ = write_quantized(source, folder, method="compressed-tensors", body=body)
    return {
        word: Bundle.open(export_bundle(quantized, folder / word, dialects=["onnxruntime"], int8_prompts=has))
        for word, has in YES.items()
    }


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("activations", ["float32", "float16"])
def test_the_table_of_the_choice_is_what_auto_takes(
    bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch, asked: str, activations: str
) -> None:
    """The first row that fits every combination of its columns names the engine."""
    rows = table("### What `--engine auto` takes")
    manifest = replace(bundles["no"].manifest, activations=activations)
    needed = 5 * sum(entry.bytes for entry in manifest.files.values())
    memories = {"5 bundles or less": needed, "more, or not known": needed + 1}
    for bfloat16, installed, memory in product(YES, YES, memories):
        found = (asked, activations, bfloat16, installed, memory)
        fitting = [row for row in rows if all(cell in ("any", have) for cell, have in zip(row, found, strict=False))]
        monkeypatch.setattr(machine, "multiplies_bfloat16", lambda word=bfloat16: YES[word])
        monkeypatch.setattr(openvino, "is_available", lambda word=installed: YES[word])
        for available in (memories[memory], None) if memory.startswith("more") else (memories[memory],):
            monkeypatch.setattr(machine, "memory", lambda *fields, count=available: count)
            assert choice.choose(manifest, **ASKED[asked]).engine == fitting[0][-1], found  # type: ignore[arg-type]


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_the_table_of_prompts_is_what_the_engines_do(
    bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    if engine == "openvino" and not openvino.is_available():
        pytest.skip("openvino 2026.3 or newer is not installed")
    rows = table("### Which graph computes prompts")
    for has_graph, products in product(YES, INT8):
        exact, tiles = INT8[products]
        for module in (machine, onnxruntime):
            monkeypatch.setattr(module, "multiplies_int8_exactly", lambda value=exact: value)
        monkeypatch.setattr(machine, "multiplies_int8_tiles", lambda value=tiles: value)
        loaded = choice.cpu_engine(bundles[has_graph], engine, capacity=64, threads=1)
        graph = names.PROMPTS if loaded._prompts is not None else names.DECODERS["onnxruntime"]  # type: ignore[attr-defined]
        found = ["ONNX Runtime", graph]
        if compiled := getattr(loaded, "_compile_prompts", None):
            found = ["OpenVINO", compiled.args[1]]
        loaded.close()
        have = (engine, has_graph, products)
        fitting = [row for row in rows if all(cell in ("any", word) for cell, word in zip(row, have, strict=False))]
        assert [fitting[0][3], fitting[0][4].strip("`")] == found, have
