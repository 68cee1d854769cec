"""The token table of a bundle in int8: near the floats, smaller, and counted as what it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from helpers import tiny
from helpers.tiny_quantized import write_quantized
from internvl_edge import export_bundle
from internvl_edge.base.errors import EdgeError
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.bundle.names import EMBEDDINGS
from internvl_edge.bundle.token_table import table_bytes
from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.model.linear import Scheme
from internvl_edge.planning.footprint import Footprint
from internvl_edge.planning.storage import bundle_storage, checkpoint_storage, recipe_storage
from internvl_edge.recipe.files import make_recipe


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_int8_token_table_is_near_the_floats_and_counted(tmp_path: Path, dtype: str) -> None:
    checkpoint = tiny.write_checkpoint(tmp_path / "checkpoint")
    floats = Bundle.open(export_bundle(checkpoint, tmp_path / "floats", "float32"))
    rounded = Bundle.open(export_bundle(checkpoint, tmp_path / "rounded", dtype, token_table="int8"))
    shape = floats.manifest.model.decoder.vocab_size, floats.manifest.model.decoder.hidden_size
    assert rounded.path(EMBEDDINGS).stat().st_size == table_bytes(shape, "int8") < 0.3 * table_bytes(shape, "float32")
    ids = np.arange(shape[0])
    expected, found = floats.embeddings()[ids], rounded.embeddings()[ids]
    assert found.dtype == np.float32
    step = np.abs(expected).max(axis=1, keepdims=True) / 127
    assert np.abs(found - expected).max() > 0
    assert (np.abs(found - expected) <= 0.501 * step).all()
    np.testing.assert_array_equal(rounded.embeddings()[7], found[7])
    assert rounded.manifest.is_quantized
    sizes = {part.name: part.bytes for part in rounded.manifest.components}
    assert sizes["token table"] == pytest.approx(table_bytes(shape, "int8"), rel=0.01)
    counted = Footprint(rounded.manifest.model, bundle_storage(rounded.manifest)).weights.embeddings
    assert counted == table_bytes(shape, "int8")
    with pytest.raises(EdgeError, match="token table 'int4' is not one of auto, float, int8"):
        export_bundle(checkpoint, tmp_path / "wrong", token_table="int4")


@pytest.mark.parametrize("body", [Scheme(4, 32, False), Scheme(8, None, True), None], ids=["int4", "int8", "floats"])
@pytest.mark.parametrize("wanted", ["auto", "float", "int8"])
def test_the_table_is_int8_where_layers_are_quantized(tmp_path: Path, body: Scheme | None, wanted: str) -> None:
    """Unless it is asked for; and `plan` counts what `export` writes, before there is a bundle."""
    checkpoint = tiny.write_checkpoint(tmp_path / "checkpoint")
    if body is not None:
        checkpoint, _ = write_quantized(checkpoint, tmp_path / "made", method="compressed-tensors", body=body)
    folder = export_bundle(checkpoint, tmp_path / "bundle", "float16", dialects=["onnxruntime"], token_table=wanted)
    opened = Bundle.open(folder)
    expected = "float16" if wanted == "float" or (wanted == "auto" and body is None) else "int8"
    assert opened.manifest.token_table == expected
    model = opened.manifest.model
    size = opened.path(EMBEDDINGS).stat().st_size
    assert size == table_bytes((model.decoder.vocab_size, model.decoder.hidden_size), expected)
    assert Footprint(model, bundle_storage(opened.manifest)).weights.embeddings == size
    planned = checkpoint_storage(checkpoint, model)
    if wanted == "auto" and planned is not None:
        assert Footprint(model, planned).weights.embeddings == size


@pytest.mark.parametrize(("decoder", "table"), [("w4a16-awq", "int8"), ("w8a8", "int8"), ("fp", "float16")])
def test_a_plan_for_a_recipe_counts_its_table(tmp_path: Path, decoder: str, table: str) -> None:
    model = Checkpoint(tiny.write_checkpoint(tmp_path / "checkpoint")).config
    storage = recipe_storage(make_recipe({"decoder": decoder, "vision": "int8"}))
    shape = model.decoder.vocab_size, model.decoder.hidden_size
    assert Footprint(model, storage).weights.embeddings == table_bytes(shape, table)
