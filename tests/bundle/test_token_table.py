"""The token table of a bundle in int8: near the floats, smaller, and counted as what it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from helpers import tiny
from internvl_edge import export_bundle
from internvl_edge.base.errors import EdgeError
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.bundle.names import EMBEDDINGS
from internvl_edge.bundle.token_table import table_bytes
from internvl_edge.planning.footprint import Footprint
from internvl_edge.planning.storage import bundle_storage


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
    with pytest.raises(EdgeError, match="token table 'int4' is not one of float, int8"):
        export_bundle(checkpoint, tmp_path / "wrong", token_table="int4")
