"""Folders are replaced without a moment in which there is none, by one writer, and killed writers leave nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from helpers.killed_runs import contents, run_and_be_killed
from internvl_edge.base import folders
from internvl_edge.base.errors import EdgeError, RestoredWarning
from internvl_edge.base.files import replace_text
from internvl_edge.base.folders import new_folder, restore, restore_inside, scratch_folder, writing

OLD, NEW = {"a": b"old", "b": b"old"}, {"a": b"new"}

# Replaces argv[1], and is killed before or after (argv[3]) step argv[4] of the replacement, with or without exchange.
REPLACE = """
import os, shutil, signal, sys
from pathlib import Path
from internvl_edge.base import folders
target, exchanges, moment, step = Path(sys.argv[1]), sys.argv[2] == "exchange", sys.argv[3], int(sys.argv[4])
count = 0

def deadly(function):
    def call(*arguments, **options):
        global count
        count += 1
        if (moment, count) == ("before", step):
            os.kill(os.getpid(), signal.SIGKILL)
        done = function(*arguments, **options)
        if (moment, count) == ("after", step):
            os.kill(os.getpid(), signal.SIGKILL)
        return done
    return call

folders.exchange = deadly(folders.exchange) if exchanges else lambda one, other: False
with folders.new_folder(target, lambda: None) as folder:
    (folder / "a").write_text("new")
    for module, name in ((os, "rename"), (os, "unlink"), (os, "rmdir"), (shutil, "rmtree"), (os, "fsync")):
        setattr(module, name, deadly(getattr(module, name)))
print("done")
"""


def make(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def replace(target: Path) -> None:
    with new_folder(target, lambda: None) as folder:
        (folder / "a").write_bytes(b"new")


# ---- kills ----


@pytest.mark.parametrize("way", ["exchange", "steps"])
def test_a_kill_between_any_two_steps_leaves_the_old_or_the_new_folder(tmp_path: Path, way: str) -> None:
    found = []
    for moment in ("before", "after"):
        for step in range(1, 50):
            target = make(tmp_path / f"{moment}-{step}" / "bundle", OLD)
            arguments = [sys.executable, "-c", REPLACE, str(target), way, moment, str(step)]
            done = subprocess.run(arguments, capture_output=True, check=False)
            if done.returncode == 0:
                break
            assert done.returncode == -9, done.stderr.decode()
            if way == "exchange":
                assert contents(target) in (OLD, NEW)
            left = not target.exists()
            with pytest.warns(RestoredWarning) if left else _nothing():
                restore(target)
            found.append((left, contents(target) == NEW))
            assert contents(target) in (OLD, NEW)
            replace(target)
            assert contents(target) == NEW
            assert os.listdir(target.parent) == ["bundle"]
    assert {new for _, new in found} == {False, True}
    assert any(left for left, _ in found) == (way == "steps")


class _nothing:  # noqa: N801
    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


def test_this_system_exchanges_folders(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("only Linux has renameat2")
    one, other = make(tmp_path / "one", OLD), make(tmp_path / "other", NEW)
    assert folders.exchange(one, other)
    assert (contents(one), contents(other)) == (NEW, OLD)
    assert not folders.exchange(one, tmp_path / "absent")


def test_a_rename_that_fails_between_two_steps_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = make(tmp_path / "bundle", OLD)
    monkeypatch.setattr(folders, "exchange", lambda one, other: False)
    rename = os.rename

    def refuse(source: os.PathLike[str], place: os.PathLike[str]) -> None:
        if Path(place) == target and not Path(source).name.endswith(".old"):
            raise OSError(5, "Input/output error")
        rename(source, place)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OSError, match="Input/output"):
        replace(target)
    assert contents(target) == OLD
    assert os.listdir(tmp_path) == ["bundle"]


def test_the_folder_of_a_killed_replacement_is_put_back_wherever_it_is_looked_for(tmp_path: Path) -> None:
    make(tmp_path / ".one.partial-01234567.old", OLD)
    make(tmp_path / ".two.partial-01234567.old", OLD)
    with pytest.warns(RestoredWarning, match="old one is back"):
        restore_inside(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["one", "two"]


def test_what_a_living_replacement_moved_aside_is_left_to_it(tmp_path: Path) -> None:
    with writing(tmp_path / "bundle"):
        make(tmp_path / ".bundle.partial-01234567.old", OLD)
        restore(tmp_path / "bundle")
        assert not (tmp_path / "bundle").exists()


def test_the_target_of_a_link_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    make(tmp_path / "disk" / "bundle", OLD)
    link = tmp_path / "bundle"
    link.symlink_to(tmp_path / "disk" / "bundle")
    replace(link)
    assert link.is_symlink()
    assert contents(tmp_path / "disk" / "bundle") == NEW
    assert os.listdir(tmp_path / "disk") == ["bundle"]


# ---- leftovers ----

KILLED = """
import os, signal, sys
from pathlib import Path
from internvl_edge.base.files import replacing
from internvl_edge.base.folders import new_folder, scratch_folder
kind, path = sys.argv[1], Path(sys.argv[2])
manager = {
    "folder": lambda: new_folder(path, lambda: None),
    "file": lambda: replacing(path),
    "scratch": lambda: scratch_folder("test"),
}[kind]()
with manager as made:
    if made.is_dir():
        made = made / "half"
    made.write_text("half")
    if len(sys.argv) == 4:
        print("half way", flush=True)
        sys.stdin.read()
    else:
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("kind", ["folder", "file", "scratch"])
def test_what_killed_processes_left_is_removed_and_what_living_ones_write_is_not(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for _ in range(2):
        run_and_be_killed(KILLED, kind, tmp_path / "out")
    (tmp_path / ".out.partial-mine").mkdir()
    (tmp_path / ".out.lock.notes").touch()
    other = {"folder": "another", "file": "out", "scratch": "out"}[kind]
    command = [sys.executable, "-c", KILLED, kind, str(tmp_path / other), "wait"]
    alive = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert alive.stdin is not None
    assert alive.stdout is not None
    assert alive.stdout.readline() == b"half way\n"
    try:
        if kind == "folder":
            replace(tmp_path / "out")
        elif kind == "file":
            replace_text(tmp_path / "out", "whole")
        else:
            with scratch_folder("test") as folder:
                assert os.listdir(folder) == [".lock"]
        halves = [path for path in tmp_path.rglob("*") if path.is_file() and path.read_text() == "half"]
        assert len(halves) == 1
    finally:
        alive.stdin.close()
        assert alive.wait() == 0
        alive.stdout.close()
    left = {path.name for path in tmp_path.iterdir()} - {".out.partial-mine", ".out.lock.notes"}
    assert left == {"folder": {"out", "another"}, "file": {"out"}, "scratch": set()}[kind]


def test_a_target_whose_name_begins_like_a_leftover_keeps_its_own(tmp_path: Path) -> None:
    with writing(tmp_path / "a.partial-b"):
        beside = make(tmp_path / ".a.partial-b.partial-01234567", NEW)
        replace(tmp_path / "a")
        assert beside.exists()


# ---- one writer ----


def test_a_second_writer_is_refused_with_the_first_ones_number(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, "folder", str(tmp_path / "out"), "wait"]
    alive = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert alive.stdin is not None
    assert alive.stdout is not None
    alive.stdout.readline()
    message = rf"another process \(pid {alive.pid}\) writes {tmp_path}/out; wait for it or choose another --output"
    with pytest.raises(EdgeError, match=message):
        replace(tmp_path / "out")
    alive.send_signal(signal.SIGKILL)
    alive.wait()
    alive.stdin.close()
    alive.stdout.close()
    replace(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


def test_file_systems_without_locks_are_written_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    left = make(tmp_path / ".out.partial-01234567", NEW)
    replace(tmp_path / "out")
    replace_text(tmp_path / "file", "text")
    with scratch_folder("test") as folder:
        assert folder.is_dir()
    assert left.exists()  # it may be alive
    assert sorted(os.listdir(tmp_path)) == [".out.partial-01234567", "file", "out"]
