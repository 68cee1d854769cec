"""The Dockerfile without Docker: its commands, its stages, and the wheel that its first stage builds."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from helpers.repository import REPOSITORY
from helpers.stand_in_server import stand_in

TEXT = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")
COMMENTS = re.sub(r"\\\n#\s+", "", "\n".join(line for line in TEXT.splitlines() if line.startswith("#")))
BUILDS = [line.strip("# ") for line in COMMENTS.splitlines() if "docker build -t" in line]
RUNS = [line.strip("# ") for line in COMMENTS.splitlines() if "docker run" in line]
STAGES = {
    (name or "default"): body
    for name, body in re.findall(r"^FROM \S+(?: AS (\w+))?\n(.*?)(?=^FROM |\Z)", TEXT, re.MULTILINE | re.DOTALL)
}
COMMAND, SERVE = STAGES["command"], STAGES["serve"]


def test_each_build_is_a_command_of_its_own() -> None:
    assert len(BUILDS) == 5
    for command in BUILDS:
        assert command.count("BASE=") <= 1
        assert command.endswith(" .")
    assert sum("EXTRA=jetson" in command for command in BUILDS) == 2


def test_each_run_is_that_of_its_user_with_a_cache() -> None:
    assert len(RUNS) == 4
    for command in (run for run in RUNS if "internvl-edge:serve" not in run):
        assert '--user "$(id -u):$(id -g)" -v internvl-edge-cache:/cache -v "$PWD:/data"' in command


def test_any_user_may_write_home_and_cache() -> None:
    assert "chmod 1777 /home/edge /cache" in COMMAND
    assert "ENV HOME=/home/edge USER=edge XDG_CACHE_HOME=/cache HF_HOME=/cache/huggingface" in COMMAND
    assert "\nUSER 10001\n" in COMMAND


def test_the_wheel_is_in_no_layer_of_the_image() -> None:
    assert "RUN --mount=type=bind,from=wheel,source=/dist,target=/dist" in COMMAND
    assert not re.search(r"^(COPY|ADD) ", COMMAND, re.MULTILINE)


def test_a_command_line_has_no_health() -> None:
    assert "HEALTHCHECK" not in COMMAND
    assert STAGES["default"].strip() == "", "what is built without --target is the command line"
    assert list(STAGES)[-1] == "default"


# ---- the server ----


def _health() -> list[str]:
    found = re.search(r"^HEALTHCHECK .*?CMD (\[.*?\])$", SERVE, re.MULTILINE | re.DOTALL)
    assert found is not None
    command: list[str] = json.loads(found[1])
    return command


@pytest.mark.parametrize(("path", "code"), [("/livez", 0), ("/unknown", 1), (None, 1)])
def test_the_health_check_is_that_of_a_live_server(path: str | None, code: int) -> None:
    program, *arguments = _health()
    assert program == "python3"
    assert "/livez" in arguments[-1]
    environment = {"http_proxy": "http://127.0.0.1:9", "PATH": os.environ["PATH"]}
    with stand_in() as server:
        address = f"{server.url}{(path or '/livez')[1:]}" if path is not None else "http://127.0.0.1:9/livez"
        code_text = arguments[-1].replace("http://127.0.0.1:23333/livez", address)
        checked = subprocess.run([sys.executable, "-c", code_text], env=environment, capture_output=True, timeout=60)
    assert (checked.returncode != 0) == code, checked.stderr


def test_the_server_runs_as_nobody_special_and_says_where_it_listens() -> None:
    assert re.findall(r"^USER (\S+)$", SERVE, re.MULTILINE) == ["0", "10001"], "root installs, and serves nothing"
    assert 'ENTRYPOINT ["internvl-edge", "serve"]' in SERVE
    assert 'CMD ["/bundle", "--host", "0.0.0.0"]' in SERVE
    assert "EXPOSE 23333" in SERVE
    assert "--no-auth" not in TEXT
    assert "[serve,structured]" in SERVE
    assert "from=wheel" in SERVE


def test_the_server_of_the_documentation_writes_into_its_cache_alone() -> None:
    (command,) = [run for run in RUNS if "internvl-edge:serve" in run]
    for part in ("--read-only", "--tmpfs /tmp", "internvl-edge-cache:/cache", ":/bundle:ro", "-p 127.0.0.1:23333:"):
        assert part in command


@pytest.mark.parametrize("label", ["title", "description", "source", "documentation", "licenses"])
def test_the_image_is_labeled(label: str) -> None:
    assert re.search(rf'org\.opencontainers\.image\.{label}="[^"]+"', COMMAND)


def test_no_digest_is_made_up() -> None:
    """Base images are arguments; the way to pin them is written down, and no digest that nobody looked up."""
    assert re.findall(r"^FROM (\S+)", TEXT, re.MULTILINE) == ["${BUILDER}", "${BASE}", "command", "command"]
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
    assert "internvl_edge/server/page.html" in names
