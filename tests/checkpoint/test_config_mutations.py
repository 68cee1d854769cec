"""Mutated configurations: each gives a model or one line that names the file, in a moment, and never anything else.

INTERNVL_EDGE_MUTATIONS raises the number of mutations.
"""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.cpu_time import cpu_time_below
from helpers.tiny_config import Tiny, native_config, remote_config, side_files
from helpers.tiny_tokenizers import Vocabulary
from internvl_edge.base.errors import CheckpointError
from internvl_edge.checkpoint import layouts
from internvl_edge.checkpoint.codecs import autoawq, compressed_tensors
from internvl_edge.checkpoint.config_reader import read_config
from internvl_edge.checkpoint.json_files import read_json
from internvl_edge.checkpoint.quantization import read_quantization
from internvl_edge.model.config import ModelConfig
from internvl_edge.model.limits import LARGEST
from internvl_edge.model.linear import W8A8, Scheme
from internvl_edge.planning.storage import checkpoint_storage

MUTATIONS = int(os.environ.get("INTERNVL_EDGE_MUTATIONS", "2000"))
SECONDS = 0.2
VOCABULARY = Vocabulary(
    size=600, ids=dict.fromkeys(("<|endoftext|>", "<|im_end|>", "<s>", "</s>", "<IMG_CONTEXT>", "<|im_start|>"), 7)
)
LAYOUTS = (
    Tiny(),
    Tiny(text="internlm2", vision="6b", rope_scaling={"type": "dynamic", "factor": 2.0}),
    Tiny(layout="native"),
    Tiny(layout="native", transformers=4, text="llama", rope_scaling={"type": "linear", "factor": 2.0}),
    Tiny(layout="native", text="llama", vision="6b", rope_scaling={"type": "dynamic", "factor": 4.0}),
)
QUANTIZATIONS = (
    None,
    autoawq.configuration(32, ["vision_model", "mlp1"]),
    compressed_tensors.configuration({Scheme(4, 32, False): ["Linear"], W8A8: ["re:.*mlp.*"]}, ["lm_head"]),
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, 2, 3, 4, 5, 7, 8, 64, 128, -1, -2, 10**9, 3 * 10**6, 2**31, 2**63, 10**300, 10**400),
    *(
        0.5,
        1.0,
        256.0,
        2.5,
        1e-300,
        1e300,
        5e-324,
        -0.0,
        float("nan"),
        float("inf"),
        float("-inf"),
        "",
        "4",
        "a" * 5000,
    ),
    *("\ud800", "default", "gelu", "re:(", "re:a{99999999999999}", "\n", [], [4, 4], [448, 448], [1, 2], [[]], [None]),
    *({}, {"type": "dynamic", "factor": 1e308}, {"rope_type": []}, {"a": {"b": []}}, ["full_attention", 3], [10**9]),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every member."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(value[key], (*path, key))


def mutate(rng: random.Random, values: Any) -> None:
    found = list(places(values))
    if not found:
        return
    *path, last = rng.choice(found)
    parent: Any = values
    for key in path:
        parent = parent[key]
    kind = rng.randrange(8)
    if kind == 0:
        del parent[last]
    elif kind == 1 and isinstance(parent[last], int | float) and abs(parent[last]) < 1e300:
        parent[last] = parent[last] * rng.choice([-1, 0, 0.5, 2, 1.0, 1e9, 1e-9])
    elif kind == 2:
        parent[last] = copy.deepcopy(rng.choice(list(values.values() if isinstance(values, dict) else values)))
    elif kind == 3 and isinstance(parent, dict):
        names = ("pad2square", "head_dim", "rope_parameters", "layer_types", "bnb_4bit", "config_groups", "image_size")
        parent[rng.choice(names)] = copy.deepcopy(rng.choice(VALUES))
    else:
        parent[last] = copy.deepcopy(rng.choice(VALUES))


def write(folder: Path, rng: random.Random, tiny: Tiny) -> None:
    make = remote_config if tiny.layout == "remote" else native_config
    files: dict[str, Any] = {"config.json": make(tiny, VOCABULARY)} | side_files(tiny, VOCABULARY)
    if quantization := rng.choice(QUANTIZATIONS):
        section = rng.choice([files["config.json"], files["config.json"].get("llm_config", files["config.json"])])
        section["quantization_config"] = copy.deepcopy(quantization)
    files = copy.deepcopy(files)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        mutate(rng, files["config.json"] if rng.random() < 0.9 else files)
    for name in ("config.json", "processor_config.json", "preprocessor_config.json"):
        path = folder / str(name)
        path.unlink(missing_ok=True)
        if name in files:
            text = json.dumps(files[name])
            if rng.random() < 0.05:
                place = rng.randrange(len(text) + 1)
                text = text[:place] + rng.choice(["[", "]", "NaN", "\0", '"', "{" * 2000, ""]) + text[place + 1 :]
            path.write_text(text, encoding="utf-8")


def everything(folder: Path) -> ModelConfig:
    """All that is read from a configuration before any tensor is."""
    config = read_config(folder)
    if layouts.supported(config):
        layouts.tensor_shapes(config)
        checkpoint_storage(folder, config)
    read_quantization(read_json(folder / "config.json"), config.vision)
    return config


def outcome(folder: Path, number: int) -> ModelConfig | str:
    """What a configuration is read as, or the line that refuses it."""
    try:
        return everything(folder)
    except CheckpointError as error:
        return str(error)
    except BaseException:
        print(f"mutation {number}: {(folder / 'config.json').read_text(encoding='utf-8')[:6000]}")
        raise


def test_mutated_configurations_give_a_model_or_one_line(tmp_path: Path) -> None:
    rng = random.Random(20261129)
    read = 0
    for number in range(MUTATIONS):
        write(tmp_path, rng, rng.choice(LAYOUTS))
        with cpu_time_below(SECONDS):
            result = outcome(tmp_path, number)
        if isinstance(result, ModelConfig):
            read += 1
            assert 1 <= result.min_tiles <= result.max_tiles <= 128
            assert all(type(size) is int for size in (result.tokens_per_tile, result.decoder.head_dim))
        else:
            assert len(result.splitlines()) == 1
            assert len(result) <= 400
            assert ".json" in result or "quantization_config" in result
    assert MUTATIONS / 10 < read < MUTATIONS * 0.9


@pytest.mark.parametrize("tiny", LAYOUTS)
def test_unmutated_configurations_are_read(tmp_path: Path, tiny: Tiny) -> None:
    make = remote_config if tiny.layout == "remote" else native_config
    for name, values in ({"config.json": make(tiny, VOCABULARY)} | side_files(tiny, VOCABULARY)).items():
        (tmp_path / name).write_text(json.dumps(values))
    everything(tmp_path)


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
            everything(tmp_path)


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
