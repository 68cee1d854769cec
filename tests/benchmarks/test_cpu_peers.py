"""`cpu_peers.py` keeps what it measured of all programs when one of them ends, at whatever moment."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from helpers.repository import REPOSITORY
from internvl_edge import export_bundle
from internvl_edge.demo import CHECKPOINT

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import cpu_peers
import cpu_peers_table

# A worker that ends at one request: argument 1 is what it does last.
WORKER = """
import json, sys
last = sys.argv[1]
if last == "load":
    sys.exit(3)
print(json.dumps({"load_s": 0.5, "can": ["prefill", "decode"]}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if request["do"] == last:
        print("Segmentation fault", flush=True) if last == "decode" else sys.exit(139)
    elif request["do"] == "memory":
        print(json.dumps({"resident": 1, "anonymous": 1}), flush=True)
    else:
        print(json.dumps({"seconds": 0.25}), flush=True)
"""


@pytest.mark.parametrize(
    ("last", "failed", "rows"),
    [
        ("none", "", {"prefill 300", "prefill 1800", "decode 300", "decode 2000"}),
        ("load", "loading: exit status 3", set()),
        ("prefill", "prefill 300: exit status 139", set()),
        ("decode", "decode 300: answered 'Segmentation fault\\n'", {"prefill 300", "prefill 1800"}),
        ("memory", "memory 0: exit status 139", {"prefill 300", "prefill 1800"}),
    ],
)
def test_a_program_that_ends_costs_the_others_nothing(tmp_path: Path, last: str, failed: str, rows: set[str]) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    workers = [
        cpu_peers.Worker(name, [sys.executable, str(script), ends], [tmp_path / "absent"])
        for name, ends in (("good", "none"), ("bad", last), ("missing", "none"))
    ]
    workers[2].command[0] = str(tmp_path / "no-such-python")
    kept: list[dict[str, object]] = []
    try:
        cpu_peers.measure(
            workers, ["prefill", "decode"], 2, lambda: kept.append({worker.label: worker.facts() for worker in workers})
        )
    finally:
        for worker in workers:
            worker.stop()
    assert len(kept) == 2, "what is known is kept after every row"
    good, bad, missing = (worker.facts() for worker in workers)
    assert set(good["rows"]) == {"prefill 300", "prefill 1800", "decode 300", "decode 2000"}
    assert good["rows"]["prefill 300"]["tokens_per_s"] == 1200
    assert bad.get("failed", "") == failed
    assert set(bad["rows"]) == rows
    assert "No such file" in missing["failed"]
    table = cpu_peers_table.table({"programs": {"good": good, "bad": bad, "missing": missing}})
    assert len(table.splitlines()) == 5


def test_our_worker_answers_every_request(tmp_path: Path) -> None:
    """One process for all rows, also after the cache has become one of several sequences."""
    export_bundle(CHECKPOINT, tmp_path / "bundle", dialects=["onnxruntime"])
    worker = cpu_peers.ours(f"demo={tmp_path / 'bundle'},engine=onnxruntime")
    try:
        worker.start()
        assert not worker.failed
        seconds = {
            (do, count, time): (worker.ask(do, count) or {}).get("seconds", 0)
            for time in (1, 2)
            for do, count in (("prefill", 300), ("decode", 300), ("decode", 2000), ("rows", 4))
        }
        memory = worker.ask("memory")
    finally:
        worker.stop()
    assert not worker.failed
    assert all(value > 0 for value in seconds.values())
    assert memory is not None
    assert memory["resident"] > memory["anonymous"] > 1 << 20
    known = worker.known
    assert known["form"]["bits"] == 16
    assert known["token_bytes"]["decode 300"] < known["token_bytes"]["decode 8000"]
    assert known["operations"]["prefill 1800"] > 6 * known["operations"]["prefill 300"]


def test_rows_count_the_tokens_of_all_sequences() -> None:
    row = cpu_peers._row("rows 4", [2.0, 2.0])
    assert row["tokens_per_s"] == 4 * cpu_peers.DECODED / 2


def test_the_int8_rate_is_an_integer_product_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_peers, "_MATRIX", 128)
    assert 1e8 < cpu_peers.int8_matrix_rate() < 1e14
