"""What to install when a package of one of the optional extras is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .errors import EdgeError


@contextmanager
def requires(extra: str, what: str, error: type[EdgeError] = EdgeError, advice: str = "") -> Iterator[None]:
    """Around imports of optional packages: a missing one becomes one line.

    Args:
        extra: the extra of internvl-edge that has the packages: "export", or several: "cpu,export".
        what: what cannot be done without them: "export", "reading a checkpoint".
        error: the kind of error to raise.
        advice: what else can be done, such as "or give a bundle".

    Raises:
        EdgeError: of the kind `error`; names the package, and the command that installs it.
    """
    try:
        yield
    except ImportError as missing:
        raise error(missing_package(missing, extra, what, advice)) from None


def missing_package(missing: ImportError, extra: str, what: str, advice: str = "") -> str:
    """The line of `requires`, where a missing package is no error.

    A package that is there and cannot be imported (a library of the system is missing) says so in its own words.
    """
    broken = not isinstance(missing, ModuleNotFoundError)
    found = f"{what} needs the package {missing.name or 'that failed to import'}{f' ({missing})' if broken else ''}"
    return f"{found}: {install(extra)}{f', {advice}' if advice else ''}"


def install(extra: str) -> str:
    """The command that installs an extra, or several: "cpu,export"."""
    return f"pip install 'internvl-edge[{extra}]'"
