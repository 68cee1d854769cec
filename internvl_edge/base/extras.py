"""Error messages for missing packages of the optional extras, with the command that installs them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .errors import EdgeError


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
