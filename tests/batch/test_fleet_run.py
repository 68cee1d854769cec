"""A run on a cluster, with something else in the place of Ray Data: what goes on after a loss, and what ends a run."""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from internvl_edge import EdgeError
from internvl_edge.base.errors import EngineError
from internvl_edge.base.extras import missing_modules
from internvl_edge.base.progress import Progress
from internvl_edge.batch import fleet
from internvl_edge.batch.cluster import Fleet, is_rays_own
from internvl_edge.batch.items import Ask, Item
from internvl_edge.batch.worker import Job

pytestmark = pytest.mark.skipif(bool(missing_modules("parquet")), reason="the extra parquet is not installed")
needs_ray = pytest.mark.skipif(bool(missing_modules("fleet")), reason="the extra fleet is not installed")

IDS = [f"{number:02}" for number in range(10)]
JOB = Job("bundle", "0" * 64, {"device": "cpu"}, rows=1)


class LostError(Exception):
    """What Ray raises after it lost a node."""


class Remarks(Progress):
    """A progress that keeps what is remarked and noted."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def remark(self, line: str) -> None:
        self.lines.append(line)

    note = remark


class Cluster:
    """What a run asks of Ray and of Ray Data: nodes, and a pipeline that commits rows.

    Attributes:
        cpus: of each node that lives.
        asked: ids that each pipeline found unfinished, in the order of the pipelines.
        steps: what each pipeline does with its ids.
    """

    def __init__(self, output: Path, cpus: Sequence[float], steps: Sequence[Callable[[list[str]], None]]) -> None:
        self.output, self.cpus, self.steps = output, cpus, list(steps)
        self.asked: list[list[str]] = []

    def nodes(self) -> list[dict[str, Any]]:
        gone = {"Alive": False, "Resources": {"CPU": 64.0}}
        return [gone, *({"Alive": True, "Resources": {"CPU": float(count)}} for count in self.cpus)]

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(gcs_address="127.0.0.1:6379")

    @property
    def checkpoint(self) -> Path:
        return self.output / "_batch" / "checkpoint"

    def pipeline(self, left: int) -> None:
        from pyarrow import parquet

        for path in self.checkpoint.glob("*.pending.parquet"):  # as Ray Data does when it starts
            for rows in self.output.glob(f"{path.name.removesuffix('.pending.parquet')}*"):
                rows.unlink()
            path.unlink()
        done: set[str] = set()
        for path in self.checkpoint.glob("*.parquet"):
            done.update(parquet.read_table(path).column("id").to_pylist())
        todo = [each for each in IDS if each not in done]
        assert len(todo) == left
        self.asked.append(todo)
        self.steps.pop(0)(todo)

    def commit(self, ids: Sequence[str], error: str | None = None) -> None:
        """Write a block as Ray Data does: its ids, its rows, and its ids are committed."""
        import pyarrow
        from pyarrow import parquet

        self.checkpoint.mkdir(exist_ok=True)
        pending = self.checkpoint / f"a_{ids[0]}.pending.parquet"
        parquet.write_table(pyarrow.table({"id": list(ids)}), pending)
        rows = [{"id": each, "error": error, "request": requests()[each]} for each in ids]
        schema = pyarrow.schema([("id", pyarrow.string()), ("error", pyarrow.string()), ("request", pyarrow.string())])
        parquet.write_table(pyarrow.Table.from_pylist(rows, schema), self.output / f"a_{ids[0]}-0.parquet")
        pending.rename(self.checkpoint / f"a_{ids[0]}.parquet")

    def half_commit(self, ids: Sequence[str]) -> None:
        """Leave what a process leaves that is killed while it writes the rows of a block."""
        self.commit(ids)
        rows = self.output / f"a_{ids[0]}-0.parquet"
        rows.write_bytes(rows.read_bytes()[:100])
        (self.checkpoint / f"a_{ids[0]}.parquet").rename(self.checkpoint / f"a_{ids[0]}.pending.parquet")


def items() -> list[Item]:
    return [Item(each, f"row {each}", Ask("What?"), (), ()) for each in IDS]


def requests() -> dict[str, str]:
    return {item.id: item.request for item in items()}


@pytest.fixture
def begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Cluster]]:
    """Put a cluster in the place of Ray."""
    ended = threading.Event()

    def begin(cpus: Sequence[float], *steps: Callable[[Cluster, list[str]], None]) -> Cluster:
        cluster = Cluster(tmp_path / "out", cpus, [])
        cluster.steps = [lambda ids, step=step: step(cluster, ids) for step in steps]  # type: ignore[misc]
        monkeypatch.setattr(fleet, "connected", lambda address: contextlib.nullcontext(cluster))
        monkeypatch.setattr(fleet._Run, "_pipeline", lambda run, ray, left: ray.pipeline(left))
        return cluster

    monkeypatch.setattr(fleet, "require_extras", lambda *names: None)
    monkeypatch.setattr(fleet, "is_rays_own", lambda error: isinstance(error, LostError))
    monkeypatch.setattr(fleet, "_PAUSES", (0.0, 0.0, 0.0))
    monkeypatch.setattr(fleet, "_LOOK", 0.02)
    monkeypatch.setattr(Cluster, "ended", ended, raising=False)
    yield begin
    ended.set()


def run(
    cluster: Cluster,
    workers: Fleet,
    progress: Progress | None = None,
    record: Mapping[str, Any] | None = None,
    max_errors: int | None = None,
) -> fleet.FleetSummary:
    job = replace(JOB, max_errors=max_errors)
    return fleet.run_fleet(job, items(), cluster.output, record or {}, workers, progress or Remarks())


def finish(cluster: Cluster, ids: list[str]) -> None:
    cluster.commit(ids)


def test_a_run_goes_on_after_losses_and_asks_nothing_again(begin: Callable[..., Cluster]) -> None:
    def first(cluster: Cluster, ids: list[str]) -> None:
        cluster.commit(ids[:4])
        raise LostError("traceback\nits node has died")

    def fruitless(cluster: Cluster, ids: list[str]) -> None:
        raise LostError("its node has died")

    def second(cluster: Cluster, ids: list[str]) -> None:
        cluster.commit(ids[:3])
        raise LostError("an object was lost")

    cluster = begin([2, 2, 2], first, fruitless, fruitless, second, fruitless, finish)
    progress = Remarks()
    done = run(cluster, Fleet("auto", 1, 4), progress)
    assert cluster.asked == [IDS, IDS[4:], IDS[4:], IDS[4:], IDS[7:], IDS[7:]]
    assert (done.answered, done.failed, done.earlier, done.restarts, done.stopped) == (10, 0, 0, 5, "")
    said = "Ray ended the work (its node has died); 4 of 10 rows are finished, and the batch goes on with the others"
    assert progress.lines[1:4] == [said] * 3


def test_a_loss_after_the_last_row_is_no_failure(begin: Callable[..., Cluster]) -> None:
    def last(cluster: Cluster, ids: list[str]) -> None:
        cluster.commit(ids)
        raise LostError("its node has died")

    done = run(begin([4], last), Fleet("auto"))
    assert (done.answered, done.restarts) == (10, 1)


def test_three_losses_without_a_finished_row_end_a_run(begin: Callable[..., Cluster]) -> None:
    def first(cluster: Cluster, ids: list[str]) -> None:
        cluster.commit(ids[:4])
        raise LostError("its node has died")

    def fruitless(cluster: Cluster, ids: list[str]) -> None:
        raise LostError("its node has died")

    cluster = begin([4], first, *[fruitless] * 3)
    with pytest.raises(EdgeError, match="the cluster failed: its node has died; finished rows are kept"):
        run(cluster, Fleet("auto"))
    assert cluster.asked == [IDS, *[IDS[4:]] * 3]
    cluster.steps.append(lambda ids: cluster.commit(ids))
    assert run(cluster, Fleet("auto")).earlier == 4, "the next command continues"


def test_what_a_worker_raises_ends_a_run_at_once(begin: Callable[..., Cluster]) -> None:
    def broken(cluster: Cluster, ids: list[str]) -> None:
        raise EdgeError("on node a: the bundle is another bundle")

    cluster = begin([4], broken)
    with pytest.raises(EngineError, match=r"a worker cannot go on: on node a: .*; finished rows are kept"):
        run(cluster, Fleet("auto"))
    assert len(cluster.asked) == 1


def test_a_cluster_without_a_spare_cpu_is_refused_before_anything_runs(begin: Callable[..., Cluster]) -> None:
    cluster = begin([1, 1])
    with pytest.raises(EdgeError, match=r"has 2 CPUs on 2 nodes, which leaves room for 0 workers of 1 CPUs"):
        run(cluster, Fleet("auto"))
    assert cluster.asked == []


def test_a_cluster_that_loses_its_room_ends_a_run_by_name(
    begin: Callable[..., Cluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray Data would wait for ever, and say nothing."""
    monkeypatch.setattr(fleet, "_PATIENCE", 0.2)

    def hangs(cluster: Cluster, ids: list[str]) -> None:
        cluster.commit(ids[:4])
        cluster.cpus = [2]
        cluster.ended.wait()  # type: ignore[attr-defined]

    cluster = begin([2, 2, 2], hangs)
    said = r"nothing was finished in 0 s, and the cluster has 2 CPUs on 1 nodes, which leaves room for 0 workers"
    with pytest.raises(EdgeError, match=said + ".*; finished rows are kept"):
        run(cluster, Fleet("auto", 4, 4))
    cluster.cpus = [4]
    cluster.steps.append(lambda ids: cluster.commit(ids))
    assert run(cluster, Fleet("auto")).earlier == 4


def test_a_cluster_with_fewer_nodes_than_at_the_start_goes_on(
    begin: Callable[..., Cluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for one worker is enough, although four were asked for, and slow work is no hang."""
    monkeypatch.setattr(fleet, "_PATIENCE", 0.1)

    def slow(cluster: Cluster, ids: list[str]) -> None:
        cluster.cpus = [3]
        cluster.ended.wait(0.6)  # type: ignore[attr-defined]
        cluster.commit(ids)

    assert run(begin([2, 2, 2], slow), Fleet("auto", 4, 4)).answered == 10


@pytest.mark.parametrize("finished", [0, 4, 9])
def test_a_block_whose_rows_may_be_half_is_not_finished(begin: Callable[..., Cluster], finished: int) -> None:
    """A killed process leaves ids that Ray Data did not commit, and part of their rows."""

    def killed(cluster: Cluster, ids: list[str]) -> None:
        if finished:
            cluster.commit(ids[:finished])
        cluster.half_commit(ids[finished:])
        raise LostError("its node has died")

    cluster = begin([4], killed, finish)
    assert (run(cluster, Fleet("auto")).answered, cluster.asked) == (10, [IDS, IDS[finished:]]), "in the same run"
    shutil.rmtree(cluster.output)

    cluster = begin([4], killed, *[lambda cluster, ids: (_ for _ in ()).throw(LostError("its node has died"))] * 3)
    with pytest.raises(EdgeError, match="the cluster failed"):
        run(cluster, Fleet("auto"))
    cluster.half_commit(IDS[finished:])
    cluster = begin([4], finish)
    done = run(cluster, Fleet("auto"))
    assert (done.earlier, done.answered, cluster.asked) == (finished, 10, [IDS[finished:]]), "in the next one"


@pytest.mark.parametrize("damaged", ["a_00-0.parquet", "_batch/checkpoint/a_00.parquet"])
def test_a_file_that_cannot_be_read_is_one_line_that_says_how_to_go_on(
    begin: Callable[..., Cluster], damaged: str
) -> None:
    """A power failure may leave an empty file under the name of a committed one."""
    cluster = begin([4], finish)
    run(cluster, Fleet("auto"))
    (cluster.output / damaged).write_bytes(b"")
    with pytest.raises(EdgeError, match=r"a_00.*\.parquet cannot be read \(.*\); remove it and .*a_00.*\.parquet, and"):
        run(cluster, Fleet("auto"))
    (cluster.output / "a_00-0.parquet").unlink()
    (cluster.checkpoint / "a_00.parquet").unlink()
    cluster.steps.append(lambda ids: cluster.commit(ids))
    assert run(cluster, Fleet("auto")).answered == 10


def test_a_lost_file_of_finished_rows_is_said_before_anything_runs(begin: Callable[..., Cluster]) -> None:
    cluster = begin([4], finish)
    run(cluster, Fleet("auto"))
    (cluster.output / "a_00-0.parquet").rename(cluster.output / "elsewhere")
    with pytest.raises(EdgeError, match=r"lacks the file of 10 finished rows, '00' .*checkpoint/a_00\.parquet, so"):
        run(cluster, Fleet("auto"))
    (cluster.output / "elsewhere").rename(cluster.output / "a_00-0.parquet")
    assert (run(cluster, Fleet("auto")).earlier, len(cluster.asked)) == (10, 1)


def test_errors_of_earlier_runs_count(begin: Callable[..., Cluster]) -> None:
    def some(cluster: Cluster, ids: list[str]) -> None:
        cluster.commit(ids[:3], error="damaged")
        raise EdgeError("ended")

    cluster = begin([4], some)
    with pytest.raises(EngineError):
        run(cluster, Fleet("auto"))
    stopped = run(cluster, Fleet("auto"), max_errors=2)
    assert (stopped.failed, stopped.stopped) == (3, "3 rows have errors, more than --max-errors 2")
    assert len(cluster.asked) == 1, "nothing was begun"
    cluster.steps.append(lambda ids: cluster.commit(ids))
    assert run(cluster, Fleet("auto"), max_errors=3).answered == 7


def test_another_record_is_refused_only_where_there_are_rows(begin: Callable[..., Cluster]) -> None:
    def nothing(cluster: Cluster, ids: list[str]) -> None:
        raise EdgeError("ended")

    cluster = begin([4], nothing, finish)
    with pytest.raises(EngineError):
        run(cluster, Fleet("auto"), record={"prompt": "Why?", "versions": {"a": "1"}})
    run(cluster, Fleet("auto"), record={"prompt": "What?", "versions": {"a": "1"}})
    with pytest.raises(EdgeError, match=r"was begun with prompt 'What\?', and not 'Why\?'"):
        run(cluster, Fleet("auto"), record={"prompt": "Why?", "versions": {"a": "1"}})
    progress = Remarks()
    run(cluster, Fleet("auto"), progress, record={"prompt": "What?", "versions": {"a": "2"}})
    assert progress.lines[0].endswith("was begun with other versions: 'a 1'"), "as on one machine"


@needs_ray
def test_errors_of_ray_are_told_from_errors_of_workers() -> None:
    from ray import exceptions

    def of_task(cause: Exception) -> exceptions.RayTaskError:
        return exceptions.RayTaskError("f", "traceback", cause, proctitle="p", pid=1, ip="127.0.0.1")

    died, system = exceptions.ActorDiedError(), RuntimeError("marks an error of Ray Data itself")
    lost: list[BaseException] = [
        died,
        exceptions.NodeDiedError("its node has died"),
        exceptions.ObjectLostError("00", None, ""),
        exceptions.WorkerCrashedError(),
        exceptions.UnserializableException("text of an error that cannot be read back"),
        of_task(died).as_instanceof_cause(),
        of_task(exceptions.NodeDiedError("its node has died")),
    ]
    died.__cause__ = system
    raised: list[BaseException] = [
        EdgeError("on node a: another bundle"),
        of_task(EdgeError("on node a: another bundle")).as_instanceof_cause(),
        of_task(MemoryError("of a worker")),
        exceptions.ActorDiedError(of_task(EdgeError("in the constructor"))),
        exceptions.ActorDiedError(of_task(ImportError("in the constructor"))),
        OSError(28, "no space left on device"),
    ]
    assert [is_rays_own(error) for error in lost] == [True] * len(lost)
    assert [is_rays_own(error) for error in raised] == [False] * len(raised)
