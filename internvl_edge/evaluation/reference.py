"""The reference of a comparison as a bundle: one that is there, or a checkpoint exported for the occasion."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from internvl_edge.base.extras import requires
from internvl_edge.base.folders import scratch_folder
from internvl_edge.base.progress import SILENT, Progress
from internvl_edge.bundle.hub import bundle_description, resolve_bundle
from internvl_edge.checkpoint.hub import resolve_checkpoint

# Phases of the progress that the export of a checkpoint shows.
REFERENCE_PHASES = 2


@contextmanager
def reference_bundle(reference: str, progress: Progress = SILENT, revision: str | None = None) -> Iterator[Path]:
    """The folder of a bundle that says what the reference says.

    Both may be a folder or a hub id, in one of its revisions. A checkpoint becomes a temporary bundle of exact float32
    weights, removed at the end.

    Raises:
        EdgeError: neither a bundle nor a usable checkpoint, or the exporter's packages are missing.
    """
    if bundle_description(reference, revision):
        yield resolve_bundle(reference, revision)
        return
    checkpoint = resolve_checkpoint(reference, revision)
    with requires("export", "a checkpoint as reference, which is exported first,", advice="or give a bundle"):
        from internvl_edge.export import export_bundle
    with scratch_folder("reference") as folder:
        yield export_bundle(checkpoint, folder / "bundle", "float32", progress=progress)
