"""Manifests of both formats with members changed, their digest made again: read, or refused with one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.parsers import BundleManifest, outcomes
from helpers.repository import REPOSITORY
from internvl_edge.base.errors import BundleError
from internvl_edge.bundle.manifest import Manifest
from internvl_edge.bundle.names import MANIFEST

OLD = sorted((REPOSITORY / "tests" / "data" / "format-1").glob("*.json"))
MUTANTS = 2_000


def test_mutated_manifests_are_read_or_refused() -> None:
    read = 0
    for _, _, line in outcomes(BundleManifest, MUTANTS):
        read += line is None
        assert line is None or MANIFEST in line or "bundle format" in line
    assert MUTANTS / 20 < read < MUTANTS * 0.9


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_hidden_layers", 10**9), ("rms_norm_eps", None), ("vocab_size", 0), ("num_key_value_heads", 3)],
)
def test_a_model_that_cannot_be_is_damage(tmp_path: Path, field: str, value: Any) -> None:
    values = json.loads(OLD[0].read_text(encoding="utf-8"))
    values["model"]["decoder"][field] = value
    (tmp_path / MANIFEST).write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(BundleError, match=rf"is damaged.*{field}"):
        Manifest.read(tmp_path)


def test_counts_of_format_1_are_bounded(tmp_path: Path) -> None:
    values = json.loads((REPOSITORY / "tests/data/format-1/int4.json").read_text(encoding="utf-8"))
    values["quantization"]["linears"] = dict.fromkeys(values["quantization"]["linears"], 1e300)
    (tmp_path / MANIFEST).write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(BundleError, match="is damaged"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("name", ["a" * 300, "\u56fe" * 100, "a/b", "\0", "."], ids=len)
def test_names_that_no_file_can_have_are_damage(tmp_path: Path, name: str) -> None:
    values = json.loads(OLD[0].read_text(encoding="utf-8"))
    values["files"][name] = {"bytes": 1, "sha256": "0" * 64}
    (tmp_path / MANIFEST).write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(BundleError, match="is not the plain name of a file"):
        Manifest.read(tmp_path)
