"""`push` uploads what belongs to a bundle or a quantized checkpoint and nothing else, continues, and pins in its card.

The real client of the hub talks to a server on this machine that takes uploads.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from helpers.commands import PROGRAM, assert_one_line, internvl_edge
from helpers.fake_hub import serving
from helpers.tiny import write_checkpoint
from helpers.writable_hub import LARGE, TOKEN, WritableHub
from internvl_edge.base.hub import HubSource
from internvl_edge.bundle.manifest import Manifest
from internvl_edge.checkpoint.license import read_license
from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.checkpoint.record import read_record
from internvl_edge.export import export_bundle
from internvl_edge.publishing.card import bundle_card, checkpoint_card
from internvl_edge.quantize import quantize_checkpoint
from internvl_edge.recipe.recipe import Recipe

CARD = "---\nlicense: other\nlicense_name: terms-of-a-test\nlicense_link: https://example.com/terms\n---\n# A model\n"


@pytest.fixture
def hub() -> Iterator[WritableHub]:
    with serving(WritableHub()) as hub:
        assert isinstance(hub, WritableHub)
        yield hub


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("float"))
    (folder / "README.md").write_text(CARD)
    return folder


@pytest.fixture(scope="module")
def quantized(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "smaller"
    return quantize_checkpoint(checkpoint, out, Recipe(decoder="w4a16-rtn", group_size=32, lm_head="int8")).folder


@pytest.fixture(scope="module")
def bundle(quantized: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_bundle(quantized, tmp_path_factory.mktemp("exported") / "bundle")


def environment(hub: WritableHub, home: Path, **more: str) -> dict[str, str]:
    """Of a program that talks to this hub, with a cache of its own; the Xet protocol has no stand-in."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    own = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"}
    return kept | own | {"HF_TOKEN": TOKEN} | more


def push(hub: WritableHub, home: Path, *arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
    return internvl_edge("push", *arguments, environment=environment(hub, home, **more))


def front_matter(card: str) -> dict[str, object]:
    values: dict[str, object] = yaml.safe_load(card.split("---\n")[1])
    return values


def test_a_bundle_arrives_whole_with_a_card_that_pins_it(hub: WritableHub, bundle: Path, tmp_path: Path) -> None:
    done = push(hub, tmp_path, bundle, "me/model", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    repository = hub.repositories["me/model"]
    manifest = Manifest.read(bundle)
    pinned = repository.commits[facts["commit"]]
    assert set(pinned) == {".gitattributes", "manifest.json", *manifest.files}
    assert all(pinned[name] == (bundle / name).read_bytes() for name in ("manifest.json", *manifest.files))
    last = repository.files()
    assert last == pinned | {"README.md": last["README.md"]}
    card = last["README.md"].decode()
    assert f"internvl-edge run me/model --revision {facts['commit']} --image photo.jpg" in card
    assert f'InternVL.load("me/model", revision="{facts["commit"]}")' in card
    assert front_matter(card) == {
        "library_name": "internvl-edge",
        "pipeline_tag": "image-text-to-text",
        "license": "other",
        "license_name": "terms-of-a-test",
        "license_link": "https://example.com/terms",
        "tags": ["internvl", "onnx", "4-bit"],
    }
    large = {name for name, entry in manifest.files.items() if entry.bytes >= LARGE}
    digests = {name: manifest.files[name].sha256 for name in large}
    digests["manifest.json"] = hashlib.sha256((bundle / "manifest.json").read_bytes()).hexdigest()
    assert sorted(hub.uploads) == sorted(digests.values())
    assert large >= {"decoder.data", "embeddings.bin"}


def test_nothing_is_printed_of_the_token(hub: WritableHub, bundle: Path, tmp_path: Path) -> None:
    done = push(hub, tmp_path, bundle, "me/model")
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert "Next: internvl-edge run me/model --revision" in done.stdout
    refused = push(hub, tmp_path, bundle, "me/model", HF_TOKEN="hf_secret_that_is_wrong")
    assert_one_line(refused, "use an HF_TOKEN that may write it")
    assert "hf_secret" not in refused.stderr


def test_a_second_push_changes_nothing(hub: WritableHub, bundle: Path, tmp_path: Path) -> None:
    first = json.loads(push(hub, tmp_path, bundle, "me/model", "--json").stdout)
    commits, uploads = len(hub.repositories["me/model"].commits), list(hub.uploads)
    second = json.loads(push(hub, tmp_path, bundle, "me/model", "--json").stdout)
    assert second == first | {"changed": False}
    assert (len(hub.repositories["me/model"].commits), hub.uploads) == (commits, uploads)


def test_only_what_belongs_to_it_is_uploaded(hub: WritableHub, bundle: Path, tmp_path: Path) -> None:
    """No locks, no state of unfinished work, no files of the user, and no engines unless asked."""
    engines, strangers = bundle / "engines" / "rtx", (".bundle.lock", "notes.txt", ".vision.data.12345678")
    engines.mkdir(parents=True)
    try:
        built = {"vision.engine": b"v", "decoder.engine": b"d", "timing.cache": b"t"}
        for name, data in built.items():
            (engines / name).write_bytes(data)
        (engines / "engine.json").write_text(json.dumps({"files": {name: {} for name in built}}))
        (engines / "decoder.runtime.cache").write_bytes(b"kernels of this card")
        for name in strangers:
            (bundle / name).write_text("mine")
        assert push(hub, tmp_path, bundle, "me/model").returncode == 0
        expected = {".gitattributes", "README.md", "manifest.json", *Manifest.read(bundle).files}
        assert set(hub.repositories["me/model"].files()) == expected
        assert push(hub, tmp_path, bundle, "me/other", "--engines").returncode == 0
        more = {f"engines/rtx/{name}" for name in ("engine.json", *built)}
        assert set(hub.repositories["me/other"].files()) == expected | more
        assert "TensorRT engines for `rtx`" in hub.repositories["me/other"].files()["README.md"].decode()
    finally:
        shutil.rmtree(engines.parent)
        for name in strangers:
            (bundle / name).unlink()


def test_a_killed_upload_continues(hub: WritableHub, bundle: Path, tmp_path: Path) -> None:
    """Killed while one large file is on its way: the others are not sent again, and nothing was committed before."""
    held = Manifest.read(bundle).files["decoder.data"].sha256
    reached, release = threading.Event(), threading.Event()

    def storing(digest: str) -> None:
        if digest == held:
            reached.set()
            release.wait(60)
            raise ConnectionError

    hub.storing = storing
    command = [*PROGRAM, "push", str(bundle), "me/model"]
    pushing = subprocess.Popen(
        command, env=environment(hub, tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    assert reached.wait(60)
    os.kill(pushing.pid, signal.SIGKILL)
    pushing.wait(30)
    release.set()
    assert set(hub.repositories["me/model"].files()) == {".gitattributes"}
    sent = list(hub.uploads)
    hub.storing = lambda digest: None
    assert push(hub, tmp_path, bundle, "me/model").returncode == 0
    assert len(hub.uploads) == len(set(hub.uploads))
    assert held in hub.uploads[len(sent) :]
    files = hub.repositories["me/model"].files()
    assert {name: hashlib.sha256(files[name]).hexdigest() for name in Manifest.read(bundle).files} == {
        name: entry.sha256 for name, entry in Manifest.read(bundle).files.items()
    }


def test_ctrl_c_says_that_it_continues(hub: WritableHub, bundle: Path, tmp_path: Path) -> None:
    reached, release = threading.Event(), threading.Event()

    def storing(digest: str) -> None:
        reached.set()
        release.wait(60)

    hub.storing = storing
    pushing = subprocess.Popen(
        [*PROGRAM, "push", str(bundle), "me/model"],
        env=environment(hub, tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert reached.wait(60)
    pushing.send_signal(signal.SIGINT)
    threading.Timer(1, release.set).start()  # the client waits for the files that are on their way
    _, stderr = pushing.communicate(timeout=60)
    assert pushing.returncode == 130
    assert "interrupted; repeat the command to continue" in stderr


def test_a_branch_is_made_and_the_main_branch_stays(hub: WritableHub, bundle: Path, tmp_path: Path) -> None:
    assert push(hub, tmp_path, bundle, "me/model", "--revision", "int4", "-m", "Four bits").returncode == 0
    repository = hub.repositories["me/model"]
    assert set(repository.files()) == {".gitattributes"}
    assert "manifest.json" in repository.files("int4")
    assert set(repository.messages.values()) == {"initial commit", "Four bits", "Four bits (card)"}


def test_private_is_private_or_nothing(hub: WritableHub, bundle: Path, tmp_path: Path) -> None:
    assert push(hub, tmp_path, bundle, "me/secret", "--private").returncode == 0
    assert hub.repositories["me/secret"].private
    assert push(hub, tmp_path, bundle, "me/open").returncode == 0
    assert not hub.repositories["me/open"].private
    before = dict(hub.repositories["me/open"].commits)
    assert_one_line(push(hub, tmp_path, bundle, "me/open", "--private"), "is public", "nothing was uploaded")
    assert hub.repositories["me/open"].commits == before


def test_a_quantized_checkpoint_arrives_and_reads_the_same(hub: WritableHub, quantized: Path, tmp_path: Path) -> None:
    (quantized / "report.json").write_text("{}")
    done = push(hub, tmp_path, quantized, "me/smaller", "--json")
    assert done.returncode == 0, done.stderr
    files = hub.repositories["me/smaller"].files()
    assert "report.json" not in files
    folder = tmp_path / "arrived"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    assert Checkpoint(folder).schemes == Checkpoint(quantized).schemes
    assert (folder / "model.safetensors").read_bytes() == (quantized / "model.safetensors").read_bytes()
    card = files["README.md"].decode()
    commit = json.loads(done.stdout)["commit"]
    assert f"internvl-edge export me/smaller --revision {commit} -o bundle" in card
    assert f"vllm serve me/smaller --revision {commit}" in card
    assert front_matter(card)["license_name"] == "terms-of-a-test"


def test_weights_of_an_earlier_checkpoint_do_not_stay(hub: WritableHub, quantized: Path, tmp_path: Path) -> None:
    assert push(hub, tmp_path, quantized, "me/smaller").returncode == 0
    repository = hub.repositories["me/smaller"]
    extra = {"model-00002-of-00002.safetensors": b"older", "samples/x.safetensors": b"mine", "notes.md": b"mine"}
    repository.commit("main", repository.files() | extra, "by hand")
    done = push(hub, tmp_path, quantized, "me/smaller")
    assert "removed from the repository: model-00002-of-00002.safetensors" in done.stdout
    assert set(extra) & set(repository.files()) == {"samples/x.safetensors", "notes.md"}


@pytest.mark.parametrize("private", [False, True])
def test_the_other_kind_is_not_mixed_in(
    hub: WritableHub, bundle: Path, quantized: Path, tmp_path: Path, private: bool
) -> None:
    folders = (quantized, bundle) if private else (bundle, quantized)
    assert push(hub, tmp_path, folders[0], "me/model").returncode == 0
    before = dict(hub.repositories["me/model"].commits)
    assert_one_line(push(hub, tmp_path, folders[1], "me/model"), "me/model holds a", "give another repository")
    assert hub.repositories["me/model"].commits == before


def test_a_damaged_bundle_is_not_uploaded(hub: WritableHub, quantized: Path, tmp_path: Path) -> None:
    folder = export_bundle(quantized, tmp_path / "damaged")
    data = bytearray((folder / "decoder.data").read_bytes())
    data[-1] ^= 1
    (folder / "decoder.data").write_bytes(data)
    assert_one_line(push(hub, tmp_path, folder, "me/model"), "decoder.data was changed")
    assert hub.asked == []


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (("me/model/x",), ("is no hub id", "OWNER/NAME")),
        (("model",), ("is no hub id",)),
        (("me/model", "--revision", "../x"), ("is no branch",)),
        (("me/model", "--revision", "0" * 40), ("is a commit", "branch")),
        (("me/model", "--engines"), ("has no engines", "internvl-edge build")),
    ],
)
def test_a_mistake_is_one_line(
    hub: WritableHub, bundle: Path, tmp_path: Path, arguments: tuple[str, ...], fragments: tuple[str, ...]
) -> None:
    assert_one_line(push(hub, tmp_path, bundle, *arguments), *fragments)
    assert hub.asked == []


def test_what_is_neither_is_refused(hub: WritableHub, checkpoint: Path, tmp_path: Path) -> None:
    assert_one_line(push(hub, tmp_path, checkpoint, "me/model"), "neither a bundle nor a checkpoint that quantize made")
    assert_one_line(push(hub, tmp_path, tmp_path / "nowhere", "me/model"), "neither a bundle nor")


def test_no_network_is_one_line(bundle: Path, tmp_path: Path) -> None:
    hub = WritableHub()
    hub.endpoint = "http://127.0.0.1:9"
    assert_one_line(push(hub, tmp_path, bundle, "me/model"), "127.0.0.1:9 cannot be reached", "check network and proxy")


def test_the_package_is_named_where_it_is_missing(bundle: Path) -> None:
    code = "import sys; sys.modules['huggingface_hub'] = None; sys.argv[0] = 'internvl-edge'; " + PROGRAM[2]
    done = subprocess.run(
        [sys.executable, "-c", code, "push", str(bundle), "me/model"], capture_output=True, text=True, check=False
    )
    assert_one_line(done, "huggingface_hub", "internvl-edge[hub]")


def test_what_was_pushed_runs_by_its_hub_id(hub: WritableHub, bundle: Path, tmp_path: Path) -> None:
    commit = json.loads(push(hub, tmp_path, bundle, "me/model", "--json").stdout)["commit"]
    repository = hub.repositories["me/model"]
    repository.commit("main", {"manifest.json": b"{}"}, "something else since")
    question = ("What is this?", "--max-new-tokens", "4", "--device", "cpu", "--engine", "onnxruntime", "--json")
    here = internvl_edge("run", bundle, *question)
    place = {"environment": environment(hub, tmp_path), "directory": tmp_path}
    away = internvl_edge("run", "me/model", "--revision", commit, *question, **place)
    assert here.returncode == away.returncode == 0, here.stderr + away.stderr
    assert json.loads(away.stdout)["output_ids"] == json.loads(here.stdout)["output_ids"]


def test_an_original_from_the_hub_is_named_in_every_card(checkpoint: Path, tmp_path: Path) -> None:
    real = tmp_path / "models--org--model" / "snapshots" / ("0123456789" * 4)
    shutil.copytree(checkpoint, real)
    made = quantize_checkpoint(real, tmp_path / "made", Recipe(decoder="w8a16", error_compensation=False)).folder
    record = read_record(made)
    assert record is not None
    assert record.hub == HubSource("org/model", "0123456789" * 4)
    card = (made / "README.md").read_text()
    assert card == checkpoint_card(record, "remote", read_license(real))
    assert front_matter(card)["base_model"] == "org/model"
    assert front_matter(card)["base_model_relation"] == "quantized"
    assert front_matter(card)["tags"] == ["internvl", "8-bit"]
    exported = export_bundle(made, tmp_path / "bundle")
    card = bundle_card(Manifest.read(exported), record)
    assert front_matter(card)["base_model"] == "org/model"
    assert front_matter(card)["license"] == "other"
    floats = bundle_card(Manifest.read(export_bundle(real, tmp_path / "floats")))
    assert "base_model_relation" not in front_matter(floats)
