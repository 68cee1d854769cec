"""Where `tensorrt` (JetPack, 10.3 to 11.x) and `tensorrt_rtx` differ; everything else uses what they share.

Knows their Python interfaces, no bundle and no model.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl_edge.base.errors import EngineError
from internvl_edge.base.extras import install

_OLDEST = {"tensorrt": (10, 3), "tensorrt_rtx": (1, 7)}
# Attention came with 10.14, rotary embedding and the cache update with 10.15 (release notes).
_ATTENTION = {"tensorrt": (10, 15), "tensorrt_rtx": (1, 7)}
_INSTALL = {
    "tensorrt": "it comes with JetPack 6.2 or newer (make the environment with --system-site-packages)",
    "tensorrt_rtx": install("rtx"),
}
# What a library without a driver says again and again while it builds; building needs none.
_NO_DRIVER = "CUDA driver version is insufficient"


@dataclass(frozen=True)
class Flavour:
    """One installed TensorRT. `api` is its Python module, `log` collects what it says."""

    name: str
    api: Any
    log: Any

    @property
    def version(self) -> str:
        """As the library says, "10.16.1.11"."""
        return str(self.api.__version__)

    @property
    def builds_anywhere(self) -> bool:
        """Whether engines can be built for other devices than the present one, or with none."""
        return self.name == "tensorrt_rtx"

    @property
    def has_attention(self) -> bool:
        """Whether it has layers for attention, rotary embedding and the cache; without, graphs are decomposed."""
        return _numbers(self.version) >= _ATTENTION[self.name]

    def network(self, builder: Any) -> Any:
        """An empty network whose types are those of the graph; version 11 knows no other kind."""
        flag = getattr(self.api.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        return builder.create_network(0 if flag is None else 1 << int(flag))

    def set_compute_capabilities(self, config: Any, sms: tuple[int, ...]) -> None:
        """Build for these compute capabilities (86 for 8.6) instead of the present device's.

        Raises:
            EngineError: this TensorRT does not know one of them.
        """
        if not self.builds_anywhere:
            return
        known = self.api.ComputeCapability.__members__
        for sm in sms:
            if f"SM{sm}" not in known:
                names = ", ".join(name for name in known if name.startswith("SM"))
                raise EngineError(f"TensorRT for RTX {self.version} does not build for SM{sm}, only for {names}")
        config.num_compute_capabilities = len(sms)
        for index, sm in enumerate(sms):
            config.set_compute_capability(known[f"SM{sm}"], index)

    def use_timing_cache(self, config: Any, path: Path | None) -> None:
        """Start from the timings of an earlier build; TensorRT for RTX measures none."""
        if self.builds_anywhere:
            return
        data = path.read_bytes() if path and path.is_file() else b""
        cache = config.create_timing_cache(data) or config.create_timing_cache(b"")
        if cache:
            config.set_timing_cache(cache, True)

    def timing_cache(self, config: Any) -> bytes:
        """The timings after a build, b"" where there are none."""
        cache = None if self.builds_anywhere else config.get_timing_cache()
        return bytes(cache.serialize()) if cache else b""

    def new_cache(self, engine: Any, data: bytes) -> Any:
        """TensorRT for RTX compiles kernels on the device: its cache of them, from `cache_bytes` of an earlier one.

        Data of another device or version are refused by the library, and the cache starts empty. None for TensorRT.
        """
        if not self.builds_anywhere:
            return None
        cache = engine.create_runtime_config().create_runtime_cache()
        if data:
            cache.deserialize(data)
        return cache

    @staticmethod
    def cache_bytes(cache: Any) -> bytes:
        """What to keep of a cache for the next start."""
        data = None if cache is None else cache.serialize()
        return b"" if data is None else bytes(data)

    def context(self, engine: Any, cache: Any, repeats: bool) -> Any:
        """An execution context without memory of its own; None where the library fails.

        `repeats`: the same shapes come again and again, so TensorRT for RTX keeps a CUDA graph of them.
        """
        owned = self.api.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self.builds_anywhere:
            return engine.create_execution_context(owned)
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(owned)
        if cache is not None:
            config.set_runtime_cache(cache)
        if repeats:
            config.cuda_graph_strategy = self.api.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        return engine.create_execution_context(config)

    @property
    def captures_itself(self) -> bool:
        """Whether the library makes CUDA graphs of repeated shapes; otherwise the caller captures them."""
        return self.builds_anywhere

    @staticmethod
    def context_bytes(engine: Any) -> int:
        """Device memory that any context of this engine needs."""
        size = getattr(engine, "device_memory_size_v2", None)
        return int(engine.device_memory_size if size is None else size)


def load_flavour(name: str) -> Flavour:
    """Import a TensorRT.

    Raises:
        EngineError: it is not installed, cannot be loaded, or is too old for the graphs.
    """
    try:
        api: Any = importlib.import_module(name)
    except ImportError as error:
        raise EngineError(f"{name} cannot be imported ({error}): {_INSTALL[name]}") from None
    except OSError as error:  # the shared library is missing or does not fit
        raise EngineError(f"{name} cannot be loaded ({error}): {_INSTALL[name]}") from None
    if _numbers(str(api.__version__)) < _OLDEST[name]:
        wanted = ".".join(map(str, _OLDEST[name]))
        raise EngineError(f"{name} {api.__version__} is too old for these graphs, {wanted} is needed: {_INSTALL[name]}")
    return Flavour(name, api, make_log(api))


def _numbers(version: str) -> tuple[int, ...]:
    """Major and minor."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def make_log(api: Any) -> Any:
    """A logger that keeps what goes wrong: `.errors` and `.warnings`, lists of lines."""

    class Log(api.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            api.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if _NO_DRIVER in message:
                return
            if severity in (api.ILogger.ERROR, api.ILogger.INTERNAL_ERROR):
                self.errors.append(" ".join(message.split()))
            elif severity == api.ILogger.WARNING:
                self.warnings.append(" ".join(message.split()))

    return Log()


def last_error(log: Any) -> str:
    """The last complaint, for a message of one line."""
    return str(log.errors[-1])[:300] if log.errors else "TensorRT gives no reason"
