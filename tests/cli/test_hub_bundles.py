"""BUNDLE as a hub id: what is fetched, from where it comes the second time, and what is refused.

The real client of the hub talks to a server on this machine.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants
from PIL import Image

from helpers.commands import assert_one_line, internvl_edge
from helpers.fake_hub import COMMIT, FakeHub, ask, serving
from helpers.tiny import write_checkpoint
from internvl_edge import InternVL
from internvl_edge.base.errors import BundleError
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.bundle.hub import bundle_description, resolve_bundle
from internvl_edge.bundle.manifest import Manifest
from internvl_edge.evaluation import EvaluationSettings, evaluate, reference_bundle
from internvl_edge.export import export_bundle
from internvl_edge.runtime import find
from internvl_edge.runtime.find import find_bundle

REPOSITORY = "org/bundle"
ASK = ("What is this?", "--max-new-tokens", "3", "--device", "cpu", "--engine", "onnxruntime")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    return export_bundle(write_checkpoint(folder / "checkpoint"), folder / "made")


@pytest.fixture
def files(bundle: Path) -> dict[str, bytes]:
    """The bundle as a repository, with a card, other files and engines of two devices."""
    engines = {
        f"engines/{name}/{file}": b"{}" for name in ("orin", "rtx") for file in ("engine.json", "decoder.engine")
    }
    others = {"README.md": b"a card", "notes/decoder.onnx": b"other", "pytorch_model.bin": b"pickle"}
    return {path.name: path.read_bytes() for path in bundle.iterdir()} | engines | others


@pytest.fixture
def hub(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A hub that the client of this process asks, with an empty cache and nobody logged in."""
    with serving(FakeHub(REPOSITORY, files, ("main", "v1.0"))) as hub:
        ask(hub, monkeypatch, tmp_path / "cache")
        yield hub


def program(endpoint: str, home: Path, *arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
    """Run the program in an empty folder, with a hub and a cache of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    own = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}
    (home / "here").mkdir(parents=True, exist_ok=True)
    return internvl_edge(*arguments, environment=kept | own | more, directory=home / "here")


def image(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def fetched(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# ---- what is fetched ----


def test_only_the_files_of_the_manifest_are_fetched(hub: FakeHub, bundle: Path) -> None:
    folder = resolve_bundle(REPOSITORY)
    assert fetched(folder) == {"manifest.json", *Manifest.read(bundle).files}
    assert Bundle.open(folder).manifest == Bundle.open(bundle).manifest
    assert not any("engines/" in path for path in hub.asked if "/resolve/" in path)


@pytest.mark.parametrize("revision", [None, "v1.0", COMMIT])
def test_everything_comes_from_one_commit(hub: FakeHub, revision: str | None) -> None:
    assert resolve_bundle(REPOSITORY, revision).name == COMMIT
    assert all(COMMIT in path for path in hub.asked if "/resolve/" in path)
    assert len([path for path in hub.asked if path.endswith("/revision/main")]) <= 1


def test_a_local_folder_wins_and_nothing_is_asked(
    hub: FakeHub, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "bundle").symlink_to(bundle)
    monkeypatch.chdir(tmp_path)
    assert resolve_bundle(REPOSITORY) == find_bundle(REPOSITORY) == bundle_description(REPOSITORY) == Path(REPOSITORY)
    with pytest.raises(BundleError, match=r"is on this machine, and --revision .* leave it out"):
        resolve_bundle(REPOSITORY, "v1.0")
    assert hub.asked == []


def test_what_is_neither_is_left_to_whoever_opens_it(hub: FakeHub, tmp_path: Path) -> None:
    for name in ("nowhere", str(tmp_path / "nowhere"), "../a/b", "a/b/c"):
        assert resolve_bundle(name) == Path(name)
        with pytest.raises(BundleError, match="is not a bundle"):
            InternVL.load(name)
    assert hub.asked == []


def test_engines_are_those_that_this_machine_can_run(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, set[str]]] = []

    def fitting(folder: Path, sm: int) -> list[str]:
        asked.append((sm, fetched(folder)))
        return ["engines/rtx/decoder.engine"]

    monkeypatch.setattr(find, "_present_gpu", lambda: 89)
    monkeypatch.setattr(find, "_engine_files", fitting)
    folder = find_bundle(REPOSITORY, device="tensorrt")
    records = {"engines/orin/engine.json", "engines/rtx/engine.json"}
    assert asked == [(89, {"manifest.json", *records})]
    assert {name for name in fetched(folder) if name.startswith("engines")} == {*records, "engines/rtx/decoder.engine"}


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda"])
def test_engines_of_others_are_not_fetched_unasked(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(find, "_present_gpu", lambda: 89)
    folder = find_bundle(REPOSITORY, device=device)
    assert not any(name.startswith("engines") for name in fetched(folder))


# ---- what is refused ----


def test_a_file_that_the_manifest_lists_and_nobody_has_is_named(hub: FakeHub) -> None:
    del hub.files["decoder.data"]
    with pytest.raises(BundleError, match=rf"org/bundle has no decoder\.data in commit {COMMIT}"):
        resolve_bundle(REPOSITORY)


def test_a_changed_file_does_not_load(hub: FakeHub) -> None:
    """The client of the hub compares sizes; the manifest has the hash of each file."""
    data = bytearray(hub.files["decoder.data"])
    data[-1] ^= 1
    hub.files["decoder.data"] = bytes(data)
    with pytest.raises(BundleError, match=r"decoder\.data was changed"):
        InternVL.load(REPOSITORY, "cpu", engine="onnxruntime")


def test_a_checkpoint_is_no_bundle(hub: FakeHub) -> None:
    hub.files = {"config.json": b"{}", "model.safetensors": b"weights"}
    with pytest.raises(BundleError, match=r"no manifest\.json at its top .* so it is no bundle; check the hub id"):
        resolve_bundle(REPOSITORY)
    assert bundle_description(REPOSITORY) is None


def test_a_manifest_cannot_name_what_lies_elsewhere(hub: FakeHub) -> None:
    hub.files["manifest.json"] = hub.files["manifest.json"].replace(b'"decoder.data"', b'"../decoder.data"')
    with pytest.raises(BundleError, match="damaged"):
        resolve_bundle(REPOSITORY)


@pytest.mark.parametrize("revision", ["../x", "", "a b", "-x"])
def test_what_no_branch_is_called_is_not_asked_for(hub: FakeHub, revision: str) -> None:
    with pytest.raises(BundleError, match="no branch, tag or commit"):
        resolve_bundle(REPOSITORY, revision)
    assert hub.asked == []


# ---- the cache ----


def test_without_network_the_cache_answers(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = resolve_bundle(REPOSITORY)
    hub.asked.clear()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert resolve_bundle(REPOSITORY) == resolve_bundle(REPOSITORY, COMMIT) == folder
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_bundle(REPOSITORY) == resolve_bundle(REPOSITORY, COMMIT) == folder
    with pytest.raises(BundleError, match="not whole in the cache"):
        resolve_bundle(REPOSITORY, "v1.0")
    assert hub.asked == []


def test_a_cache_that_is_not_whole_is_said(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = resolve_bundle(REPOSITORY)
    (folder / "decoder.data").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BundleError, match=r"decoder\.data|not whole in the cache"):
        resolve_bundle(REPOSITORY)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert Bundle.open(resolve_bundle(REPOSITORY))


def test_a_cut_download_continues(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits before each of its retries
    hub.cut = 2000
    with pytest.raises(BundleError, match="arrived incomplete; repeat the command, which continues the download"):
        resolve_bundle(REPOSITORY)
    hub.cut = None
    assert Bundle.open(resolve_bundle(REPOSITORY))


# ---- the commands ----


def test_the_model_answers_as_from_a_folder(hub: FakeHub, bundle: Path) -> None:
    picture = image(60, 90)
    with InternVL.load(bundle, "cpu") as here, InternVL.load(REPOSITORY, "cpu", revision="v1.0") as away:
        asked = [model.chat("What is this?", picture, max_new_tokens=5).output_ids for model in (here, away)]
    assert asked[0] == asked[1]


def test_every_command_takes_a_hub_id(files: dict[str, bytes], bundle: Path, tmp_path: Path) -> None:
    pin = (REPOSITORY, "--revision", COMMIT)
    with serving(FakeHub(REPOSITORY, files, ("main",))) as hub:
        expected = program(hub.endpoint, tmp_path, "run", bundle, *ASK).stdout
        done = program(hub.endpoint, tmp_path, "run", *pin, *ASK)
        assert (done.returncode, done.stdout) == (0, expected), done.stderr
        assert program(hub.endpoint, tmp_path, "plan", *pin, "--device", "orin-nano-8gb").returncode == 0
        shown = program(hub.endpoint, tmp_path, "inspect", *pin)
        assert shown.stdout.startswith("kind"), shown.stderr
        assert shown.stdout.split()[1] == "bundle"
        wrong = program(hub.endpoint, tmp_path, "run", REPOSITORY, "--revision", "v9", *ASK)
        assert_one_line(wrong, "it has no revision 'v9'")
    commands: dict[str, tuple[str, ...]] = {
        "run": ASK,
        "bench": ("--repeat", "1", "--device", "cpu", "--engine", "onnxruntime", "--json"),
        "inspect": (),
    }
    for name, options in commands.items():  # from the cache, without network
        done = program(hub.endpoint, tmp_path, name, *pin, *options, HF_HUB_OFFLINE="1")
        assert done.returncode == 0, (name, done.stderr)
    talk = program(hub.endpoint, tmp_path, "chat", *pin, "--device", "cpu", "--engine", "onnxruntime")
    assert talk.returncode == 0, talk.stderr
    missing = program(hub.endpoint, tmp_path, "build", REPOSITORY, "--revision", "v9", HF_HUB_OFFLINE="1")
    assert_one_line(missing, "not whole in the cache")


def test_evaluate_leaves_the_cache_as_the_hub_has_it(files: dict[str, bytes], bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    image(40, 40).save(tmp_path / "data" / "a.png")
    measure = ("--reference", bundle, "--data", tmp_path / "data", "--samples", 1, "--max-new-tokens", 2)
    with serving(FakeHub(REPOSITORY, files, ("main",))) as hub:
        done = program(hub.endpoint, tmp_path, "evaluate", REPOSITORY, *measure)
        assert done.returncode == 0, done.stderr
        assert "org/bundle is in the hub's cache, so the figures are not recorded in it" in done.stderr
        assert (tmp_path / "here" / "bundle.report" / "report.json").is_file()
        accepted = program(hub.endpoint, tmp_path, "evaluate", REPOSITORY, "--accept", "it is good enough")
        assert_one_line(accepted, "--accept is stored in the bundle", "hub's cache")
    snapshot = tmp_path / "hub" / "models--org--bundle" / "snapshots" / COMMIT
    assert (snapshot / "manifest.json").read_bytes() == files["manifest.json"]
    assert not list(snapshot.parent.glob("*.report"))


def test_a_reference_may_be_a_bundle_on_the_hub(hub: FakeHub, bundle: Path, tmp_path: Path) -> None:
    with reference_bundle(REPOSITORY, revision="v1.0") as folder:
        assert folder.name == COMMIT
    (tmp_path / "data").mkdir()
    image(40, 40).save(tmp_path / "data" / "a.png")
    settings = EvaluationSettings(
        bundle,
        reference=REPOSITORY,
        reference_revision="v1.0",
        data=tmp_path / "data",
        samples=1,
        max_new_tokens=2,
        device="cpu",
    )
    assert evaluate(settings).figures["kl"] == 0


def test_a_revision_of_a_folder_is_refused_by_every_command(bundle: Path, tmp_path: Path) -> None:
    for name in ("run", "bench", "chat", "inspect", "build", "plan", "evaluate"):
        question = ("hello",) if name == "run" else ()
        done = program("http://127.0.0.1:9", tmp_path, name, bundle, *question, "--revision", "main")
        assert_one_line(done, "--revision chooses a version of a hub id; leave it out")


def test_a_copy_of_the_cache_is_a_bundle(hub: FakeHub, tmp_path: Path) -> None:
    copy = shutil.copytree(resolve_bundle(REPOSITORY), tmp_path / "copy")
    assert Bundle.open(copy).manifest.files
