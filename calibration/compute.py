"""Choose the device and the type of calibration: CUDA if present, else the CPU; bfloat16 where the CPU supports it.

Matrix products of bfloat16 accumulate in float32. float16 is never used, because activations of real models exceed it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from internvl_edge.base.errors import EdgeError
from internvl_edge.base.machine import cpu_features

# Tensors of tens of megabytes come and go with every block. In huge pages, where the system offers them, the first
# touch of each costs little; otherwise it is 8 % of a block's time. torch reads this before its first large tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_MULTIPLIES_BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}  # the last name is Arm's


@dataclass(frozen=True)
class Compute:
    """A device and the type of matrix products on it."""

    device: torch.device
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} on {self.device}"


def choose_compute(device: str = "auto", dtype: str = "auto") -> Compute:
    """Return the best device and type of this machine, or the requested ones.

    Args:
        device: "auto", "cpu" or a CUDA device such as "cuda" or "cuda:1".
        dtype: "auto", "bfloat16" or "float32".

    Raises:
        EdgeError: the machine has no such device, or a name is unknown.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not (device == "cpu" or device.partition(":")[0] == "cuda"):
        raise EdgeError(f"device {device!r} is not one of auto, cpu, cuda")
    if device != "cpu" and not torch.cuda.is_available():
        raise EdgeError(f"device {device} was asked for but torch finds no CUDA device; use --device cpu")
    if dtype == "auto":
        dtype = "bfloat16" if device != "cpu" or _MULTIPLIES_BFLOAT16 & cpu_features() else "float32"
    if dtype not in DTYPES:
        raise EdgeError(f"dtype {dtype!r} is not one of auto, {', '.join(DTYPES)}")
    return Compute(torch.device(device), DTYPES[dtype])


def is_finite(tensor: Tensor) -> bool:
    """Return whether a tensor holds neither NaN nor infinity.

    Its smallest and largest value say so, since NaN is both where there is one. This reads the tensor once and makes no
    other; `isfinite` makes one, which costs twenty times as much.
    """
    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread for loops of small operations. More threads would cost more at their barriers than they save."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def to_torch(array: np.ndarray[Any, Any]) -> Tensor:
    """Return a tensor over the same memory.

    ml_dtypes' bfloat16 becomes torch's. Do not write to a read-only array's tensor.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(np.ascontiguousarray(array).view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(np.ascontiguousarray(array))


def to_numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Return the array of a tensor on any device: the inverse of `to_torch`."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        bits: np.ndarray[Any, Any] = tensor.view(torch.int16).numpy()
        return bits.view(ml_dtypes.bfloat16)
    return np.asarray(tensor.numpy())
