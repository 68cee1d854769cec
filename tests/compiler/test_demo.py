"""The demo models become engines for RTX 30, 40 and 50 cards, without a GPU, as they are and by the presets."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from helpers.calibration_data import FLOAT32
from helpers.repository import REPOSITORY
from internvl_edge import export_bundle
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.calibration import DataOptions
from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.compiler import build_engines
from internvl_edge.compiler.bundle_engines import headers, options_for
from internvl_edge.compiler.operators import require_operators
from internvl_edge.demo import CHECKPOINT
from internvl_edge.planning.devices import Devices
from internvl_edge.planning.versions import VERSIONS, has_new_layers, keeps_int8_cache, reads_decomposable
from internvl_edge.quantize import quantize_checkpoint
from internvl_edge.recipe.files import make_recipe, read_recipe
from internvl_edge.runtime.engines.tensorrt.record import ENGINES, BuildOptions

pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed (pip install tensorrt-rtx-cu13)")
pytestmark = pytest.mark.slow

INTERNLM2 = REPOSITORY / "examples" / "reader" / "internlm2"


@pytest.mark.parametrize("source", [CHECKPOINT, INTERNLM2], ids=["qwen2", "internlm2"])
@pytest.mark.parametrize("recipe", ["none", "cpu", "rtx", "orin"])
def test_every_version_takes_the_graphs_and_engines_of_the_demo_models_are_built(
    source: Path, recipe: str, tmp_path: Path
) -> None:
    """`cpu` has zero points, which need the correction; `orin` an int8 cache."""
    checkpoint = source
    if recipe != "none":
        data = DataOptions(samples=4, max_tiles=1)
        chosen = make_recipe(read_recipe(recipe))
        checkpoint = quantize_checkpoint(checkpoint, tmp_path / "made", chosen, data=data, compute=FLOAT32).folder
    bundle = Bundle.open(export_bundle(checkpoint, tmp_path / "bundle", "float16", dialects=["standard"]))
    for flavour, versions in VERSIONS.items():
        for version in versions:
            made = headers(
                bundle,
                BuildOptions("bfloat16"),
                not has_new_layers(flavour, version),
                decomposable=reads_decomposable(flavour, version),
                wide_cache=not keeps_int8_cache(flavour),
            )
            for header, path in made.values():
                require_operators(header, path.name, flavour, version)
    target = Devices().target("rtx")
    record, _ = build_engines(bundle, target, options_for(target))
    assert record.compute_capabilities == (86, 89, 120)
    sizes = {name: facts["bytes"] for name, facts in record.files.items()}
    assert sizes.keys() == set(ENGINES.values())
    shapes = Checkpoint(source).shapes
    names = [name for name in shapes if name.startswith("decoder.") and "embed_tokens" not in name]
    weights = sum(2 * math.prod(shapes[name]) for name in names)
    # 3 MB of an engine are no weights, up to 7 where it copies an int8 cache.
    assert (sizes["decoder.engine"] < 1.2 * weights) == (recipe != "none")
