"""The build backend: setuptools, after a check of the symbolic links in `internvl_edge/`.

These links make four top-level folders part of the package. Without `core.symlinks`, Git on Windows writes a text file
in place of a link. setuptools would then build a wheel without these folders, and report no error.
"""

from pathlib import Path

from setuptools.build_meta import *  # noqa: F403

_LINKS = ("calibration", "export", "quantize", "runtime")

for _link in _LINKS:
    if not (Path(__file__).parent / "internvl_edge" / _link).is_dir():
        raise SystemExit(
            f"internvl_edge/{_link} is no link to {_link}/: this checkout has no symbolic links, a wheel would be "
            "incomplete; run 'git config core.symlinks true' and 'git checkout -- internvl_edge', then build again"
        )
