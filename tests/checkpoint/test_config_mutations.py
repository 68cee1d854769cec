"""Mutated configurations: each gives a model or one line that names the file, in a moment, and never anything else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.cpu_time import cpu_time_below
from helpers.parsers import LAYOUTS, VOCABULARY, Config, outcomes, read_whole_config
from helpers.tiny_config import Tiny, native_config, remote_config, side_files
from internvl_edge.base.errors import CheckpointError
from internvl_edge.checkpoint.config_reader import read_config
from internvl_edge.model.limits import LARGEST

SECONDS = 0.2


@pytest.mark.parametrize("mutants", [5_000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_mutated_configurations_give_a_model_or_one_line(mutants: int) -> None:
    read = 0
    for _, config, line in outcomes(Config, mutants):
        if line is None:
            read += 1
            assert 1 <= config.min_tiles <= config.max_tiles <= 128
            assert all(type(size) is int for size in (config.tokens_per_tile, config.decoder.head_dim))
        else:
            assert ".json" in line or "quantization_config" in line
    assert mutants / 10 < read < mutants * 0.9


@pytest.mark.parametrize("tiny", LAYOUTS)
def test_unmutated_configurations_are_read(tmp_path: Path, tiny: Tiny) -> None:
    make = remote_config if tiny.layout == "remote" else native_config
    for name, values in ({"config.json": make(tiny, VOCABULARY)} | side_files(tiny, VOCABULARY)).items():
        (tmp_path / name).write_text(json.dumps(values))
    read_whole_config(tmp_path)


COUNTS = {
    ("llm_config",): ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    ("llm_config", "more"): ("intermediate_size", "vocab_size", "max_position_embeddings"),
    ("vision_config",): ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size"),
    (): ("min_dynamic_patch", "max_dynamic_patch", "force_image_size"),
}
NO_COUNTS = (0, -1, 1.5, 1e300, True, False, "4", [], {}, [4], 10**9, 10**300, float("nan"), float("inf"))


@pytest.mark.parametrize(("section", "name"), [(path[:1], name) for path, names in COUNTS.items() for name in names])
def test_every_count_is_whole_and_bounded(tmp_path: Path, section: tuple[str, ...], name: str) -> None:
    original = remote_config(Tiny(), VOCABULARY)
    place = original[section[0]] if section else original
    (tmp_path / "config.json").write_text(json.dumps(original))
    expected = read_config(tmp_path)
    value = place[name]
    place[name] = float(value)
    (tmp_path / "config.json").write_text(json.dumps(original))
    assert read_config(tmp_path) == expected  # 256.0 is 256
    for wrong in (*NO_COUNTS, LARGEST.get(name, 128) + 1):
        place[name] = wrong
        (tmp_path / "config.json").write_text(json.dumps(original))
        with cpu_time_below(SECONDS), pytest.raises(CheckpointError, match=name):
            read_whole_config(tmp_path)


REALS = {
    ("llm_config", "rms_norm_eps"): (2.0, 1e-40),
    ("llm_config", "rope_theta"): (1, 0.5, 1e300),
    ("vision_config", "layer_norm_eps"): (2.0, 1e-40),
    ("downsample_ratio",): (0.4, 3, 1e-300),
}


@pytest.mark.parametrize("path", REALS, ids="-".join)
def test_every_real_number_is_finite_positive_and_plausible(tmp_path: Path, path: tuple[str, ...]) -> None:
    values = remote_config(Tiny(), VOCABULARY)
    parent = values[path[0]] if len(path) > 1 else values
    for wrong in (0, -1e-6, True, "1e-6", [], {}, 10**300, float("nan"), float("inf"), float("-inf"), *REALS[path]):
        parent[path[-1]] = wrong
        (tmp_path / "config.json").write_text(json.dumps(values))
        with pytest.raises(CheckpointError, match=path[-1]):
            read_config(tmp_path)
