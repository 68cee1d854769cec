"""The scales of an int8 KV cache. They are calibrated once and stored beside a checkpoint's weights.

There is one scale per layer, KV head and channel. Keys enter the cache rotated. A rotation mixes channel j with channel
j + head_dim / 2 by an angle that depends on the position. Both channels therefore share one scale, which comes from the
largest length that the pair ever has, so that no position leaves the range. The file is not part of any other program's
format. Other programs read the checkpoint as if the file did not exist.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from internvl_edge.base.errors import CheckpointError
from internvl_edge.model.config import DecoderConfig

KV_CACHE_SCALES = "kv_cache_scales.npz"
_LEVELS = 127
# The range that a channel of zeros gets. It is large enough that division by its scale stays finite in float16.
_SMALLEST_RANGE = 1e-3


@dataclass(frozen=True)
class KvScales:
    """The factors that turn the int8 values of a KV cache into numbers.

    Attributes:
        key, value: [layers, kv_heads, head_dim] float32, positive. Key scales are equal in both halves of a head.
    """

    key: NDArray[np.float32]
    value: NDArray[np.float32]

    @staticmethod
    def from_ranges(keys: NDArray[np.float32], values: NDArray[np.float32]) -> KvScales:
        """Return scales with which int8 reaches the given magnitudes.

        Args:
            keys: [layers, kv_heads, head_dim / 2], the largest length of each rotated pair.
            values: [layers, kv_heads, head_dim], the largest |value|.
        """
        both = np.concatenate([keys, keys], axis=-1), values
        key, value = (np.maximum(part, _SMALLEST_RANGE).astype(np.float32) / np.float32(_LEVELS) for part in both)
        return KvScales(key, value)

    def write(self, folder: Path) -> None:
        """Write the file into a checkpoint folder."""
        np.savez(folder / KV_CACHE_SCALES, key=self.key, value=self.value)

    @staticmethod
    def read(folder: Path, decoder: DecoderConfig) -> KvScales | None:
        """Return the scales of a checkpoint folder, or None where it has none.

        Raises:
            CheckpointError: the file is damaged or belongs to another model.
        """
        path = folder / KV_CACHE_SCALES
        if not path.is_file():
            return None
        shape = (decoder.num_hidden_layers, decoder.num_key_value_heads, decoder.head_dim)
        try:
            with np.load(path, allow_pickle=False) as arrays:
                scales = KvScales(arrays["key"], arrays["value"])
        except (OSError, EOFError, ValueError, KeyError, BadZipFile) as error:
            raise CheckpointError(f"{path} is damaged ({error}); quantize the checkpoint again") from None
        for name, array in (("key", scales.key), ("value", scales.value)):
            if array.shape != shape or array.dtype != np.float32:
                raise CheckpointError(
                    f"{path}: {name} scales are {array.dtype} {list(array.shape)}, this model needs float32 "
                    f"{list(shape)}; quantize the checkpoint again"
                )
            if not (np.isfinite(array).all() and (array > 0).all()):
                raise CheckpointError(f"{path}: {name} scales must be finite and positive; quantize it again")
        return scales
