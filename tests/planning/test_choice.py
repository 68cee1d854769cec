"""What is chosen for a target: the first recipe that fits. Memory on a CPU is estimated above what was measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from helpers import tiny
from helpers.repository import REPOSITORY
from internvl_edge.base.errors import EdgeError
from internvl_edge.checkpoint.config_reader import read_config
from internvl_edge.model.config import ModelConfig
from internvl_edge.model.linear import INT8, W8A8, Scheme
from internvl_edge.planning.choice import PLANNED_CONTEXT, Target, choose, cpu_memory, needed_memory
from internvl_edge.planning.devices import Devices
from internvl_edge.planning.footprint import Storage
from internvl_edge.planning.storage import recipe_storage
from internvl_edge.recipe.files import make_recipe, presets

# Sizes of InternVL2_5-1B and of InternVL2_5-8B.
TOWER = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
ONE = {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2}
ONE |= {"head_dim": 64, "intermediate_size": 4864, "vocab_size": 151674}
EIGHT = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
EIGHT |= {"head_dim": 128, "intermediate_size": 14336, "vocab_size": 92553}
INT4 = Scheme(4, 128, symmetric=False)
RESULTS = REPOSITORY / "benchmarks" / "results"
# File -> program in it -> how its weights are stored. Each answered with up to 2048 tokens in the cache.
MEASURED = [
    ("cpu-peers-int4-lean", "int4, int8 head and tower", Storage(body=INT4, head=INT8, vision=W8A8)),
    ("cpu-peers-int8", "int8, int8 head and tower", Storage(body=INT8, head=INT8, vision=W8A8)),
    ("cpu-peers-int4", "int4, int8 head, float16 tower", Storage(body=INT4, head=INT8)),
]
STORAGES = {name: recipe_storage(make_recipe(values)) for name, values in presets().items()}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """Of a 1B."""
    found = read_config(tiny.write_checkpoint(tmp_path_factory.mktemp("choice") / "tiny"))
    tower = replace(found.vision, **TOWER, image_size=448, patch_size=14)
    decoder = replace(found.decoder, **ONE, max_position_embeddings=32768)
    return replace(found, vision=tower, decoder=decoder, max_tiles=12)


def of_size(config: ModelConfig, sizes: dict[str, int]) -> ModelConfig:
    return replace(config, decoder=replace(config.decoder, **sizes))  # type: ignore[arg-type]


def target(name: str) -> Target:
    device = Devices().device(name)
    return Target(name, device.title, device, device.usable_memory)


def cpu(usable: float | None) -> Target:
    return Target("cpu", "a CPU", None, None if usable is None else int(usable))


@pytest.mark.parametrize(("file", "program", "storage"), MEASURED, ids=[row[1] for row in MEASURED])
def test_memory_on_a_cpu_is_not_less_than_was_measured(
    config: ModelConfig, file: str, program: str, storage: Storage
) -> None:
    found = json.loads((RESULTS / f"{file}.json").read_text())["programs"][program]["memory"]
    measured = max(moment["resident"] for moment in found.values())
    assert measured <= cpu_memory(config, storage, 2048) <= 1.2 * measured


def test_memory_of_float_weights_is_not_less_than_was_measured(config: ModelConfig) -> None:
    measured = json.loads((RESULTS / "bench-1B-f16.json").read_text())["peak_rss_bytes"]
    assert measured <= cpu_memory(config, Storage(), 2048) <= 1.2 * measured


@pytest.mark.parametrize(
    ("name", "preset"),
    [("orin-nano-8gb", "orin"), ("thor", "thor"), ("rtx-4090", "rtx"), ("dgx-spark", "rtx"), ("agx-orin-64gb", "orin")],
)
def test_the_preset_of_a_device_is_the_first(config: ModelConfig, name: str, preset: str) -> None:
    found = choose(config, target(name), {each: STORAGES[each] for each in target(name).presets})
    assert (found.recipe, found.context) == (preset, PLANNED_CONTEXT)
    assert target(name).dialects == ("standard",)
    assert found.needed <= Devices().device(name).usable_memory


def test_the_first_recipe_that_fits_is_taken(config: ModelConfig) -> None:
    large = needed_memory(config, cpu(None), Storage(), PLANNED_CONTEXT)
    both = {"floats": Storage(), "cpu": STORAGES["cpu"]}
    assert choose(config, cpu(large), both).recipe == "floats"
    assert choose(config, cpu(large - 1), both).recipe == "cpu"
    assert choose(config, cpu(None), both).recipe == "floats"


def test_a_shorter_context_is_the_last_resort(config: ModelConfig) -> None:
    storage = {"cpu": STORAGES["cpu"]}
    usable = needed_memory(config, cpu(None), STORAGES["cpu"], 2048)
    found = choose(config, cpu(usable), storage)
    assert (found.context, found.needed <= usable) == (2048, True)
    with pytest.raises(EdgeError, match="what fits: --context 2048 with recipe cpu"):
        choose(config, cpu(usable), storage, context=4096)


def test_what_would_fit_really_fits(config: ModelConfig) -> None:
    large = of_size(config, EIGHT)
    others = {name: target(name) for name, device in Devices().all.items() if device.flavour == "tensorrt"}
    with pytest.raises(EdgeError, match="what fits: ") as raised:
        choose(large, target("orin-nano-8gb"), {"floats": Storage()}, others=others)
    names = [word for word in str(raised.value).replace(",", " ").split() if word in others]
    assert names
    for name in names:
        assert needed_memory(large, others[name], Storage(), PLANNED_CONTEXT) <= (others[name].usable_memory or 0)
    assert len(str(raised.value)) <= 400


def test_nothing_at_all_is_said(config: ModelConfig) -> None:
    with pytest.raises(EdgeError, match="what fits: a smaller variant of the model"):
        choose(of_size(config, EIGHT), cpu(1e9), {"cpu": STORAGES["cpu"]})


def test_results_are_there() -> None:
    assert all((RESULTS / f"{file}.json").is_file() for file, _, _ in MEASURED)
    assert Path(RESULTS, "bench-1B-f16.json").is_file()
