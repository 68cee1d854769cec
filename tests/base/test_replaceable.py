"""`--force` replaces a folder that reads as ours and holds nothing else; everything else is named and kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from internvl_edge.base.errors import EdgeError
from internvl_edge.base.folders import writing
from internvl_edge.base.replaceable import require_replaceable

OWN = {"manifest", "weights", "engines/", "engines/rtx/engine"}


def contents(folder: Path) -> set[str]:
    if (folder / "manifest").is_file() and (folder / "manifest").read_text() == "sound":
        return OWN
    raise EdgeError(f"{folder} is not a thing: no manifest in it; make one")


def check(target: Path, force: bool = True) -> None:
    require_replaceable(target, force, "a thing", contents)


@pytest.fixture
def thing(tmp_path: Path) -> Path:
    target = tmp_path / "out"
    (target / "engines" / "rtx").mkdir(parents=True)
    (target / "manifest").write_text("sound")
    for name in ("weights", "engines/rtx/engine"):
        (target / name).touch()
    return target


def test_what_is_ours_is_replaced_when_the_user_says_so(thing: Path) -> None:
    check(thing)
    check(thing.parent / "absent", force=False)
    with pytest.raises(EdgeError, match=r"out exists; choose another --output or pass --force to replace it$"):
        check(thing, force=False)


@pytest.mark.parametrize("gone", ["weights", "engines/rtx/engine"])
def test_what_is_ours_and_damaged_is_replaced(thing: Path, gone: str) -> None:
    (thing / gone).unlink()
    check(thing)


def test_an_empty_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    check(tmp_path / "out")


def test_what_killed_writers_left_in_it_is_no_obstacle(thing: Path) -> None:
    for name in (".weights.123", ".manifest.0123abcd", "engines/.rtx.lock"):
        (thing / name).touch()
    (thing / "engines" / ".rtx.partial-abcd_123").mkdir()
    check(thing)


STRANGE: dict[str, Callable[[Path], object]] = {
    "notes.txt": Path.touch,
    ".hidden": Path.touch,
    ".weights.backup": Path.touch,
    ".mine.lock": Path.touch,
    "mine": Path.mkdir,
    ".mine.partial-abcd_123": Path.mkdir,
    "engines/notes.txt": Path.touch,
    "engines/orin": Path.mkdir,
    "engines/rtx/notes.txt": Path.touch,
    "link": lambda path: path.symlink_to("/"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_a_strange_file_is_named_and_nothing_is_replaced(thing: Path, name: str) -> None:
    STRANGE[name](thing / name)
    with pytest.raises(EdgeError, match=rf"{thing / name} is not part of it; remove that file or choose another --out"):
        check(thing)


@pytest.mark.parametrize("name", ["weights", "engines"])
def test_another_kind_of_file_under_an_own_name_is_strange(thing: Path, name: str) -> None:
    (thing / name).rename(thing.parent / "away")
    if name == "weights":
        (thing / name).mkdir()
    else:
        (thing / name).symlink_to(thing.parent / "away")
    with pytest.raises(EdgeError, match=f"{thing / name} is not part of it"):
        check(thing)


@pytest.mark.parametrize("text", ["", "damaged"])
def test_a_folder_that_does_not_read_as_ours_is_kept(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest").write_text(text)
    with pytest.raises(EdgeError, match=rf"is not a thing: .*{tmp_path}/manifest lies there; remove {tmp_path} or"):
        check(tmp_path)


def test_files_links_and_roots_are_kept(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent")
    for name in ("file", "nowhere"):
        with pytest.raises(EdgeError, match=f"{name} is not a thing"):
            check(tmp_path / name)
    with pytest.raises(EdgeError, match="root of a disk"):
        check(Path("/"))


def test_what_another_process_is_writing_in_it_is_not_taken_away(thing: Path) -> None:
    with writing(thing / "engines" / "rtx"), pytest.raises(EdgeError, match="another process writes in"):
        check(thing)
    check(thing)
