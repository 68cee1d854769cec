"""Writing safetensors files one tensor at a time: one file, or shards with their index.

The header is known before any tensor is read, so memory holds one tensor. Knows bytes, nothing about models.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.base.files import replacing
from internvl_edge.checkpoint.tensor_files import DTYPES, StoredTensor

SHARD_BYTES = 4_000_000_000
_BLOCK_BYTES = 64 << 20
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
Progress = Callable[[int], object]


@dataclass(frozen=True)
class OutTensor:
    """A tensor to be written: its name, type, shape, and how to read it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], NDArray[Any]]

    @staticmethod
    def of(name: str, array: NDArray[Any]) -> OutTensor:
        """A tensor that is in memory."""
        return OutTensor(name, _NAMES[array.dtype], array.shape, lambda: array)

    @staticmethod
    def stored(name: str, tensor: StoredTensor) -> OutTensor:
        """A tensor of another file, under a name."""
        return OutTensor(name, tensor.dtype, tensor.shape, tensor.read)

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return DTYPES[self.dtype].itemsize * int(np.prod(self.shape, dtype=np.int64))


def write_file(path: Path, tensors: Sequence[OutTensor], progress: Progress = lambda size: None) -> None:
    """One safetensors file; it appears when it is whole."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.nbytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path, shared=False) as new, new.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            data = np.ascontiguousarray(tensor.read()).reshape(-1).view(np.uint8).data
            for start in range(0, len(data), _BLOCK_BYTES):
                file.write(data[start : start + _BLOCK_BYTES])
                progress(len(data[start : start + _BLOCK_BYTES]))


def write_shards(folder: Path, tensors: Sequence[OutTensor], progress: Progress = lambda size: None) -> None:
    """Write `model.safetensors`, or shards of at most `SHARD_BYTES` (a larger tensor has its own) and their index."""
    shards: list[list[OutTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    if len(shards) == 1:
        write_file(folder / "model.safetensors", shards[0], progress)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_file(folder / name, shard, progress)
        weight_map |= {tensor.name: name for tensor in shard}
    total = sum(tensor.nbytes for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
