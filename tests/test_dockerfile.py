"""The Dockerfile without Docker: its commands, its stages, and the wheel that its first stage builds."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from helpers.repository import REPOSITORY

TEXT = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")
COMMENTS = re.sub(r"\\\n#\s+", "", "\n".join(line for line in TEXT.splitlines() if line.startswith("#")))
BUILDS = [line.strip("# ") for line in COMMENTS.splitlines() if "docker build -t" in line]
RUNS = [line.strip("# ") for line in COMMENTS.splitlines() if "docker run" in line]
FINAL = TEXT.rpartition("\nFROM ")[2]


def test_each_build_is_a_command_of_its_own() -> None:
    assert len(BUILDS) == 4
    for command in BUILDS:
        assert command.count("BASE=") <= 1
        assert command.endswith(" .")
    assert sum("EXTRA=jetson" in command for command in BUILDS) == 2


def test_each_run_is_that_of_its_user_with_a_cache() -> None:
    assert len(RUNS) == 3
    for command in RUNS:
        assert '--user "$(id -u):$(id -g)" -v internvl-edge-cache:/cache -v "$PWD:/data"' in command


def test_any_user_may_write_home_and_cache() -> None:
    assert "chmod 1777 /home/edge /cache" in FINAL
    assert "ENV HOME=/home/edge USER=edge XDG_CACHE_HOME=/cache HF_HOME=/cache/huggingface" in FINAL
    assert "\nUSER 10001\n" in FINAL


def test_the_wheel_is_in_no_layer_of_the_image() -> None:
    assert "RUN --mount=type=bind,from=wheel,source=/dist,target=/dist" in FINAL
    assert not re.search(r"^(COPY|ADD) ", FINAL, re.MULTILINE)


def test_a_command_line_has_no_health() -> None:
    assert "HEALTHCHECK" not in TEXT


@pytest.mark.parametrize("label", ["title", "description", "source", "documentation", "licenses"])
def test_the_image_is_labelled(label: str) -> None:
    assert re.search(rf'org\.opencontainers\.image\.{label}="[^"]+"', FINAL)


def test_no_digest_is_made_up() -> None:
    """Base images are arguments; the way to pin them is written down, and no digest that nobody looked up."""
    assert set(re.findall(r"^FROM (\S+)", TEXT, re.MULTILINE)) == {"${BUILDER}", "${BASE}"}
    assert "docker buildx imagetools inspect" in COMMENTS
    assert not re.search(r"sha256:[0-9a-f]", TEXT)


def test_the_context_is_enough_for_the_wheel(tmp_path: Path) -> None:
    context = tmp_path / "context"
    context.mkdir()
    for line in (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if line.startswith("!"):
            source = REPOSITORY / line[1:]
            if source.is_dir():
                shutil.copytree(source, context / line[1:], symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, context)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", tmp_path, context], check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("internvl_edge-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    package = REPOSITORY / "internvl_edge"
    rooms = [package, *(path for path in package.iterdir() if path.is_symlink())]
    modules = {
        f"internvl_edge/{'' if room == package else room.name + '/'}{path.relative_to(room).as_posix()}"
        for room in rooms
        for path in room.rglob("*.py")
    }
    assert len(modules) > 150
    assert modules <= names
