"""Read and write the weight files of a checkpoint folder: safetensors, and `.bin` without unpickling (read only).

This module knows only files and bytes. It does not know models. Arrays are views of the mapped files, and nothing is
read until it is used. Tensors are written one at a time, because the header is known before any tensor is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.base.errors import CheckpointError
from internvl_edge.base.extras import requires
from internvl_edge.base.files import replacing
from internvl_edge.base.progress import Advance
from internvl_edge.base.text import is_file_name, one_line, shown

from .json_files import read_json, refuse_pointer
from .safetensors_header import BITS, HeaderEntry, read_header
from .training import missing_weights_advice

# Beside bfloat16, which numpy has from another package (`numpy_dtype`).
_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# The types that can be read.
STORED_DTYPES = frozenset([*_DTYPES, "BF16"])
SHARD_BYTES = 4_000_000_000
_BLOCK_BYTES = 64 << 20


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return the numpy type of a stored type.

    A device that only looks at a checkpoint has no package for bfloat16, and needs none to read names and shapes.
    """
    if name != "BF16":
        return _DTYPES[name]
    with requires("export", "reading bfloat16 weights", CheckpointError):
        import ml_dtypes
    dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return dtype


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file. `read` returns it as a read-only view in its stored dtype."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray[Any, Any]]


def open_tensor_files(folder: Path) -> dict[str, StoredTensor]:
    """Return every tensor in the folder's weight files, one file or sharded. safetensors is preferred to `.bin`.

    Raises:
        CheckpointError: no weight file, or two that could be meant; a shard that is missing, truncated or not what its
            header says; a name stored twice.
    """
    for stem, reader in _FORMATS.items():
        index, single = folder / f"{stem}.index.json", folder / stem
        if index.is_file():
            shards = _read_index(index)
            _refuse_second_source(folder, index.name, set(shards.values()), stem)
            return _read_shards(index, shards, reader)
        if single.is_file():
            _refuse_second_source(folder, stem, {stem}, stem)
            return reader(single)
    advice = missing_weights_advice(folder)
    raise CheckpointError(
        f"{folder} has no model.safetensors or pytorch_model.bin (nor their .index.json); {advice or 'is it complete?'}"
    )


def _refuse_second_source(folder: Path, source: str, used: set[str], stem: str) -> None:
    """Raise CheckpointError where weights lie beside `source` that could be meant as well as its own files."""
    name, _, suffix = stem.rpartition(".")
    shard = re.compile(rf"{name}-\d+-of-\d+\.{suffix}")
    others = (path.name for path in sorted(folder.iterdir()) if path.name == stem or shard.fullmatch(path.name))
    if other := next((file for file in others if file not in used), None):
        raise CheckpointError(
            f"{folder} holds two sources of weights, {source} and {other}; keep the right one, move the other away"
        )


def _read_index(index: Path) -> dict[str, str]:
    """Tensor name -> shard."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index} is not a shard index (weight_map); download it again")
    return weight_map


def _read_shards(
    index: Path, weight_map: dict[str, str], reader: Callable[[Path], dict[str, StoredTensor]]
) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(weight_map.values())):
        if not is_file_name(shard) or not (index.parent / shard).is_file():
            raise CheckpointError(
                f"{index.name} names the shard {shown(shard)}, which is not in {index.parent}; download it again"
            )
        for name, tensor in reader(index.parent / shard).items():
            if name in tensors:
                raise CheckpointError(f"tensor {name} is stored twice, in {tensors[name].file} and in {shard}")
            tensors[name] = tensor
    for name, shard in weight_map.items():
        if name not in tensors:
            raise CheckpointError(
                f"{index.name} promises tensor {shown(name)} in {shard}, which does not hold it; download it again"
            )
    return tensors


def _read_safetensors(path: Path) -> dict[str, StoredTensor]:
    refuse_pointer(path)
    entries = read_header(path)
    data = np.memmap(path, np.uint8, "r")
    return {name: _mapped_tensor(path, name, entry, data) for name, entry in entries.items()}


def _mapped_tensor(
    path: Path, name: str, entry: HeaderEntry, data: np.ndarray[Any, np.dtype[np.uint8]]
) -> StoredTensor:
    def read() -> np.ndarray[Any, Any]:
        if entry.dtype not in STORED_DTYPES:
            raise CheckpointError(f"{path.name}: tensor {name} has the unsupported dtype {entry.dtype}")
        return data[entry.begin : entry.end].view(numpy_dtype(entry.dtype)).reshape(entry.shape)

    return StoredTensor(path.name, entry.dtype, entry.shape, read)


def _read_bin(path: Path) -> dict[str, StoredTensor]:
    """A torch archive through `weights_only=True`: tensors only, no code in it is ever run."""
    refuse_pointer(path)
    with requires("bin", f"reading {path.name}", CheckpointError):
        import torch
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}, expected tensors by name")
    except Exception as error:  # torch raises many kinds for damaged archives and for pickles that hold code
        reason = one_line(str(error).partition("\n")[0], 160)
        raise CheckpointError(f"{path} cannot be read without running its code or is damaged: {reason}") from None
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32", torch.int64: "I64"}

    def reader(tensor: torch.Tensor) -> Callable[[], np.ndarray[Any, Any]]:
        if tensor.dtype == torch.bfloat16:
            return lambda: tensor.contiguous().view(torch.int16).numpy().view(numpy_dtype("BF16"))
        return lambda: np.asarray(tensor.numpy())

    return {
        name: StoredTensor(path.name, names.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape), reader(tensor))
        for name, tensor in state.items()
        if isinstance(name, str) and isinstance(tensor, torch.Tensor)
    }


@dataclass(frozen=True)
class OutTensor:
    """A tensor to write: its name, type, shape, and how to read it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], NDArray[Any]]

    @staticmethod
    def of(name: str, array: NDArray[Any]) -> OutTensor:
        """Return an OutTensor for an array in memory."""
        return OutTensor(name, _NAMES.get(array.dtype) or "BF16", array.shape, lambda: array)

    @staticmethod
    def stored(name: str, tensor: StoredTensor) -> OutTensor:
        """Return an OutTensor for a tensor of another file, under the name `name`."""
        return OutTensor(name, tensor.dtype, tensor.shape, tensor.read)

    @property
    def nbytes(self) -> int:
        """Size in the file, in bytes."""
        return BITS[self.dtype] // 8 * int(np.prod(self.shape, dtype=np.int64))


_FORMATS: dict[str, Callable[[Path], dict[str, StoredTensor]]] = {
    "model.safetensors": _read_safetensors,
    "pytorch_model.bin": _read_bin,
}


def write_file(path: Path, tensors: Sequence[OutTensor], progress: Advance = lambda size: None) -> None:
    """Write one safetensors file. It appears only when it is complete."""
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


def write_shards(folder: Path, tensors: Sequence[OutTensor], progress: Advance = lambda size: None) -> None:
    """Write `model.safetensors`, or shards of at most `SHARD_BYTES` and their index.

    A larger tensor has its own shard.
    """
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
