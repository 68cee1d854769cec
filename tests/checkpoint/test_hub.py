"""CHECKPOINT as a folder never touches the network; as a hub id it is downloaded, preferably as safetensors.

The real client of the hub talks to a server on this machine, which answers as a hub does or as something else does.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from helpers.commands import assert_one_line, internvl_edge
from helpers.fake_hub import COMMIT, PAGE, FakeHub, ask, serving
from helpers.reports import quantization_record
from helpers.tiny import write_checkpoint
from internvl_edge.base.errors import BundleError, CheckpointError, EdgeError
from internvl_edge.base.hub import HubSource, hub_source
from internvl_edge.base.jsonable import decode, encode
from internvl_edge.bundle.manifest import Manifest
from internvl_edge.checkpoint.hub import resolve_checkpoint, resolve_configuration
from internvl_edge.checkpoint.record import QuantizationRecord, read_record
from internvl_edge.evaluation import EvaluationSettings, reference_bundle
from internvl_edge.export import export_bundle

REPOSITORY = "org/model"
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights" * 500,
    "preprocessor_config.json": b"{}",
    "processor_config.json": b"{}",
    "README.md": b"a model",
    "onnx/config.json": b"{}",
    "onnx/model.safetensors": b"another model",
    "runs/deep/below/trainer_state.json": b"{}",
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A hub that the client of this process asks, with an empty cache and nobody logged in."""
    with serving(FakeHub(REPOSITORY, dict(FILES), ("main", "v1.0", "refs/pr/3"))) as hub:
        ask(hub, monkeypatch, tmp_path / "cache")
        yield hub


def in_cache(hub: FakeHub, tmp_path: Path) -> dict[str, str]:
    """The environment of a program that asks the fake hub."""
    unset = {"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE"}
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    return kept | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}


def program(hub: FakeHub, tmp_path: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return internvl_edge(*arguments, environment=in_cache(hub, tmp_path))


def always(status: int, headers: dict[str, str], body: bytes = b"", where: str = "/") -> Callable[[str], Any]:
    """Answer so to each path that holds `where`."""
    return lambda path: (status, headers, body) if where in path else None


# ---- what is a folder, and what is asked ----


def test_a_local_folder_is_itself(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_checkpoint(REPOSITORY) == resolve_configuration(REPOSITORY) == Path(REPOSITORY)
    assert hub.asked == []


@pytest.mark.parametrize("text", ["nowhere", "./nowhere", "../a/b", "a/b/c", "/absolute/nowhere", "two words/x"])
def test_what_is_neither_is_refused_without_asking(hub: FakeHub, text: str) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        resolve_checkpoint(text)
    assert hub.asked == []


def test_a_checkpoint_is_its_own_files_alone(hub: FakeHub) -> None:
    """Pickles, pictures and whatever lies below the top stay on the hub. The card says what a copy may be used for."""
    hub.files |= {"training_args.bin": b"pickle", "optimizer.pt": b"pickle", "LICENSE": b"terms", "photo.png": b"png"}
    folder = resolve_checkpoint(REPOSITORY)
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    described = {"config.json", "preprocessor_config.json", "processor_config.json", "README.md", "LICENSE"}
    assert names == {"model.safetensors", *described}
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_a_plan_needs_what_describes_the_model(hub: FakeHub) -> None:
    hub.files["kv_cache_scales.npz"] = b"scales"
    folder = resolve_configuration(REPOSITORY)
    described = {"config.json", "preprocessor_config.json", "processor_config.json", "kv_cache_scales.npz"}
    assert {path.name for path in folder.iterdir()} == described


def test_bin_shards_are_fetched_only_where_there_is_nothing_else(hub: FakeHub) -> None:
    hub.files["pytorch_model-00001-of-00001.bin"] = b"pickle"
    assert not list(resolve_checkpoint(REPOSITORY).glob("*.bin"))


def test_bin_shards_come_from_the_same_commit(hub: FakeHub) -> None:
    del hub.files["model.safetensors"]
    hub.files["pytorch_model.bin"] = b"pickle"
    folder = resolve_checkpoint(REPOSITORY)
    assert (folder / "pytorch_model.bin").read_bytes() == b"pickle"
    assert len([path for path in hub.asked if path.endswith("/revision/main")]) == 1


def test_only_a_download_needs_the_package_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert resolve_checkpoint(str(tmp_path)) == resolve_configuration(str(tmp_path)) == tmp_path
    for resolve in (resolve_checkpoint, resolve_configuration):
        with pytest.raises(CheckpointError) as raised:
            resolve("OpenGVLab/InternVL2_5-1B")
        assert str(raised.value) == (
            "downloading OpenGVLab/InternVL2_5-1B needs the package huggingface_hub: pip install 'internvl-edge[hub]', "
            "or give a checkpoint folder"
        )


# ---- revisions ----


@pytest.mark.parametrize("revision", [None, "main", "v1.0", "refs/pr/3", COMMIT])
def test_a_branch_a_tag_and_a_commit_give_the_commit(hub: FakeHub, revision: str | None) -> None:
    folder = resolve_checkpoint(REPOSITORY, revision)
    assert hub_source(folder) == HubSource(REPOSITORY, COMMIT)
    assert all(COMMIT in path for path in hub.asked if "/resolve/" in path)


@pytest.mark.parametrize("revision", ["../../etc", "a/../b", "", " main", "-x", "a//b", "/main", "main\n", "..", "a b"])
def test_what_no_branch_is_called_is_not_asked_for(hub: FakeHub, revision: str) -> None:
    with pytest.raises(CheckpointError, match="no branch, tag or commit"):
        resolve_checkpoint(REPOSITORY, revision)
    assert hub.asked == []


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    for resolve in (resolve_checkpoint, resolve_configuration):
        with pytest.raises(CheckpointError, match=r"--revision chooses a version of a hub id; leave it out"):
            resolve(str(tmp_path), "main")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="--revision"):
        resolve_configuration(str(tmp_path / "config.json"), "main")


@pytest.mark.parametrize("name", ["OpenGVLab/InternVL2_5-1B", "a/b", "a-b/c.d_e"])
def test_where_a_folder_came_from_is_read_off_the_cache(tmp_path: Path, name: str) -> None:
    folder = tmp_path / f"models--{name.replace('/', '--')}" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (tmp_path / "link").symlink_to(folder)
    assert hub_source(folder) == hub_source(tmp_path / "link") == HubSource(name, COMMIT)
    assert hub_source(tmp_path) is hub_source(folder.parent) is hub_source(folder / "below") is None


# ---- answers that are not what was asked for ----

WRONG: dict[str, tuple[Callable[[str], Any], tuple[str, ...]]] = {
    "a portal's page for everything": (
        always(200, {"Content-Type": "text/html"}, PAGE),
        ("did not answer as a hub does", "login", "HF_ENDPOINT"),
    ),
    "a portal's page for files": (
        always(200, {"Content-Type": "text/html"}, PAGE, "/resolve/"),
        ("did not answer as a hub does", "login"),
    ),
    "a redirect to a portal": (
        lambda path: (302, {"Location": "/portal"}, b"") if "/api/" in path else (200, {}, PAGE),
        ("did not answer as a hub does", "login"),
    ),
    "a redirect without end": (always(302, {"Location": "/api/again"}), ("did not answer as a hub does",)),
    "a list": (always(200, {}, b"[]", "/api/"), ("did not answer as a hub does",)),
    "no commit": (always(200, {}, b'{"id": "org/model", "siblings": []}'), ("did not answer as a hub does",)),
    "a commit that is a path": (
        lambda path: (
            (200, {}, b'{"id": "org/model", "sha": "../../x", "siblings": []}') if "/revision/" in path else None
        ),
        (),
    ),
    "a gated model": (always(401, {"X-Error-Code": "GatedRepo"}), ("gated", "accept its terms", "HF_TOKEN")),
    "gated files": (always(403, {"X-Error-Code": "GatedRepo"}, b"", "/resolve/"), ("gated", "HF_TOKEN", "hf auth")),
    "nobody logged in": (always(401, {}), ("private or gated one (401)", "HF_TOKEN")),
    "forbidden": (always(403, {}), ("private or gated one (403)", "HF_TOKEN")),
    "no such repository": (always(404, {"X-Error-Code": "RepoNotFound"}), ("(404)", "check the id")),
    "a file that is gone": (always(404, {}, b"", "model.safetensors"), ("(404)",)),
    "too many requests": (always(429, {}, b"", "/api/"), ("answered 429", "later")),
    "a broken hub": (always(503, {}, b"", "/api/"), ("answered 503", "later")),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_answer_is_one_line_with_what_to_do(hub: FakeHub, what: str) -> None:
    hub.answer, fragments = WRONG[what]
    with pytest.raises(CheckpointError) as raised:
        resolve_checkpoint(REPOSITORY)
    message = str(raised.value)
    assert message.startswith("org/model is no folder here and could not be downloaded: ")
    assert all(fragment in message for fragment in fragments), message
    assert "\n" not in message
    assert len(message) < 400


def test_a_revision_that_is_not_there_is_named(hub: FakeHub) -> None:
    with pytest.raises(CheckpointError, match=r"it has no revision 'v9'; give a branch, tag or commit"):
        resolve_checkpoint(REPOSITORY, "v9")


def test_a_token_that_does_not_help_is_not_asked_for_again(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    hub.answer = always(403, {"X-Error-Code": "GatedRepo"})
    with pytest.raises(CheckpointError, match="the present token may not") as raised:
        resolve_checkpoint(REPOSITORY)
    assert "hf_secret" not in str(raised.value)


def test_a_file_that_is_cut_is_not_taken(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits before each of its retries
    hub.cut = 100
    with pytest.raises(CheckpointError, match="arrived incomplete; repeat the command, which continues"):
        resolve_checkpoint(REPOSITORY)
    hub.cut = None
    assert (resolve_checkpoint(REPOSITORY) / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_a_page_in_the_place_of_a_file_is_named(hub: FakeHub, tmp_path: Path) -> None:
    """One of the right size, which the client of the hub takes: it compares sizes alone."""
    hub.files["config.json"] = b"\n <HTML><p>blocked</p></HTML>"
    with pytest.raises(CheckpointError, match=r"config\.json was answered with a web page") as raised:
        resolve_checkpoint(REPOSITORY)
    assert f"delete {tmp_path / 'cache' / 'models--org--model'} and repeat" in str(raised.value)


def test_a_file_may_lie_elsewhere(hub: FakeHub) -> None:
    """Large files are redirected to another server."""
    data = hub.files["model.safetensors"]

    def answer(path: str) -> Any:
        if path == "/storage/blob":
            return 200, {}, data
        if "/resolve/" in path and path.endswith("model.safetensors"):
            elsewhere = hub.endpoint.replace("127.0.0.1", "localhost")
            headers = {"Location": f"{elsewhere}/storage/blob", "ETag": '"0"', "X-Repo-Commit": COMMIT}
            return 302, headers | {"X-Linked-Size": str(len(data)), "X-Linked-Etag": '"1"'}, b""
        return None

    hub.answer = answer
    assert (resolve_checkpoint(REPOSITORY) / "model.safetensors").read_bytes() == data


def test_what_is_no_checkpoint_is_said(hub: FakeHub) -> None:
    del hub.files["config.json"]
    with pytest.raises(CheckpointError, match=r"no config\.json at its top .* check the hub id"):
        resolve_checkpoint(REPOSITORY)


def test_no_network_is_one_line(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match=r"127\.0\.0\.1:9 cannot be reached .* check network and proxy"):
        resolve_checkpoint(REPOSITORY)


def test_without_network_the_cache_answers(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = resolve_checkpoint(REPOSITORY)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert resolve_checkpoint(REPOSITORY) == resolve_checkpoint(REPOSITORY, COMMIT) == folder


def test_offline_is_said(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set, and it is not whole in the cache"):
        resolve_checkpoint(REPOSITORY)


def test_a_failed_download_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> str:
        raise OSError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError) as raised:
        resolve_checkpoint("OpenGVLab/InternVL2_5-1B")
    assert str(raised.value).endswith("could not be downloaded: no route")


def test_a_reference_has_a_revision_only_where_there_is_one(tmp_path: Path) -> None:
    with pytest.raises(EdgeError, match="give both or neither"):
        EvaluationSettings(tmp_path, suite="reader", reference_revision="main")
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(BundleError, match="leave it out"), reference_bundle(str(tmp_path), revision="main"):
        pass


# ---- what is recorded ----


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a small checkpoint in the native layout, with a tile limit in its processor's file."""
    folder = write_checkpoint(tmp_path_factory.mktemp("tiny"), layout="native")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_command_records_and_shows_the_commit(tiny: dict[str, bytes], tmp_path: Path) -> None:
    hub = FakeHub(REPOSITORY, tiny | {"below/config.json": b"{}"}, ("main", "v1.0"))
    bundle, smaller = tmp_path / "bundle", tmp_path / "smaller"
    with serving(hub):
        planned = program(hub, tmp_path, "plan", REPOSITORY, "--revision", "v1.0", "--device", "orin-nano-8gb")
        assert planned.returncode == 0, planned.stderr
        assert not any(path.endswith(".safetensors") for path in hub.asked)
        for arguments in (
            ("export", REPOSITORY, "--revision", "v1.0", "-o", bundle),
            ("quantize", REPOSITORY, "--revision", COMMIT, "-o", smaller, "--scheme", "w8a16"),
            ("inspect", REPOSITORY, "--revision", "v1.0"),
        ):
            done = program(hub, tmp_path, *arguments)
            assert done.returncode == 0, done.stderr
        assert f"hub         org/model, commit {COMMIT}" in done.stdout
        missing = program(hub, tmp_path, "export", REPOSITORY, "--revision", "v2", "-o", tmp_path / "other")
        assert_one_line(missing, "it has no revision 'v2'")
    assert Manifest.read(bundle).hub == HubSource(REPOSITORY, COMMIT)
    assert Manifest.read(bundle).source == REPOSITORY
    record = read_record(smaller)
    assert record is not None
    assert (record.hub, record.checkpoint) == (HubSource(REPOSITORY, COMMIT), REPOSITORY)
    again = export_bundle(smaller, tmp_path / "again")
    assert Manifest.read(again).hub == HubSource(REPOSITORY, COMMIT)
    assert Manifest.read(again).source == "smaller"
    for path in (bundle, smaller, again):
        assert f"org/model, commit {COMMIT}" in internvl_edge("inspect", path).stdout


def test_a_folder_that_nobody_downloaded_has_no_commit(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint")
    manifest = Manifest.read(export_bundle(folder, tmp_path / "bundle"))
    assert (manifest.hub, manifest.source) == (None, "checkpoint")
    assert "commit" not in internvl_edge("inspect", tmp_path / "bundle").stdout
    for command in ("inspect", "plan"):
        assert_one_line(internvl_edge(command, tmp_path / "bundle", "--revision", "main"), "leave it out")


def test_a_record_of_an_older_version_has_no_commit() -> None:
    record = replace(quantization_record(), hub=HubSource(REPOSITORY, COMMIT))
    assert decode(QuantizationRecord, encode(record)).hub == HubSource(REPOSITORY, COMMIT)
    older = {name: value for name, value in encode(record).items() if name != "hub"}
    assert decode(QuantizationRecord, older) == replace(record, hub=None)


def test_a_portal_is_one_line_of_the_program(tmp_path: Path) -> None:
    hub = FakeHub(REPOSITORY, dict(FILES))
    hub.answer = always(200, {"Content-Type": "text/html"}, PAGE, "/resolve/")
    with serving(hub):
        for arguments in (("inspect", REPOSITORY), ("plan", REPOSITORY), ("export", REPOSITORY, "-o", tmp_path / "b")):
            assert_one_line(program(hub, tmp_path, *arguments), "did not answer as a hub does")
