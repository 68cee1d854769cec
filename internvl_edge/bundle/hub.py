"""Resolve a BUNDLE argument (a folder or a hub id) to a folder. A local folder never causes network access."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from glob import escape
from pathlib import Path

from internvl_edge.base.errors import BundleError
from internvl_edge.base.hub import Kind, download, is_hub_id, local_folder, refuse_revision

from .manifest import Manifest, is_bundle
from .names import ENGINE_RECORD, ENGINES, MANIFEST

BUNDLE = Kind("bundle", MANIFEST, "OWNER/NAME", BundleError)
_EITHER = Kind("checkpoint or bundle", "", "OpenGVLab/InternVL2_5-1B", BundleError)
# What tells a bundle from a checkpoint.
_DESCRIPTION = [MANIFEST, "config.json"]
# (folder with the records of all engines) -> the files of engines, as paths in it, that are to be downloaded too.
Engines = Callable[[Path], Iterable[str]]


def resolve_bundle(name: str | Path, revision: str | None = None, engines: Engines | None = None) -> Path:
    """Return the folder of a bundle. The files that the manifest of a hub id lists are downloaded.

    Nothing is verified here: `Bundle.open` compares every file with the manifest.

    Args:
        name: a folder, or a hub id.
        revision: branch, tag or commit of a hub id; the default is its main branch.
        engines: chooses among TensorRT engines in the repository by their records, `engines/NAME/engine.json`; without
            it, none of them is downloaded.

    Raises:
        BundleError: a revision of a folder, no bundle under this hub id, the download failed, or the extra `hub` is not
            installed. A folder that is no bundle is none of these: whoever opens it says so.
    """
    repo = _text(name)
    if is_bundle(Path(name)) or Path(name).exists() or not is_hub_id(repo):
        refuse_revision(repo, revision, BUNDLE)
        return Path(name)
    local_folder(repo, revision, BUNDLE)
    records = [f"{ENGINES}/*/{ENGINE_RECORD}"] if engines else []
    folder = download(repo, revision, [MANIFEST, *records], BUNDLE, below=True)
    wanted = [*Manifest.read(folder).files, *(engines(folder) if engines else ())]
    folder = download(repo, folder.name, [MANIFEST, *map(escape, wanted)], BUNDLE, below=True)
    for file in wanted:
        if not (folder / file).is_file():
            raise BundleError(
                f"{repo} has no {file} in commit {folder.name}, which its manifest lists, or the cache has not yet; "
                "give another --revision, or repeat with network"
            )
    return folder


def bundle_description(name: str, revision: str | None = None) -> Path | None:
    """Return the folder with the manifest of a bundle, or None where a name is no bundle but perhaps a checkpoint.

    Of a hub id, nothing but manifest or configuration is downloaded.

    Raises:
        BundleError: a revision of a bundle's folder, or the download failed.
    """
    if is_bundle(Path(name)):
        refuse_revision(name, revision, BUNDLE)
        return Path(name)
    if Path(name).exists() or not is_hub_id(name):
        return None
    local_folder(name, revision, _EITHER)
    folder = download(name, revision, _DESCRIPTION, _EITHER)
    return folder if (folder / MANIFEST).is_file() else None


def _text(name: str | Path) -> str:
    return name if isinstance(name, str) else name.as_posix()
