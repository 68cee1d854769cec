"""The floors of pyproject.toml are those of docs/dependencies.md, and constraints.txt is a lock that works anywhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from helpers.repository import REPOSITORY
from internvl_edge.base.toml import parse

PYPROJECT: dict[str, Any] = parse((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"), "pyproject.toml")
CONSTRAINTS = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
MAKEFILE = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
_FONTS = ("cvttf-", "fontpkg-")
# Releases with published advisories, and one for each branch that was repaired in several.
VULNERABLE = {
    "click": ("8.3.2",),
    "jinja2": ("3.1.5",),
    "onnx": ("1.20.1", "1.21.0"),
    "pillow": ("11.3.0", "12.1.1", "12.2.0"),
    "protobuf": ("4.25.7", "4.25.8", "5.29.4", "5.29.5", "6.31.0", "6.33.4"),
    "pyarrow": ("14.0.0", "23.0.0"),
    "pytest": ("9.0.2",),
    "requests": ("2.32.5",),
    "sentencepiece": ("0.2.0",),
    "setuptools": ("78.1.0", "82.0.0"),
    "torch": ("2.5.1", "2.9.1", "2.10.0", "2.12.1"),
    "transformers": ("4.57.6", "5.2.0", "5.9.0"),
}


def _requirements() -> Iterator[Requirement]:
    """Every requirement of the package, of building it and of developing it; without its own extras and the fonts."""
    project = PYPROJECT["project"]
    lists = [
        PYPROJECT["build-system"]["requires"],
        project["dependencies"],
        *project["optional-dependencies"].values(),
        *PYPROJECT["dependency-groups"].values(),
    ]
    for text in (text for lines in lists for text in lines):
        requirement = Requirement(text)
        if requirement.name != "internvl-edge" and not requirement.name.startswith(_FONTS):
            yield requirement


def _floor(requirement: Requirement) -> Version:
    (floor,) = [
        Version(part.version) for part in requirement.specifier if part.operator in (">=", "==") and part.version
    ]
    return floor


def _table() -> dict[str, tuple[Version, Version | None]]:
    """Package -> its floor and the first release without advisories, as docs/dependencies.md has them."""
    text = (REPOSITORY / "docs" / "dependencies.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([a-z0-9-]+) \| ([\d.]+) \| ([\d.]+|-) \|", text, re.MULTILINE)
    return {name: (Version(floor), None if first == "-" else Version(first)) for name, floor, first in rows}


def test_each_floor_is_the_one_that_the_docs_give_a_reason_for() -> None:
    table = _table()
    found: dict[str, list[Version]] = {}
    for requirement in _requirements():
        found.setdefault(canonicalize_name(requirement.name), []).append(_floor(requirement))
    assert {name: min(floors) for name, floors in found.items()} == {name: floor for name, (floor, _) in table.items()}


def test_no_floor_is_below_the_first_release_without_advisories() -> None:
    table = _table()
    below = [str(r) for r in _requirements() if (first := table[canonicalize_name(r.name)][1]) and _floor(r) < first]
    assert below == []


@pytest.mark.parametrize("name", VULNERABLE)
def test_no_release_with_an_advisory_is_accepted(name: str) -> None:
    requirements = [requirement for requirement in _requirements() if canonicalize_name(requirement.name) == name]
    assert requirements
    accepted = [
        (str(r), version) for r in requirements for version in VULNERABLE[name] if r.specifier.contains(version)
    ]
    assert accepted == []


@pytest.mark.parametrize("extra", ["quantize", "bin", "autoawq", "optimum"])
def test_an_extra_that_brings_torch_has_its_floor(extra: str) -> None:
    """What a library requires of torch and transformers is less than what is safe."""
    requirements = {Requirement(text).name for text in PYPROJECT["project"]["optional-dependencies"][extra]}
    assert "torch" in requirements
    assert "transformers" in requirements or not requirements & {"autoawq", "optimum"}


def test_the_lock_names_versions_alone() -> None:
    """It has no index, no local path, no build such as +cpu: it must work with any index and on any system."""
    lines = [line for line in CONSTRAINTS if not line.startswith("#")]
    assert len(lines) > 50
    strange = [line for line in lines if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*==[0-9][0-9a-z.]*( ; [^@:/]+)?", line)]
    assert strange == []
    assert not re.search(r"https?:|file:|/", "\n".join(CONSTRAINTS))


def test_the_lock_holds_one_accepted_version_of_everything_that_the_checks_install() -> None:
    extras = re.search(r"^EXTRAS := (\S+)$", MAKEFILE, re.MULTILINE)
    assert extras is not None
    project = PYPROJECT["project"]
    wanted = [*project["dependencies"], *PYPROJECT["dependency-groups"]["dev"]]
    for extra in extras[1].split(","):
        wanted += project["optional-dependencies"][extra]
    locked: dict[str, list[Requirement]] = {}
    for line in CONSTRAINTS:
        if not line.startswith("#"):
            locked.setdefault(Requirement(line).name, []).append(Requirement(line))
    for minor in (11, 12, 13):
        here = {"python_version": f"3.{minor}", "python_full_version": f"3.{minor}.0", "sys_platform": "linux"}
        for requirement in map(Requirement, wanted):
            applies = requirement.marker is None or requirement.marker.evaluate(here)
            if requirement.name == "internvl-edge" or not applies:
                continue
            chosen = [
                _floor(line)
                for line in locked[canonicalize_name(requirement.name)]
                if line.marker is None or line.marker.evaluate(here)
            ]
            assert len(chosen) == 1, requirement
            assert requirement.specifier.contains(chosen[0]), requirement


def test_every_installation_of_the_checks_uses_the_lock() -> None:
    checks = MAKEFILE + (REPOSITORY / ".ci" / "check_install").read_text(encoding="utf-8")
    whole = [line for line in checks.splitlines() if 'pip" install' in line or "pip install" in line]
    open_ended = [line for line in whole if "[" in line and "--constraint constraints.txt" not in line]
    assert whole
    assert open_ended == []
