"""The bundle on one node of a cluster: verified once for all workers there, and fetched where it is not a path.

A bundle at an address ("s3://bucket/bundle", "gs://", "hdfs://", "file://") is copied into the user's cache folder
under the digest of its manifest, so a node fetches it once, whatever asks for it. pyarrow opens the addresses.
"""

from __future__ import annotations

import hashlib
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath

from internvl_edge.base.errors import BundleError, EdgeError
from internvl_edge.base.extras import requires
from internvl_edge.base.folders import new_folder
from internvl_edge.base.locks import only_writer
from internvl_edge.base.text import one_line
from internvl_edge.base.user_folders import cache_folder
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.bundle.manifest import Manifest
from internvl_edge.bundle.names import MANIFEST

from .journal import bundle_digest

_MANIFEST_BYTES = 64 << 20
# Seconds between two looks at a lock that another worker of this node holds.
_LOOK = 0.2


def is_address(source: str) -> bool:
    """Whether a bundle is somewhere else than in a folder."""
    return "://" in source


def node_bundle(source: str, digest: str | None = None) -> Path:
    """Return the verified folder of a bundle on this node.

    Args:
        source: a path on this node, or an address.
        digest: what `bundle_digest` must give; None takes what is there.

    Raises:
        BundleError: it is not there, is damaged, or is another one; the message names the node.
    """
    node = socket.gethostname()
    try:
        if is_address(source):
            return _fetched(source, digest)
        folder = Path(source)
        with _alone(digest or "any"):
            found = bundle_digest(Bundle.open(folder).manifest)
    except BundleError as error:
        raise BundleError(f"on node {node}: {error}") from None
    if digest is not None and found != digest:
        raise BundleError(
            f"on node {node}: {folder} is another bundle ({found[:12]}, not {digest[:12]}); copy it there"
        )
    return folder


def _fetched(source: str, digest: str | None) -> Path:
    """Return the copy of a bundle in the cache folder, which is made where it is missing."""
    cache = cache_folder()
    if cache is None:
        raise BundleError(f"{source} needs a cache folder; set XDG_CACHE_HOME")
    with requires("fleet", f"a bundle at {source}", BundleError):
        from pyarrow import ArrowException, fs
    try:
        files, path = fs.FileSystem.from_uri(source)
        base = PurePosixPath(path)
        data = _content(files, base / MANIFEST)
    except (ArrowException, OSError, ValueError) as error:
        raise BundleError(
            f"{source} cannot be read ({one_line(str(error), 160)}); check the address and its keys"
        ) from None
    found = hashlib.sha256(data).hexdigest()
    folder = cache / "bundles" / found[:32]
    with _alone(found):
        if not (folder / MANIFEST).is_file():
            with new_folder(folder, lambda: None, "try again") as new:
                (new / MANIFEST).write_bytes(data)
                for name in Manifest.read(new).files:
                    (new / name).parent.mkdir(parents=True, exist_ok=True)
                    try:
                        with files.open_input_stream(str(base / name)) as stream, (new / name).open("wb") as file:
                            shutil.copyfileobj(stream, file, 1 << 20)
                    except (ArrowException, OSError) as error:
                        raise BundleError(f"{source}/{name} cannot be read ({one_line(str(error), 160)})") from None
        here = bundle_digest(Bundle.open(folder).manifest)
    if digest is not None and here != digest:
        raise BundleError(
            f"{source} is another bundle now ({here[:12]}, not {digest[:12]}); do not change it under way"
        )
    return folder


def _content(files: object, path: PurePosixPath) -> bytes:
    with files.open_input_stream(str(path)) as stream:  # type: ignore[attr-defined]
        data: bytes = stream.read(_MANIFEST_BYTES)
    return data


@contextmanager
def _alone(digest: str) -> Iterator[None]:
    """Let one worker of this node at a time verify or fetch a bundle; the others find it done."""
    cache = cache_folder()
    if cache is None:
        yield
        return
    target = cache / "bundles" / f"{digest[:32]}.turn"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that cannot be written: each worker verifies for itself
        yield
        return
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(only_writer(target, "wait"))
                break
            except EdgeError:
                time.sleep(_LOOK)
        yield
