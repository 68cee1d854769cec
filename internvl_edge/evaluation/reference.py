"""The reference of a comparison as a bundle: one that is there, or a checkpoint exported for the occasion."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from internvl_edge.base.extras import requires
from internvl_edge.bundle.names import MANIFEST
from internvl_edge.checkpoint.hub import resolve_checkpoint


@contextmanager
def reference_bundle(reference: str, progress: bool = False) -> Iterator[Path]:
    """The folder of a bundle that says what the reference says.

    A checkpoint (a folder or a hub id) becomes a temporary bundle of exact float32 weights, removed at the end.

    Raises:
        EdgeError: neither a bundle nor a usable checkpoint, or the exporter's packages are missing.
    """
    if (Path(reference) / MANIFEST).is_file():
        yield Path(reference)
        return
    checkpoint = resolve_checkpoint(reference)
    with requires("export", "a checkpoint as reference, which is exported first,", advice="or give a bundle"):
        from internvl_edge.export import export_bundle
    with tempfile.TemporaryDirectory(prefix="internvl-edge-reference-") as folder:
        yield export_bundle(checkpoint, Path(folder) / "bundle", "float32", progress=progress)
