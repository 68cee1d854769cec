"""A batch on a cluster: what is refused before it starts, items as rows of a table, and faults on a real cluster."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from helpers import tiny
from helpers.commands import assert_one_line, internvl_edge
from helpers.repository import REPOSITORY
from internvl_edge import EdgeError, export_bundle
from internvl_edge.base.errors import BundleError
from internvl_edge.base.extras import missing_modules
from internvl_edge.batch.cluster import SPARE_CPUS, Fleet, fitting_workers, parse_workers, require_protection
from internvl_edge.batch.inputs import read_items
from internvl_edge.batch.items import Ask, Item
from internvl_edge.batch.journal import bundle_digest
from internvl_edge.batch.node_bundle import node_bundle
from internvl_edge.batch.worker import item_of, write_items
from internvl_edge.bundle.bundle import Bundle
from internvl_edge.bundle.manifest import Manifest
from internvl_edge.runtime.answer_format import AnswerFormat

needs_parquet = pytest.mark.skipif(bool(missing_modules("parquet")), reason="the extra parquet is not installed")


@pytest.fixture(scope="module")
def fleet_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fleet")
    return export_bundle(tiny.write_checkpoint(folder / "checkpoint", dtype="float32"), folder / "bundle")


# ---- what fits ----


@pytest.mark.parametrize(("text", "bounds"), [(None, (1, None)), ("4", (4, 4)), ("2:16", (2, 16)), ("1:1", (1, 1))])
def test_workers_are_a_number_or_bounds(text: str | None, bounds: tuple[int, int | None]) -> None:
    assert parse_workers(text) == bounds


@pytest.mark.parametrize("text", ["", "0", "-1", "2:1", ":4", "4:", "1:2:3", "many", "0:4", "1.5", "9" * 30])
def test_other_workers_are_refused(text: str) -> None:
    with pytest.raises(EdgeError, match=r"--workers is .*, expected a number such as 4, or bounds such as 2:16"):
        parse_workers(text)


@pytest.mark.parametrize(
    ("cpus", "per_worker", "fits"),
    [
        ([2, 2, 2], 1, 4),
        ([4], 1, 2),
        ([4, 4], 4, 1),
        ([8, 8], 3, 4),
        ([3, 3], 2, 2),
        ([16], 0.5, 28),
        ([2.5, 2.5], 1, 2),
    ],
)
def test_workers_leave_whole_cpus_for_reading(cpus: list[float], per_worker: float, fits: int) -> None:
    nodes = [{"CPU": count} for count in cpus]
    assert fitting_workers(nodes, Fleet("auto", 1, None, per_worker)) == (1, fits)
    assert fitting_workers(nodes, Fleet("auto", fits, fits, per_worker)) == (fits, fits)
    with pytest.raises(EdgeError, match=f"leaves room for {fits} workers .*; {fits + 1} were asked"):
        fitting_workers(nodes, Fleet("auto", fits + 1, None, per_worker))


def test_as_many_workers_fit_as_any_placement_allows() -> None:
    """Against all placements of workers on nodes."""
    for cpus, per_worker in product(product(range(6), repeat=3), (1, 2, 3)):
        best = max(
            (
                sum(placed)
                for placed in product(range(6), repeat=3)
                if all(count * per_worker <= total for count, total in zip(placed, cpus, strict=True))
                and sum(total - count * per_worker for count, total in zip(placed, cpus, strict=True)) >= SPARE_CPUS
            ),
            default=0,
        )
        nodes = [{"CPU": float(total)} for total in cpus]
        if best:
            assert fitting_workers(nodes, Fleet("auto", 1, None, per_worker))[1] == best, (cpus, per_worker)
        else:
            with pytest.raises(EdgeError, match="room for 0 workers"):
                fitting_workers(nodes, Fleet("auto", 1, None, per_worker))


def test_gpus_bound_workers_and_the_most_is_kept() -> None:
    nodes = [{"CPU": 16.0, "GPU": 2.0}, {"CPU": 16.0}]
    assert fitting_workers(nodes, Fleet("auto", 1, None, 4, 1)) == (1, 2)
    assert fitting_workers(nodes, Fleet("auto", 1, 1, 4, 1)) == (1, 1)
    with pytest.raises(EdgeError, match="4 CPUs and 1 GPUs"):
        fitting_workers(nodes, Fleet("auto", 3, None, 4, 1))


@pytest.mark.parametrize(
    ("address", "mode", "allowed"),
    [
        ("127.0.0.1:6379", "", True),
        ("localhost:6379", "", True),
        ("[::1]:6379", "", True),
        ("192.0.2.7:6379", "", False),
        ("192.0.2.7:6379", "disabled", False),
        ("192.0.2.7:6379", "token", True),
        ("head.example:6379", "", False),
        ("head.example:6379", "TOKEN", True),
    ],
)
def test_a_cluster_that_others_reach_must_ask_for_a_token(address: str, mode: str, allowed: bool) -> None:
    if allowed:
        require_protection(address, mode)
    else:
        with pytest.raises(EdgeError, match=r"asks for no token, .*RAY_AUTH_MODE=token"):
            require_protection(address, mode)


# ---- items and the bundle of a node ----


@needs_parquet
def test_items_are_the_same_after_the_table(tmp_path: Path) -> None:
    from pyarrow import parquet

    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    rows = [
        {"id": "one", "images": ["a.png"], "prompt": "?", "choices": ["a", "b"], "votes": 3, "sure": 0.9, "note": "x"},
        {"id": "two", "prompt": "?", "json_schema": {"type": "object"}, "max_new_tokens": 3, "stop": ["."]},
        {"id": "ü", "images": ["data:image/png;base64,AAAA"], "regex": "a+", "seed": 4},
    ]
    table = tmp_path / "in.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    asked = read_items(table, Ask("What?", options={"temperature": 0.5}), keep=("note",)).items

    class Cell:
        name = "digest"

        def read(self) -> bytes:
            return data

    asked = [*asked, Item("held", "row 1", Ask("?", AnswerFormat.json_object(compact=True)), (Cell(),), ("digest",))]  # type: ignore[arg-type]
    name = b"caf\xe9.png".decode("utf-8", "surrogateescape")
    Image.new("RGB", (4, 4)).save(tmp_path / "scans.png")
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans.png").rename(tmp_path / "scans" / name)
    asked += read_items(tmp_path / "scans", Ask("?")).items
    write_items(asked, tmp_path / "items.parquet")
    read = parquet.read_table(tmp_path / "items.parquet").to_pylist()
    found = [item_of(row["item"], row["pictures"]) for row in read]
    assert [row["id"] for row in read] == [item.id for item in asked]
    for before, after in zip(asked, found, strict=True):
        assert after.request == before.request
        assert (after.id, after.place, after.names, dict(after.kept)) == (
            before.id,
            before.place,
            before.names,
            dict(before.kept),
        )
        assert json.dumps(after.ask.described()) == json.dumps(before.ask.described())
        assert after.ask.choices == before.ask.choices
    assert found[0].images == (str(tmp_path / "a.png"),)
    assert found[2].images == ("data:image/png;base64,AAAA",)
    assert found[3].images == (data,)
    assert found[4].images == (str(tmp_path / "scans" / name),), "a name that is not UTF-8"


def test_a_node_refuses_another_bundle_and_a_damaged_one(
    fleet_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    digest = bundle_digest(Manifest.read(fleet_bundle))
    assert node_bundle(str(fleet_bundle), digest) == fleet_bundle
    node = socket.gethostname()
    with pytest.raises(BundleError, match=rf"on node {node}: .* is another bundle"):
        node_bundle(str(fleet_bundle), "0" * 64)
    with pytest.raises(BundleError, match=f"on node {node}: .* is not a bundle"):
        node_bundle(str(tmp_path / "none"), digest)
    copied = shutil.copytree(fleet_bundle, tmp_path / "bundle")
    weights = copied / "decoder.onnx"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(BundleError, match=f"on node {node}: .*decoder.onnx was changed"):
        node_bundle(str(copied), digest)


@needs_parquet
def test_a_bundle_at_an_address_is_fetched_once(
    fleet_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    away = shutil.copytree(fleet_bundle, tmp_path / "away")
    digest = bundle_digest(Manifest.read(away))
    folder = node_bundle(f"file://{away}", digest)
    assert folder.is_relative_to(tmp_path / "cache")
    assert Bundle.open(folder).manifest.fingerprint == Manifest.read(fleet_bundle).fingerprint
    shutil.rmtree(away / "decoder.onnx", ignore_errors=True)
    (away / "decoder.onnx").unlink(missing_ok=True)
    assert node_bundle(f"file://{away}", digest) == folder, "what is in the cache is not fetched again"
    with pytest.raises(BundleError, match="another bundle now"):
        node_bundle(f"file://{away}", "0" * 64)
    with pytest.raises(BundleError, match="cannot be read"):
        node_bundle(f"file://{tmp_path}/none")
    with pytest.raises(BundleError, match="cannot be read"):
        node_bundle("nowhere://x/y")


@needs_parquet
def test_half_a_copy_is_never_a_bundle(fleet_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    away = shutil.copytree(fleet_bundle, tmp_path / "away")
    (away / "tokenizer.json").unlink()
    with pytest.raises(BundleError, match=r"tokenizer.json cannot be read"):
        node_bundle(f"file://{away}")
    assert not list((tmp_path / "cache" / "bundles").glob("[0-9a-f]*/"))
    shutil.copy(fleet_bundle / "tokenizer.json", away)
    assert node_bundle(f"file://{away}").is_dir()


# ---- the command ----


def test_options_of_a_cluster_and_of_one_machine_do_not_mix(fleet_bundle: Path, tmp_path: Path) -> None:
    asked = ("batch", fleet_bundle, tmp_path, "-o", tmp_path / "out", "--prompt", "?")
    assert_one_line(internvl_edge(*asked, "--workers", "2"), "--workers", "give --ray, or none")
    assert_one_line(internvl_edge(*asked, "--ray", "auto", "--ordered"), "--ordered", "leave them out with --ray")
    assert_one_line(internvl_edge(*asked, "--ray", "auto", "--workers", "none"), "--workers is 'none'")


@pytest.mark.skipif(not missing_modules("fleet"), reason="ray is installed")
def test_without_ray_the_command_says_how_to_install_it(fleet_bundle: Path, tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    asked = ("batch", fleet_bundle, tmp_path / "a.png", "-o", tmp_path / "out", "--prompt", "?", "--ray", "auto")
    assert_one_line(internvl_edge(*asked), "ray", "internvl-edge[fleet]")


needs_ray = pytest.mark.skipif(bool(missing_modules("fleet")), reason="the extra fleet is not installed")


@needs_ray
@pytest.mark.parametrize(
    ("address", "said"), [("127.0.0.1:1", "nobody listens at 127.0.0.1:1"), ("nowhere", "expected auto or HOST:PORT")]
)
def test_an_address_where_no_cluster_is_ends_at_once(
    fleet_bundle: Path, tmp_path: Path, address: str, said: str
) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    asked = ("batch", fleet_bundle, tmp_path / "a.png", "-o", tmp_path / "out", "--prompt", "?", "--ray", address)
    assert_one_line(internvl_edge(*asked), said)


@needs_ray
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Ray runs several nodes on one machine on Linux")
def test_every_id_is_there_once_after_killed_workers_a_lost_node_and_a_killed_driver(
    fleet_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The script of the measurement, over fewer images."""
    work, images, damaged = tmp_path_factory.mktemp("f"), 240, 3
    results = work / "results.json"
    command = [sys.executable, REPOSITORY / "benchmarks" / "fleet_faults.py", fleet_bundle, work / "w"]
    options = ["--images", str(images), "--damaged", str(damaged), "--results", results]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))
    refused = found["refused"]
    assert [each["exit"] for each in refused.values()] == [2, 2]
    assert "2 CPUs on 1 nodes, which leaves room for 0 workers" in refused["no spare CPU"]["said"]
    assert "beside 2 CPUs for reading and writing; 6 were asked for" in refused["more workers than fit"]["said"]
    assert found["killed"] == {"workers": 3, "nodes": 1, "drivers": 1}
    output = found["output"]
    assert (output["rows"], output["distinct_ids"], output["ids_more_than_once"]) == (images, images, 0)
    assert output["errors"] == found["damaged"]
    assert len(found["damaged"]) == damaged
    assert 0 < found["after_the_driver_was_killed"]["rows"] < images
    assert found["computed_again"] == sum(found["computed"].values()) - images >= 0
    assert found["computed"]["third run"] == 0, "a complete output asks nothing"
    said = found["second_run_said"]
    assert (said["answered"], said["failed"], said["earlier"] > 0) == (images - damaged, damaged, True)
    assert sum(worker["items"] for worker in said["workers"]) == found["computed"]["second run"]
    assert (found["exit_of_second_run"], found["exit_of_third_run"]) == (1, 1), "some rows have errors"
