"""Manifests of both formats with a member changed, their digest made again: read, or refused with one line."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest

from helpers.cpu_time import cpu_time_below
from helpers.repository import REPOSITORY
from internvl_edge.base.errors import BundleError
from internvl_edge.bundle.manifest import DIGEST, Manifest, manifest_digest
from internvl_edge.bundle.names import MANIFEST

OLD = sorted((REPOSITORY / "tests" / "data" / "format-1").glob("*.json"))
VALUES: tuple[Any, ...] = (
    *(None, True, 0, 1, -1, 10**9, 10**300, 1.5, "", "x", "../x", "int4 per output, symmetric", "\n" * 500, [], {}),
    *([1], ["a"], {"a": 1}, [[]], {"a": {"b": []}}),
)


def mutate(rng: random.Random, values: Any) -> None:
    """Change or remove one member, somewhere on the way down."""
    while keys := list(values) if isinstance(values, dict) else list(range(len(values))):
        key = rng.choice(keys)
        if isinstance(values[key], dict | list) and values[key] and rng.random() < 0.75:
            values = values[key]
            continue
        if rng.random() < 0.25:
            del values[key]
        else:
            values[key] = copy.deepcopy(rng.choice(VALUES))
        return


def outcome(folder: Path) -> Manifest | str:
    try:
        return Manifest.read(folder)
    except BundleError as error:
        return str(error)


@pytest.mark.parametrize("version", [1, 2])
def test_mutated_manifests_are_read_or_refused(tmp_path: Path, version: int) -> None:
    originals = []
    for path in OLD:
        (tmp_path / MANIFEST).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
        if version == 2:
            Manifest.read(tmp_path).write(tmp_path)
        originals.append(json.loads((tmp_path / MANIFEST).read_text(encoding="utf-8")))
    rng = random.Random(version)
    for _ in range(1000):
        values = copy.deepcopy(rng.choice(originals))
        mutate(rng, values)
        if DIGEST in values and "format_version" in values:
            version_written = values.pop("format_version")
            del values[DIGEST]
            values = {"format_version": version_written, DIGEST: manifest_digest(values), **values}
        (tmp_path / MANIFEST).write_text(json.dumps(values), encoding="utf-8")
        with cpu_time_below(0.2):
            result = outcome(tmp_path)
        if isinstance(result, str):
            assert len(result.splitlines()) == 1
            assert len(result) <= 400
            assert MANIFEST in result or "bundle format" in result


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_hidden_layers", 10**9), ("rms_norm_eps", None), ("vocab_size", 0), ("num_key_value_heads", 3)],
)
def test_a_model_that_cannot_be_is_damage(tmp_path: Path, field: str, value: Any) -> None:
    values = json.loads(OLD[0].read_text(encoding="utf-8"))
    values["model"]["decoder"][field] = value
    (tmp_path / MANIFEST).write_text(json.dumps(values), encoding="utf-8")
    found = outcome(tmp_path)
    assert isinstance(found, str)
    assert "is damaged" in found
    assert field in found
