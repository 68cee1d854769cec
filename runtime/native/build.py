"""Compile the native operators with the C++ compiler of this machine.

The library is one file in the user's cache. Its name is a hash of the sources, the flags and the kind of machine, so
that a new version of any of them is another file. It holds the kernels of all levels of CPU features that the compiler
knows, and chooses among them when it is loaded: one file serves all machines of one kind.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from internvl_edge.base.errors import EdgeError, EngineError
from internvl_edge.base.files import replacing
from internvl_edge.base.locks import only_writer
from internvl_edge.base.machine import cores
from internvl_edge.base.text import one_line
from internvl_edge.base.user_folders import cache_folder

FOLDER = "native"
RETRY = "internvl-edge native tries again"
_SOURCES = Path(__file__).parent
_COMPILERS = ("g++", "clang++", "c++")
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma")
# The flags of each level by machine, from the plainest to the best. `operators.cpp` says which CPU has which level.
LEVELS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "baseline": (),
        "avx2": ("-mavx2", "-mfma"),
        "avx512": _AVX512,
        "avx512_bf16": (*_AVX512, "-mavx512bf16"),
    },
    "aarch64": {"baseline": (), "neon_bf16": ("-march=armv8.2-a+bf16",)},
}
# A compilation takes seconds; a compiler that hangs must not keep a server from starting.
_PATIENCE = 120.0
_SELF_TEST_PATIENCE = 60.0
_WAIT = 0.1


class NativeError(EngineError):
    """The native operators cannot be used; the message is the reason. Graphs then keep their own."""


def machine_kind() -> str:
    """Return the key of this machine in LEVELS.

    Raises:
        NativeError: there are no kernels for it.
    """
    system, machine = platform.system(), platform.machine().lower()
    kind = {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)
    if system not in ("Linux", "Darwin") or kind not in LEVELS:
        raise NativeError(f"there are no native kernels for {system} on {machine}")
    return kind


def find_compiler() -> list[str]:
    """Return the command of the C++ compiler: CXX, or the first of g++, clang++ and c++.

    Raises:
        NativeError: there is none.
    """
    given = shlex.split(os.environ.get("CXX", ""))
    found = next(filter(None, map(shutil.which, given[:1] or _COMPILERS)), None)
    if found is None:
        raise NativeError("no C++ compiler was found (g++ or clang++)")
    return [found, *given[1:]]


def cached_library() -> Path:
    """Return the file of the library in the user's cache, whether or not it exists.

    Raises:
        NativeError: there are no kernels for this machine, or the user has no cache folder.
    """
    kind, folder = machine_kind(), cache_folder()
    if folder is None:
        raise NativeError("there is no cache folder for the library; set XDG_CACHE_HOME")
    digest = hashlib.sha256(repr((kind, platform.system(), _FLAGS, LEVELS[kind])).encode())
    for path in _sources():
        digest.update(path.read_bytes())
    return folder / FOLDER / f"{digest.hexdigest()[:20]}.so"


def ensure_library(again: bool = False) -> Path:
    """Return the library in the user's cache, and build it first where it is missing. One process builds at a time.

    A failure is recorded beside it, so that later starts do not repeat it.

    Args:
        again: build it also where it exists or has failed before.

    Raises:
        NativeError: it cannot be built, fails its self-test, or could have been written by another user.
    """
    library = cached_library()
    failure = library.with_suffix(".failed")
    try:
        library.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        while again or not library.exists():
            if not again and failure.exists():
                raise NativeError(f"{failure.read_text(encoding='utf-8')}; {RETRY}")
            find_compiler()
            try:
                with only_writer(library, "try again later"):
                    if again or not (library.exists() or failure.exists()):
                        failure.unlink(missing_ok=True)
                        _build_or_record(library, failure)
                        again = False
            except NativeError:
                raise
            except EdgeError:  # another process, or thread, builds it
                time.sleep(_WAIT)
        require_own(library)
    except OSError as error:
        raise NativeError(f"the cache folder {library.parent} cannot be used ({error.strerror or error})") from None
    return library


def require_own(library: Path) -> None:
    """Raise NativeError where another user could have written a library, or have replaced it.

    Raises:
        OSError: it cannot be read.
    """
    for path in (library, library.parent):
        found = path.stat()
        if hasattr(os, "getuid") and found.st_uid not in (0, os.getuid()):
            raise NativeError(f"{path} belongs to another user")
        if found.st_mode & stat.S_IWOTH:
            raise NativeError(f"{path} can be written by every user")


def build(library: Path) -> tuple[str, ...]:
    """Compile the library to a file, which appears whole or not at all; return the levels that the compiler knows.

    Raises:
        NativeError: there is no compiler, or it fails.
        OSError: the file cannot be written.
    """
    compiler, levels = find_compiler(), LEVELS[machine_kind()]
    with tempfile.TemporaryDirectory(prefix="internvl-edge-") as scratch, replacing(library) as target:

        def compile_level(name: str) -> str | None:
            """Compile the kernels of a level; return what the compiler says where it fails."""
            level = [*levels[name], f"-DINTERNVL_EDGE_LEVEL={name}"]
            output = Path(scratch, f"{name}.o")
            return _run([*compiler, *_FLAGS, *level, "-c", str(_SOURCES / "kernels.cpp"), "-o", str(output)])

        with ThreadPoolExecutor(cores()) as pool:
            errors = dict(zip(levels, pool.map(compile_level, levels), strict=True))
        if errors["baseline"] is not None:
            raise NativeError(f"the compiler fails: {errors['baseline']}")
        known = tuple(name for name in levels if errors[name] is None)
        table = f"-DINTERNVL_EDGE_LEVELS(each)={' '.join(f'each({name})' for name in known)}"
        objects = [str(Path(scratch, f"{name}.o")) for name in known]
        error = _run(
            [*compiler, *_FLAGS, table, "-shared", str(_SOURCES / "operators.cpp"), *objects, "-o", str(target)]
        )
        if error is not None:
            raise NativeError(f"the compiler fails: {error}")
        target.chmod(0o755)
    return known


def _build_or_record(library: Path, failure: Path) -> None:
    """Build the library and test it in a process of its own, which a fault may end; record why it cannot be used."""
    candidate = library.with_suffix(".new.so")
    try:
        build(candidate)
        command = [sys.executable, "-m", f"{__package__}.self_test", str(candidate)]
        error = _run(command, _SELF_TEST_PATIENCE, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
        if error is not None:
            raise NativeError(f"the library fails its self-test: {error}")
        candidate.replace(library)
    except NativeError as error:
        failure.write_text(str(error), encoding="utf-8")
        raise
    finally:
        candidate.unlink(missing_ok=True)


def _run(command: list[str], patience: float = _PATIENCE, **environment: str) -> str | None:
    """Run a program; return the first line of an error that it prints, or what ended it, and None where it succeeds."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=patience, env=os.environ | environment
        )
    except subprocess.TimeoutExpired:
        return f"no end after {patience:.0f} s"
    except OSError as error:
        return f"{command[0]}: {error.strerror or error}"
    if done.returncode == 0:
        return None
    said = [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines()[-1:]
    return one_line(said[0])[:200] if said else f"{Path(command[0]).name} ended with status {done.returncode}"


def _sources() -> list[Path]:
    return sorted(path for path in _SOURCES.iterdir() if path.suffix in (".cpp", ".h"))
