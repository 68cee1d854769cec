"""One deserialized engine and its execution contexts, which run on a stream with given shapes and addresses.

Every refusal of TensorRT becomes an EngineError. This module knows TensorRT and memory. It does not know vision or
text.
"""

from __future__ import annotations

import hashlib
import mmap
from pathlib import Path
from typing import Any

from internvl_edge.base.errors import EngineError

from .cuda import Cuda
from .flavour import Flavour, last_error


class Program:
    """An engine file on the device.

    Args:
        flavour: the TensorRT that built the file.
        cuda: allocates memory for the contexts.
        path: the engine file.
        sha256: the expected SHA-256 of the file.
        runtime_cache: saved kernels of an earlier start, b"" for none.

    Raises:
        EngineError: the file was changed, or TensorRT refuses it.
    """

    def __init__(self, flavour: Flavour, cuda: Cuda, path: Path, sha256: str, runtime_cache: bytes = b"") -> None:
        self._flavour = flavour
        self._cuda = cuda
        self._path = path
        self._runtime = flavour.api.Runtime(flavour.log)
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if hashlib.sha256(data).hexdigest() != sha256:
                raise EngineError(f"{path} was changed (its SHA-256 is not the record's); build the engines again")
            self._engine = self._runtime.deserialize_cuda_engine(data)
        if self._engine is None:
            raise EngineError(f"{flavour.name} {flavour.version} cannot load {path}: {last_error(flavour.log)}")
        self._cache = flavour.new_cache(self._engine, runtime_cache)
        self._memory: int | None = None

    def inputs(self) -> dict[str, tuple[int, ...]]:
        """Return the names and shapes of the inputs; a dimension that varies is -1."""
        return self._tensors(self._flavour.api.TensorIOMode.INPUT)

    def outputs(self) -> dict[str, tuple[int, ...]]:
        """Return the names and shapes of the outputs; a dimension that varies is -1."""
        return self._tensors(self._flavour.api.TensorIOMode.OUTPUT)

    def itemsize(self, name: str) -> int:
        """Return the bytes of one value of an input or output."""
        return int(self._engine.get_tensor_dtype(name).itemsize)

    def profiles(self) -> int:
        """Return the number of optimization profiles."""
        return int(self._engine.num_optimization_profiles)

    def context(self, profile: int, stream: Any, *, repeats: bool = False, eager: bool = False) -> Context:
        """Return a context for one profile. `repeats` and `eager` are those of `Flavour.context`.

        All contexts of a program share one piece of memory, so they must run on one stream.
        """
        size = self._flavour.context_bytes(self._engine)
        if self._memory is None and size:
            self._memory = self._cuda.device_memory(size, f"intermediate results of {self._path.name}")
        context = self._flavour.context(self._engine, self._cache, repeats, eager)
        if context is None:
            raise EngineError(f"{self._path.name}: no execution context: {last_error(self._flavour.log)}")
        if self._memory is not None:
            context.set_device_memory(self._memory, size)
        if profile and not context.set_optimization_profile_async(profile, stream):
            raise EngineError(f"{self._path.name}: no profile {profile}: {last_error(self._flavour.log)}")
        self._cuda.synchronize(stream)
        return Context(context, self._path.name, self._flavour.log)

    def cache_bytes(self) -> bytes:
        """Return the kernels that were compiled on this device, to be saved for the next start."""
        return self._flavour.cache_bytes(self._cache)

    def close(self) -> None:
        """Release the engine. Its contexts must be closed first."""
        self._cache = self._engine = self._runtime = None

    def _tensors(self, mode: Any) -> dict[str, tuple[int, ...]]:
        engine = self._engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        return {name: tuple(engine.get_tensor_shape(name)) for name in names if engine.get_tensor_mode(name) == mode}


class Context:
    """One execution context, with fixed addresses and variable shapes."""

    def __init__(self, context: Any, name: str, log: Any) -> None:
        self._context = context
        self._name = name
        self._log = log
        self._shapes: dict[str, tuple[int, ...]] = {}

    def bind(self, addresses: dict[str, int]) -> None:
        """Set the address of each input and output."""
        for name, address in addresses.items():
            self._check(self._context.set_tensor_address(name, address), f"address of {name}")

    def reshape(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Set the shapes of inputs for the following runs."""
        for name, shape in shapes.items():
            if self._shapes.get(name) != shape:
                self._check(self._context.set_input_shape(name, shape), f"shape {shape} of {name}")
                self._shapes[name] = shape

    def enqueue(self, stream: Any) -> None:
        """Start the computation on a stream."""
        self._check(self._context.execute_async_v3(int(stream)), "run")

    def close(self) -> None:
        """Release the context."""
        self._context = None

    def _check(self, done: bool, what: str) -> None:
        if not done:
            raise EngineError(f"TensorRT refuses {what} in {self._name}: {last_error(self._log)}")
