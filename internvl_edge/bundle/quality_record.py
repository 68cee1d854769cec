"""Read, write and check the quality that a bundle's manifest records.

Figures belong to the files that were measured. If the bundle has other files, the figures do not count.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from internvl_edge.base.errors import BundleError, EdgeError
from internvl_edge.base.text import command_line

from .bundle import Bundle
from .manifest import Manifest
from .quality import Quality


def quality_of(manifest: Manifest) -> Quality:
    """Return the recorded quality of the bundle with this manifest.

    The quality is empty, as if the bundle was never measured, where the figures belong to other files or cannot be
    read. They may be of a newer version, and a bundle must not fail to load for that reason.
    """
    quality = manifest.quality
    return quality if quality and quality.files == manifest.fingerprint else Quality(manifest.fingerprint)


def record_quality(folder: Path, quality: Quality) -> None:
    """Write the quality into the bundle's manifest in one step.

    Raises:
        BundleError: the bundle's files differ from those that were measured, or the manifest cannot be written.
    """
    manifest = Manifest.read(folder)
    if manifest.fingerprint != quality.files:
        raise BundleError(f"{folder} was changed while it was evaluated; the figures were not recorded, evaluate again")
    try:
        replace(manifest, quality=quality).write(folder)
    except OSError as error:
        raise BundleError(
            f"the figures cannot be written into {folder} ({error.strerror}); make it writable, or pass --no-record"
        ) from None


def accept_quality(folder: Path, reason: str) -> Quality:
    """Put into the manifest why the bundle is used although its gate failed or is missing.

    Raises:
        EdgeError: the folder is no bundle, there is no reason, or the manifest cannot be written.
    """
    quality = replace(quality_of(Bundle.open(folder).manifest), accepted=reason.strip())
    if not quality.accepted:
        raise EdgeError("--accept needs a reason; it is kept in the bundle for whoever uses it next")
    record_quality(folder, quality)
    return quality


def quality_warning(folder: Path, manifest: Manifest) -> str | None:
    """Return one line that says that the bundle failed its gate; None if it did not fail, or if it was accepted."""
    quality = quality_of(manifest)
    if quality.accepted or not quality.failed:
        return None
    failed = "; ".join(map(str, quality.failed))
    return (
        f"{folder} failed its quality gate: {failed}; use another bundle, or accept it: "
        f"{command_line('evaluate', folder, '--accept', 'REASON')}"
    )
