"""The differences between `tensorrt` (JetPack, 10.3 to 11.x) and `tensorrt_rtx`. Other modules use what both share.

This module knows their Python interfaces. It does not know a bundle or a model.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from internvl_edge.base.errors import EngineError
from internvl_edge.base.extras import install
from internvl_edge.planning.versions import COMPILER_SETTINGS, Version, compiler_settings, has_new_layers, numbers

_OLDEST = {"tensorrt": (10, 3), "tensorrt_rtx": (1, 7)}
_INSTALL = {
    "tensorrt": "it comes with JetPack 6.2 or newer (make the environment with --system-site-packages)",
    "tensorrt_rtx": install("rtx"),
}
# A message that the library repeats during a build without a GPU driver. The build does not need a driver.
_NO_DRIVER = "CUDA driver version is insufficient"


@dataclass(frozen=True)
class Flavour:
    """One installed TensorRT. `api` is its Python module, and `log` collects its messages."""

    name: str
    api: Any
    log: Any

    @property
    def version(self) -> str:
        """The version as the library gives it, such as "10.16.1.11"."""
        return str(self.api.__version__)

    @property
    def builds_anywhere(self) -> bool:
        """Whether it builds engines for other devices than the present one, and on machines without a GPU."""
        return self.name == "tensorrt_rtx"

    @property
    def has_attention(self) -> bool:
        """Whether it has layers for attention, rotary embedding and the KV cache. If not, graphs are decomposed."""
        return has_new_layers(self.name, self.release)

    @property
    def release(self) -> Version:
        """Major and minor version."""
        return numbers(self.version)

    def network(self, builder: Any) -> Any:
        """Return an empty, strongly typed network: its types are those of the graph. Version 11 has no other kind."""
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
        """Use the timings of an earlier build. TensorRT for RTX does not measure timings."""
        if self.builds_anywhere:
            return
        data = path.read_bytes() if path and path.is_file() else b""
        cache = config.create_timing_cache(data) or config.create_timing_cache(b"")
        if cache:
            config.set_timing_cache(cache, True)

    def timing_cache(self, config: Any) -> bytes:
        """Return the timings after a build, b"" where there are none."""
        cache = None if self.builds_anywhere else config.get_timing_cache()
        return bytes(cache.serialize()) if cache else b""

    def new_cache(self, engine: Any, data: bytes) -> Any:
        """Return the kernel cache of TensorRT for RTX, which compiles kernels on the device; None for TensorRT.

        `data` is `cache_bytes` of an earlier cache. The library refuses data of another device or version, and the
        cache then starts empty.
        """
        if not self.builds_anywhere:
            return None
        cache = engine.create_runtime_config().create_runtime_cache()
        if data:
            cache.deserialize(data)
        return cache

    @staticmethod
    def cache_bytes(cache: Any) -> bytes:
        """Return the bytes of a kernel cache, to be saved for the next start."""
        data = None if cache is None else cache.serialize()
        return b"" if data is None else bytes(data)

    def context(self, engine: Any, cache: Any, repeats: bool, eager: bool = False) -> Any:
        """Return an execution context without its own memory, or None where the library fails.

        `repeats` says that the same shapes occur many times. TensorRT for RTX then keeps a CUDA graph of them. With
        `eager`, it compiles the kernels of a new shape before it runs it; without, it compiles them in the background
        and uses slower kernels for any shape meanwhile.
        """
        owned = self.api.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self.builds_anywhere:
            return engine.create_execution_context(owned)
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(owned)
        if cache is not None:
            config.set_runtime_cache(cache)
        strategies = self.api.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER if eager else strategies.LAZY
        if repeats:
            config.cuda_graph_strategy = self.api.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        return engine.create_execution_context(config)

    @property
    def captures_itself(self) -> bool:
        """Whether the library captures CUDA graphs itself. Otherwise the caller captures them."""
        return self.builds_anywhere

    @staticmethod
    def context_bytes(engine: Any) -> int:
        """Return the bytes of device memory that each execution context of this engine needs."""
        size = getattr(engine, "device_memory_size_v2", None)
        return int(engine.device_memory_size if size is None else size)


def load_flavour(name: str) -> Flavour:
    """Import a TensorRT by the name of its module.

    The settings that avoid its known miscompilations are in the environment before it is loaded.

    Raises:
        EngineError: it is not installed, cannot be loaded, or is too old for the graphs.
    """
    if installed := _installed_version(name):
        avoid_miscompilations(name, numbers(installed))
    try:
        api: Any = importlib.import_module(name)
    except ImportError as error:
        raise EngineError(f"{name} cannot be imported ({error}): {_INSTALL[name]}") from None
    except OSError as error:  # the shared library is missing or cannot be loaded here
        raise EngineError(f"{name} cannot be loaded ({error}): {_INSTALL[name]}") from None
    avoid_miscompilations(name, numbers(str(api.__version__)))  # where the version was not known before
    if numbers(str(api.__version__)) < _OLDEST[name]:
        wanted = ".".join(map(str, _OLDEST[name]))
        raise EngineError(f"{name} {api.__version__} is too old for these graphs, {wanted} is needed: {_INSTALL[name]}")
    return Flavour(name, api, make_log(api))


def avoid_miscompilations(name: str, version: Version) -> None:
    """Add the settings for a version's known miscompilations to the environment. Settings of the user stay."""
    _add_settings(compiler_settings(name, version))


def _add_settings(wanted: tuple[str, ...]) -> None:
    settings = os.environ.get(COMPILER_SETTINGS, "").split()
    chosen = {setting.partition("=")[0] for setting in settings}
    if added := [setting for setting in wanted if setting.partition("=")[0] not in chosen]:
        os.environ[COMPILER_SETTINGS] = " ".join([*settings, *added])


@contextlib.contextmanager
def compiler(settings: tuple[str, ...]) -> Iterator[None]:
    """Add settings to the environment, which the compiler reads when a build starts, and remove them on exit."""
    before = os.environ.get(COMPILER_SETTINGS)
    _add_settings(settings)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(COMPILER_SETTINGS, None)
        else:
            os.environ[COMPILER_SETTINGS] = before


def _installed_version(module: str) -> str | None:
    """Return the version of the installed package that holds a module, None where no package names it."""
    for package in metadata.packages_distributions().get(module, []):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(package)
    return None


def make_log(api: Any) -> Any:
    """Return a logger that collects messages in `.errors` and `.warnings`, which are lists of lines."""

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
    """Return the last error message, at most 300 characters."""
    return str(log.errors[-1])[:300] if log.errors else "TensorRT gives no reason"
