"""The files that belong to a bundle or to a folder of engines in it: what may go when it is replaced."""

from __future__ import annotations

import json
from pathlib import Path

from internvl_edge.base.errors import EdgeError

from .manifest import Manifest
from .names import ENGINE_RECORD, ENGINES, MANIFEST, RUNTIME_CACHES


def bundle_files(folder: Path) -> set[str]:
    """A bundle's own files, relative to it, those of its engines included.

    Raises:
        EdgeError: the folder does not read as a bundle, or one of its folders of engines as such.
    """
    own = {MANIFEST, f"{ENGINES}/", *Manifest.read(folder).files}
    for record in folder.glob(f"{ENGINES}/*/{ENGINE_RECORD}"):
        name = record.parent.name
        own |= {f"{ENGINES}/{name}/{file}" for file in engine_files(record.parent)}
    return own


def engine_files(folder: Path) -> set[str]:
    """The own files of one folder of engines, whatever state they are in.

    Raises:
        EdgeError: there is no record in it, or one that cannot be read.
    """
    path = folder / ENGINE_RECORD
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["files"]
        return {ENGINE_RECORD, *RUNTIME_CACHES.values(), *listed}
    except FileNotFoundError:
        raise EdgeError(f"{folder} is no folder of engines: no {ENGINE_RECORD} in it") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EdgeError(f"{path} is damaged ({error})") from None
