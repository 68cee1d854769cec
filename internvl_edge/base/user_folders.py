"""The folders of this user: for what can be computed again, and for settings."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path | None:
    """Return the folder for what can be computed again, or None for a user without a home (in a container)."""
    return _folder("XDG_CACHE_HOME", ".cache")


def config_folder() -> Path | None:
    """Return the folder for settings, or None for a user without a home."""
    return _folder("XDG_CONFIG_HOME", ".config")


def _folder(variable: str, name: str) -> Path | None:
    if given := os.environ.get(variable):
        return Path(given) / "internvl-edge"
    try:
        return Path.home() / name / "internvl-edge"
    except RuntimeError:  # HOME is not set, and the user's number has no name on this machine
        return None
