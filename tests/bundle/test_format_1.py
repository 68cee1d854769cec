"""Bundles of format 1, made with the last version that wrote it: their manifests are read, and they answer."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.repository import REPOSITORY
from internvl_edge.base.errors import BundleError
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.bundle.manifest import DecoderQuantization, Manifest
from internvl_edge.bundle.names import MANIFEST
from internvl_edge.bundle.quality_record import quality_of
from internvl_edge.model.linear import W8A8, Scheme
from internvl_edge.model.template import TEMPLATES
from internvl_edge.planning.footprint import Storage
from internvl_edge.planning.storage import bundle_storage
from internvl_edge.runtime.model import InternVL

FORMAT_1 = REPOSITORY / "tests" / "data" / "format-1"
INT8 = Scheme(8, None, symmetric=True)
INT4 = Scheme(4, 32, symmetric=False)


def read(name: str, tmp_path: Path) -> Manifest:
    shutil.copy(FORMAT_1 / name, tmp_path / MANIFEST)
    return Manifest.read(tmp_path)


def test_a_bundle_of_floats(tmp_path: Path) -> None:
    manifest = read("float.json", tmp_path)
    assert (manifest.linears, manifest.quantization, manifest.is_quantized) == ({}, None, False)
    assert manifest.template == TEMPLATES["internvl2_5"]
    assert (manifest.dtype, manifest.token_table) == ("float16", "float16")
    assert bundle_storage(manifest) == Storage(2, 4, table="float")
    assert {part.name: str(part.stored[0]) for part in manifest.components}["decoder"] == "float16"


def test_one_scheme_in_all_layers_is_given_to_each_of_them(tmp_path: Path) -> None:
    manifest = read("int4.json", tmp_path)
    kinds = [*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down"))]
    assert manifest.linears == {f"decoder.layers.{n}.{kind}": INT4 for n in range(2) for kind in kinds}
    assert manifest.quantization == DecoderQuantization("awq", 8.725, 0.0)
    assert not manifest.rounds_inputs


def test_several_schemes_int8_vision_an_int8_cache_and_quality() -> None:
    manifest = Bundle.open(FORMAT_1 / "mixed").manifest
    assert Counter(manifest.schemes("decoder.layers.").values()) == {INT4: 9, W8A8: 4}
    assert manifest.linears["decoder.lm_head"] == INT8
    tower = {**manifest.schemes("vision."), **manifest.schemes("projector.")}
    assert set(tower.values()) == {W8A8}
    assert len(tower) == 9
    assert "vision.layers.0.mlp.fc2" not in tower
    assert (manifest.kv_cache, manifest.token_table, manifest.rounds_inputs) == ("int8", "int8", True)
    found = bundle_storage(manifest, "onnxruntime")
    assert (found.body, found.head, found.vision, found.floats) == (INT4, INT8, W8A8, ("vision.layers.0.mlp.fc2",))
    quality = quality_of(manifest)
    assert quality.state == "passed"
    measured = quality.measured["comparison"]
    assert measured == replace(measured, data="built-in pictures and texts", questions=4, seed=0)
    assert (measured.device, measured.engine, measured.reference) == ("auto", "onnxruntime", "float-bundle")


def test_it_answers_as_after_its_manifest_was_written_again(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(FORMAT_1 / "mixed", tmp_path / "copy"))
    Manifest.read(copy).write(copy)
    assert json.loads((copy / MANIFEST).read_text(encoding="utf-8"))["format_version"] == 2
    replies = []
    for folder in (FORMAT_1 / "mixed", copy):
        with InternVL.load(folder, engine="onnxruntime", threads=1) as model:
            replies.append(model.chat("What is this?", max_new_tokens=8).output_ids)
    assert replies[0] == replies[1]
    assert Manifest.read(copy) == Manifest.read(FORMAT_1 / "mixed")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 0}, "format_version is 0"),
        ({"format_version": "1"}, "format_version is '1'"),
        ({"format_version": 3}, "format 3, this version reads up to 2"),
        ({"quantization": {"linears": {"int5 per output": 3}}}, "'int5 per output' is no scheme"),
        ({"quantization": 7}, "linears is None"),
        ({"model": []}, "expected an object"),
        ({"files": {"vision.onnx": {"bytes": 3}}}, "files.vision.onnx.sha256 is missing"),
        ({"extra": 1}, "extra is not known"),
    ],
)
def test_what_format_1_did_not_have_is_damage(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    values = json.loads((FORMAT_1 / "int4.json").read_text(encoding="utf-8"))
    (tmp_path / MANIFEST).write_text(json.dumps(values | change), encoding="utf-8")
    with pytest.raises(BundleError, match=message):
        Manifest.read(tmp_path)
