"""Write scales of an int8 KV cache for a checkpoint that was never calibrated."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from internvl_edge.checkpoint.kv_scales import KvScales
from internvl_edge.checkpoint.reader import Checkpoint


def write_scales(checkpoint: Path, seed: int = 0, least: float = 2, most: float = 6) -> KvScales:
    """Write scales like those of a calibration: some channels are far larger than others.

    The ranges of channels are between `least` and `most`. Values of tiny models beyond 2 to 6 are clipped.
    """
    decoder = Checkpoint(checkpoint).config.decoder
    shape = decoder.num_hidden_layers, decoder.num_key_value_heads
    rng = np.random.default_rng(seed)
    keys, values = (
        rng.uniform(least, most, (*shape, width)).astype(np.float32)
        for width in (decoder.head_dim // 2, decoder.head_dim)
    )
    scales = KvScales.from_ranges(keys, values)
    scales.write(checkpoint)
    return scales


def write_scales_of_zeros(checkpoint: Path) -> None:
    """Write scales of which the first channels have seen nothing but zeros."""
    scales = write_scales(checkpoint)
    keys, values = 127 * scales.key[..., : scales.key.shape[-1] // 2], 127 * scales.value
    keys[..., :3], values[..., :3] = 0, 0
    KvScales.from_ranges(keys, values).write(checkpoint)
