"""Error messages for missing packages of the optional extras, with the command that installs them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from .errors import EdgeError

# Extra -> modules that it installs, one for each package that is imported. `export` is in `quantize` too.
_EXPORT = ("ml_dtypes", "onnx", "onnx_ir", "google.protobuf", "sentencepiece")
_MODULES = {
    "cpu": ("onnxruntime",),
    "gpu": ("onnxruntime",),
    "openvino": ("onnxruntime", "openvino"),
    "hub": ("huggingface_hub",),
    "export": _EXPORT,
    "fleet": ("ray", "pyarrow"),
    "quantize": (*_EXPORT, "torch"),
    "parquet": ("pyarrow",),
    "serve": ("starlette", "uvicorn", "prometheus_client", "anyio", "h11"),
    "report": ("jinja2", "matplotlib"),
    "structured": ("llguidance",),
    "synthetic": ("fontpkg_arimo", "cvttf_NotoSansCJK_Medium"),
    "video": ("av",),
}


def require_extras(what: str, *extras: str, advice: str = "") -> None:
    """Check that all packages of some extras are installed, without importing them, before any work starts.

    Args:
        what: what needs the packages, such as "quantize".
        extras: names of extras of internvl-edge.
        advice: what else the user can do, such as "or give --data".

    Raises:
        EdgeError: the message names every package that is missing, and the one command that installs all of them.
    """
    missing = {extra: absent for extra in extras if (absent := missing_modules(extra))}
    if missing:
        packages = list(dict.fromkeys(module for absent in missing.values() for module in absent))
        some = f"the package{'s' if len(packages) > 1 else ''} {', '.join(packages)}"
        raise EdgeError(f"{what} needs {some}: {install(','.join(missing))}{f', {advice}' if advice else ''}")


def missing_modules(extra: str) -> list[str]:
    """Return the modules of an extra that are not installed."""
    return [module for module in _MODULES[extra] if not _is_installed(module)]


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # the package around it is missing, or was made unimportable
        return False


@contextmanager
def requires(extra: str, what: str, error: type[EdgeError] = EdgeError, advice: str = "") -> Iterator[None]:
    """Turn a failed import of an optional package inside the block into an error of one line.

    Args:
        extra: the extra of internvl-edge with the packages, such as "export", or several: "cpu,export".
        what: what needs the packages, such as "export" or "reading a checkpoint".
        error: the class of the error to raise.
        advice: what else the user can do, such as "or give a bundle".

    Raises:
        EdgeError: of the class `error`; the message names the package and the command that installs it.
    """
    try:
        yield
    except ImportError as missing:
        raise error(missing_package(missing, extra, what, advice)) from None


def missing_package(missing: ImportError, extra: str, what: str, advice: str = "") -> str:
    """Return the message of `requires`, for callers to whom a missing package is no error.

    If an installed package cannot be imported (a system library is missing, for example), the message includes the
    reason from the import.
    """
    broken = not isinstance(missing, ModuleNotFoundError)
    found = f"{what} needs the package {missing.name or 'that failed to import'}{f' ({missing})' if broken else ''}"
    return f"{found}: {install(extra)}{f', {advice}' if advice else ''}"


def install(extra: str) -> str:
    """Return the command that installs an extra, or several: "cpu,export"."""
    return f"pip install 'internvl-edge[{extra}]'"
