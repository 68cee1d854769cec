"""One deserialised engine and its execution contexts: shapes and addresses in, work on a stream out.

Every refusal of TensorRT becomes an EngineError. Knows TensorRT and memory, nothing about vision or text.
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
        cuda: gives memory for contexts.
        path: the file.
        sha256: what its content must be.
        runtime_cache: kept kernels of an earlier start, b"" for none.

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
        """Input names and shapes, -1 where they vary."""
        return self._tensors(self._flavour.api.TensorIOMode.INPUT)

    def outputs(self) -> dict[str, tuple[int, ...]]:
        """Output names and shapes."""
        return self._tensors(self._flavour.api.TensorIOMode.OUTPUT)

    def profiles(self) -> int:
        """Optimisation profiles."""
        return int(self._engine.num_optimization_profiles)

    def context(self, profile: int, stream: Any, repeats: bool) -> Context:
        """A context for one profile. All contexts of a program use the same memory, so they run on one stream."""
        size = self._flavour.context_bytes(self._engine)
        if self._memory is None and size:
            self._memory = self._cuda.device_memory(size, f"intermediate results of {self._path.name}")
        context = self._flavour.context(self._engine, self._cache, repeats)
        if context is None:
            raise EngineError(f"{self._path.name}: no execution context: {last_error(self._flavour.log)}")
        if self._memory is not None:
            context.set_device_memory(self._memory, size)
        if profile and not context.set_optimization_profile_async(profile, stream):
            raise EngineError(f"{self._path.name}: no profile {profile}: {last_error(self._flavour.log)}")
        self._cuda.synchronise(stream)
        return Context(context, self._path.name, self._flavour.log)

    def cache_bytes(self) -> bytes:
        """Kernels compiled on this device, to be kept for the next start."""
        return self._flavour.cache_bytes(self._cache)

    def close(self) -> None:
        """Release the engine; contexts must have been closed."""
        self._cache = self._engine = self._runtime = None

    def _tensors(self, mode: Any) -> dict[str, tuple[int, ...]]:
        engine = self._engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        return {name: tuple(engine.get_tensor_shape(name)) for name in names if engine.get_tensor_mode(name) == mode}


class Context:
    """One execution context with fixed addresses and varying shapes."""

    def __init__(self, context: Any, name: str, log: Any) -> None:
        self._context = context
        self._name = name
        self._log = log
        self._shapes: dict[str, tuple[int, ...]] = {}

    def bind(self, addresses: dict[str, int]) -> None:
        """Where each input and output lies."""
        for name, address in addresses.items():
            self._check(self._context.set_tensor_address(name, address), f"address of {name}")

    def reshape(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Shapes of inputs for what follows."""
        for name, shape in shapes.items():
            if self._shapes.get(name) != shape:
                self._check(self._context.set_input_shape(name, shape), f"shape {shape} of {name}")
                self._shapes[name] = shape

    def enqueue(self, stream: Any) -> None:
        """Start computing on a stream."""
        self._check(self._context.execute_async_v3(int(stream)), "run")

    def close(self) -> None:
        """Release the context."""
        self._context = None

    def _check(self, done: bool, what: str) -> None:
        if not done:
            raise EngineError(f"TensorRT refuses {what} in {self._name}: {last_error(self._log)}")
