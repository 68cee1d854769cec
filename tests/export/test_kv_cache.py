"""The int8 KV cache: its scales, its graphs in both dialects, and what it costs at any position."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
import torch

from helpers import tiny
from helpers.engines import TEXT, engine_for, greedy, random_tiles
from helpers.kv_scales import write_scales, write_scales_of_zeros
from helpers.reference import Reference
from internvl_edge import export_bundle
from internvl_edge.base.errors import CheckpointError
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.bundle.names import DECODERS
from internvl_edge.calibration.cache_ranges import CacheRanges
from internvl_edge.checkpoint.kv_scales import KV_CACHE_SCALES, KvScales
from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.model.rope import RotaryAngles


@pytest.mark.parametrize("text", ["qwen2", "qwen3", "internlm2"])
def test_both_dialects_compute_what_the_reference_computes_with_a_rounded_cache(tmp_path: Path, text: str) -> None:
    checkpoint = tiny.write_checkpoint(tmp_path / "checkpoint", text=text)
    scales = write_scales(checkpoint)
    reference = Reference(checkpoint)
    config = Checkpoint(checkpoint).config
    tiles = random_tiles(2, config.vision.image_size)
    ids = TEXT[:4] + [reference.image_token_id()] * (2 * config.tokens_per_tile) + TEXT
    unrounded = reference.generate(ids, tiles, max_new_tokens=8)
    reference.kv_scales = torch.from_numpy(scales.key), torch.from_numpy(scales.value)
    expected = reference.generate(ids, tiles, max_new_tokens=8)
    apart = float((expected.step_logits[0] - unrounded.step_logits[0]).abs().max())
    bundle = export_bundle(checkpoint, tmp_path / "bundle")
    assert Bundle.open(bundle).manifest.kv_cache == "int8"
    table = reference.weights["language_model.model.embed_tokens.weight"].float().numpy()
    for dialect in DECODERS:
        engine = engine_for(bundle, dialect)
        features = engine.encode(tiles)
        embeds = table[ids]
        embeds[np.array(ids) == reference.image_token_id()] = features.reshape(-1, features.shape[-1])
        tokens, logits = greedy(engine, embeds, table, count=8)
        # A number next to the middle between two integers may be rounded either way: far less than all roundings.
        assert np.abs(logits[0] - expected.step_logits[0].numpy()).max() < 0.2 * apart
        assert tokens == expected.ids


def test_scales_of_channels_of_zeros_have_inverses_in_float16(tmp_path: Path) -> None:
    checkpoint = tiny.write_checkpoint(tmp_path / "checkpoint")
    write_scales_of_zeros(checkpoint)
    bundle = export_bundle(checkpoint, tmp_path / "bundle", activations="float16", dialects=["standard"])
    graph = onnx.load(bundle / DECODERS["standard"], load_external_data=False).graph
    constants = [onnx.numpy_helper.to_array(each) for each in graph.initializer if not each.external_data]
    assert all(np.isfinite(constant).all() for constant in constants)


def test_the_cache_takes_a_quarter_of_the_memory(tmp_path: Path) -> None:
    checkpoint = tiny.write_checkpoint(tmp_path / "checkpoint")
    floats = engine_for(export_bundle(checkpoint, tmp_path / "floats"), "onnxruntime")
    write_scales(checkpoint)
    integers = engine_for(export_bundle(checkpoint, tmp_path / "integers"), "onnxruntime")
    sizes = [sum(array.nbytes for array in engine._buffers.arrays.values()) for engine in (floats, integers)]
    assert sizes[0] == 4 * sizes[1]


def rotated(keys: np.ndarray, angles: RotaryAngles, start: int) -> np.ndarray:
    """Keys [tokens, head_dim] at positions start .."""
    cos, sin = (table.astype(np.float64) for table in angles.at(start, len(keys), start + len(keys)))
    first, second = np.split(keys, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def relative_error(keys: np.ndarray, scale: np.ndarray) -> float:
    rounded = np.clip(np.round(keys / scale), -128, 127) * scale
    return float(np.sqrt(np.mean((rounded - keys) ** 2) / np.mean(keys**2)))


def test_errors_of_keys_are_the_same_from_position_100_to_8000(tmp_path: Path) -> None:
    """Keys with one half of a pair much larger, as biases make them: at other positions it becomes the other half."""
    decoder = Checkpoint(tiny.write_checkpoint(tmp_path / "checkpoint")).config.decoder
    angles = RotaryAngles(decoder)
    width = decoder.head_dim
    rng = np.random.default_rng(0)
    offset = np.concatenate([np.full(width // 2, 20.0), np.zeros(width // 2)])
    keys = offset + rng.standard_normal((400, width))
    envelope = CacheRanges(decoder, torch.device("cpu"))
    sample = torch.from_numpy(keys).float()[:, None].expand(-1, decoder.num_key_value_heads, -1)
    envelope.add(sample, sample)
    arrays = envelope.arrays()
    scale = KvScales.from_ranges(arrays["keys"][None], arrays["values"][None]).key[0, 0]
    seen_first = np.abs(rotated(keys[:100], angles, 0)).max(axis=0) / 127  # ranges of what short prompts put in
    positions = range(100, 8000, 790)
    ours = [relative_error(rotated(keys, angles, position), scale) for position in positions]
    naive = [relative_error(rotated(keys, angles, position), seen_first) for position in positions]
    assert max(ours) < 1.1 * min(ours)
    assert max(naive) > 3 * max(ours)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (np.ones((2, 1, 4), np.float32), r"key scales are float32 \[2, 1, 4\], this model needs float32"),
        (None, "key scales must be finite and positive"),
        (b"no arrays", "is damaged"),
        (b"", "is damaged"),
        (100, "is damaged"),  # bytes that are left of the file
    ],
)
def test_scales_that_do_not_fit_are_one_line(tmp_path: Path, key: object, message: str) -> None:
    checkpoint = tiny.write_checkpoint(tmp_path / "checkpoint")
    scales = write_scales(checkpoint)
    path = checkpoint / KV_CACHE_SCALES
    if isinstance(key, bytes):
        path.write_bytes(key)
    elif isinstance(key, int):
        path.write_bytes(path.read_bytes()[:key])
    else:
        np.savez(path, key=-scales.key if key is None else key, value=scales.value)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(checkpoint)
