"""setuptools, behind one check: the links that make the top-level folders part of the package must be links.

Git on Windows writes a text file in place of a symbolic link unless `core.symlinks` is on. setuptools would then build
a wheel without these folders and say nothing.
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
