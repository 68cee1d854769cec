"""Change manifests by hand, with a digest that fits again, as another version of the program would write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from internvl_edge.bundle.manifest import DIGEST, manifest_digest
from internvl_edge.bundle.names import MANIFEST


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Let `change` edit the values of a bundle's manifest in place."""
    values = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    change(values)
    content = {name: value for name, value in values.items() if name not in ("format_version", DIGEST)}
    (folder / MANIFEST).write_text(json.dumps(values | {DIGEST: manifest_digest(content)}), encoding="utf-8")
