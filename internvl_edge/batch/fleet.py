"""Answer a batch on a Ray cluster: Ray Data moves the items, its actors hold the bundle, Parquet files hold the rows.

A block of items is the unit of work. Ray Data writes the ids of a block before its file and commits them after it, so
an id is in the output once, whatever was killed; a block that was under way is computed again. Everything lies in the
folder of the output, which all nodes must see:

    OUT/*.parquet               rows
    OUT/_batch/record.json      what decides all answers; a batch continues only under the same record
    OUT/_batch/items.parquet    what is asked
    OUT/_batch/checkpoint/      ids that are finished, by Ray Data
    OUT/_batch/computed/        what each worker computed: one small file for each block, also of repeated work

Ray is imported where it is used: it is an extra of its own.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from internvl_edge.base.errors import EdgeError
from internvl_edge.base.extras import require_extras
from internvl_edge.base.files import readable_disk_errors
from internvl_edge.base.locks import only_writer
from internvl_edge.base.progress import SILENT, Progress, Step
from internvl_edge.base.text import shown
from internvl_edge.base.units import rounded

from .cluster import Fleet, connected, fitting_workers, is_rays_own, last_line, worker_failure
from .items import Item
from .journal import check_record, warn_of_versions
from .run import Summary, too_many
from .worker import Job, Worker, WorkerSummary, WorkLog, write_items

_PRIVATE = "_batch"
# How the name of a checkpoint of Ray Data ends whose rows may not be in their file yet.
_PENDING = ".pending.parquet"
# Rows of a block: the most work that is lost with a worker, and the fewest rows of a file.
_SMALLEST_BLOCK, _LARGEST_BLOCK = 8, 1000
_BLOCKS_PER_WORKER = 20
# Memory that Ray sets aside for the filter of finished ids; Ray Data's own gigabyte does not fit small boxes.
_FILTER_BYTES = 64 << 20
# Seconds between two looks at the work, and without any progress until a cluster that lost nodes is given up.
_LOOK = 1.0
_PATIENCE = 120.0
# Seconds until the batch goes on after Ray ended the work, by how often it did so since a row was finished; one time
# more ends the batch. Ray needs up to a minute to notice a lost node, and until then it may put work there.
_PAUSES = (5.0, 20.0, 60.0)
_OTHER = "give another --output"


@dataclass(frozen=True)
class FleetSummary(Summary):
    """What a run on a cluster did.

    Attributes:
        repeated: rows that were computed in this run and thrown away, because their worker or node died.
        restarts: times that Ray ended the work, as it may after the loss of a node, and the run went on.
        workers: each by itself.
    """

    repeated: int = 0
    restarts: int = 0
    workers: tuple[WorkerSummary, ...] = ()


def run_fleet(
    job: Job,
    items: Sequence[Item],
    output: Path,
    record: Mapping[str, Any],
    fleet: Fleet,
    progress: Progress = SILENT,
) -> FleetSummary:
    """Answer items on a cluster, and write the rows into a folder of Parquet files.

    A call with the same output continues: finished ids are not asked again.

    Args:
        job: what workers do.
        items: what is asked. Their images are files that every node sees, or bytes.
        output: the folder; it is made, and every node sees it.
        record: what decides the answers of all rows, see `journal.answering_record`.
        fleet: where.
        progress: shows the rows so far.

    Raises:
        EdgeError: Ray is missing, or its cluster is not reachable, not protected or too small; the folder was begun
            under another record; a worker failed; or nodes were lost and no room for reading is left.
    """
    require_extras("a batch on a Ray cluster", "fleet")
    folder = output / _PRIVATE
    with readable_disk_errors(output, "make room", _OTHER):
        if output.exists() and not output.is_dir():
            raise EdgeError(f"{output} is no folder, and a cluster writes a folder of Parquet files; {_OTHER}")
        if output.is_dir() and any(output.iterdir()) and not folder.is_dir():
            raise EdgeError(f"{output} holds something else than a batch of a cluster; {_OTHER}")
        (folder / "computed").mkdir(parents=True, exist_ok=True)
        with only_writer(output, _OTHER):
            is_new = not any((folder / "checkpoint").glob("*.parquet"))
            warn_of_versions(
                check_record(folder / "record.json", output, record, _OTHER, is_new=is_new), output, progress
            )
            return _Run(job, items, output, fleet, progress).run()


class _RayError(Exception):
    """Ray ended a pipeline, most likely because it had lost a node, a worker or an object."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(error)
        self.error = error


class _Run:
    """One run on a cluster."""

    def __init__(self, job: Job, items: Sequence[Item], output: Path, fleet: Fleet, progress: Progress) -> None:
        self._items, self._output, self._folder = items, output.absolute(), output.absolute() / _PRIVATE
        self._fleet, self._max_errors, self._progress = fleet, job.max_errors, progress
        run, threads = secrets.token_hex(6), job.loading.get("threads") or max(1, int(fleet.cpus))
        self._worker: dict[str, Any] = {
            "job": replace(job, loading={**job.loading, "threads": threads}),
            "work": str(self._folder / "computed"),
            "run": run,
            "kept": list(dict.fromkeys(name for item in items for name in item.kept)),
        }
        self._work = WorkLog(self._folder / "computed", run)
        self._restarts = self._failed = 0
        self._began = time.monotonic()

    def run(self) -> FleetSummary:
        """Compute what is missing."""
        self._failed = self._check_finished()
        earlier = len(self._finished_ids())
        if earlier == len(self._items):
            return self._summary(earlier, "")
        if stopped := too_many(self._failed, self._max_errors):
            return self._summary(earlier, stopped)
        write_items(self._items, self._folder / "items.parquet")
        with connected(self._fleet.address) as ray:
            least, room = fitting_workers(_alive(ray), self._fleet)
            self._progress.remark(
                f"{least} workers to begin with, and room for {room}, on {ray.get_runtime_context().gcs_address}"
            )
            self._began = time.monotonic()
            with self._progress.phase("answering", len(self._items), "items") as step:
                step(earlier)
                stopped = self._compute(ray, step, earlier)
        return self._summary(earlier, stopped)

    def _compute(self, ray: Any, step: Step, earlier: int) -> str:
        """Compute until all ids are finished, whatever Ray loses. Returns why it was stopped, "" if it was not."""
        finished, fruitless = earlier, 0
        while finished < len(self._items):
            try:
                return self._attempt(ray, step, earlier, len(self._items) - finished)
            except _RayError as ended:
                before, finished = finished, len(self._finished_ids())
                fruitless = 0 if finished > before else fruitless + 1
                if fruitless >= len(_PAUSES):
                    raise worker_failure(ended.error) from None
                self._restarts += 1
                self._progress.remark(
                    f"Ray ended the work ({last_line(ended.error)}); {finished} of {len(self._items)} rows are "
                    "finished, and the batch goes on with the others"
                )
                time.sleep(_PAUSES[fruitless])
        return ""

    def _attempt(self, ray: Any, step: Step, earlier: int, left: int) -> str:
        """Run the pipeline in a thread, and watch it. Returns why it was stopped, "" if it was not.

        Raises:
            EdgeError: the cluster has no room left, or a worker failed.
            _RayError: Ray ended the pipeline.
        """
        failures: list[BaseException] = []

        def work() -> None:
            try:
                self._pipeline(ray, left)
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=work, name="fleet", daemon=True)
        thread.start()
        moved = time.monotonic()
        while thread.is_alive():
            thread.join(_LOOK)
            done = min(self._work.read().items, len(self._items) - earlier)
            if new := done - (step.done - earlier):
                seconds = time.monotonic() - self._began
                failed = self._failed + self._work.failed
                step.facts = f"{rounded(done / max(seconds, 1e-9))} items/s, {failed} with errors"
                step(new)
                moved = time.monotonic()
            if stopped := too_many(self._failed + self._work.failed, self._max_errors):
                return stopped
            if time.monotonic() - moved > _PATIENCE:
                self._require_room(ray)
        if failures:
            raise _RayError(failures[0]) if is_rays_own(failures[0]) else worker_failure(failures[0])
        return ""

    def _pipeline(self, ray: Any, left: int) -> None:
        import ray.data as data
        from ray.data.checkpoint import CheckpointConfig

        # Ray Data sets up its loggers when it is imported. What it writes of an error are pages of tracebacks.
        for name in ("ray.data", "ray"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        context = data.DataContext.get_current()
        config = CheckpointConfig("id", str(self._folder / "checkpoint"), delete_checkpoint_on_success=False)
        config.checkpoint_actor_memory_bytes = _FILTER_BYTES
        context.checkpoint_config = config
        context.enable_progress_bars = False
        context.max_errored_blocks = 0
        _, room = fitting_workers(_alive(ray), replace(self._fleet, least=0))
        block = min(max(left // (max(room, 1) * _BLOCKS_PER_WORKER), _SMALLEST_BLOCK), _LARGEST_BLOCK)
        found = data.read_parquet(str(self._folder / "items.parquet"), num_cpus=0.1)
        found = found.repartition(target_num_rows_per_block=block)
        found = found.map_batches(
            Worker,
            fn_constructor_kwargs=self._worker,
            batch_size=None,
            batch_format="pyarrow",
            # Ray Data adds workers while its budget has CPUs for them, also on nodes that join later. It takes workers
            # away where nodes were lost, so a single one is all that it may wait for.
            compute=data.ActorPoolStrategy(
                min_size=1, max_size=self._fleet.most, initial_size=max(1, min(self._fleet.least, room))
            ),
            num_cpus=self._fleet.cpus,
            **({"num_gpus": self._fleet.gpus} if self._fleet.gpus else {}),
        )
        found.write_parquet(str(self._output), ray_remote_args={"num_cpus": 0.1})

    def _require_room(self, ray: Any) -> None:
        """Raise EdgeError where a cluster without progress has no room for reading beside a single worker."""
        try:
            fitting_workers(_alive(ray), replace(self._fleet, least=1))
        except EdgeError as error:
            raise EdgeError(f"nothing was finished in {_PATIENCE:.0f} s, and {error}; finished rows are kept") from None

    def _check_finished(self) -> int:
        """Return how many rows of earlier runs have errors.

        Raises:
            EdgeError: a row answers something else than the item of the same id, or a finished row is in no file.
        """
        asked = {item.id: item.request for item in self._items}
        checkpoints = self._checkpoints()  # before the rows: what is committed now is in a file then
        there: set[str] = set()
        failed = 0
        for each, request, error in self._rows("id", "request", "error"):
            if asked.get(each, request) != request:
                raise EdgeError(
                    f"{self._output} has an answer for {shown(each)} to another prompt, image or option; {_OTHER}"
                )
            there.add(each)
            failed += each in asked and error is not None
        for path in checkpoints:
            if lost := [each for (each,) in self._columns(path, "id") if each not in there]:
                raise EdgeError(
                    f"{self._output} lacks the file of {len(lost)} finished rows, {shown(lost[0])} for one; put it "
                    f"back, or remove {_PRIVATE}/checkpoint/{path.name}, so that they are asked again"
                )
        return failed

    def _checkpoints(self) -> list[Path]:
        """Return the files of ids that Ray Data committed."""
        return [path for path in (self._folder / "checkpoint").glob("*.parquet") if not path.name.endswith(_PENDING)]

    def _finished_ids(self) -> set[str]:
        """Return the ids that Ray Data committed."""
        wanted = {item.id for item in self._items}
        found: set[str] = set()
        for path in self._checkpoints():
            found.update(each for (each,) in self._columns(path, "id"))
        return found & wanted

    def _rows(self, *columns: str) -> Iterator[tuple[Any, ...]]:
        """Yield columns of all rows in the output, without files that are not committed, which may be half files.

        Ray Data removes those when it starts.
        """
        files = list(self._output.glob("*.parquet"))
        pending = {path.name.removesuffix(_PENDING) for path in (self._folder / "checkpoint").glob(f"*{_PENDING}")}
        for path in files:
            if _block(path) not in pending:
                yield from self._columns(path, *columns)

    def _columns(self, path: Path, *columns: str) -> Iterator[tuple[Any, ...]]:
        """Yield columns of the rows of a file that Ray Data wrote."""
        from pyarrow import ArrowException, parquet

        try:
            table = parquet.read_table(path, columns=list(columns))
            values = [table.column(name).to_pylist() for name in columns]
        except (ArrowException, LookupError, OSError) as error:
            is_checkpoint = path.parent != self._output
            other = f"{path.stem}-0.parquet" if is_checkpoint else f"{_PRIVATE}/checkpoint/{_block(path)}.parquet"
            raise EdgeError(
                f"{path} cannot be read ({last_line(error)}); remove it and {other}, and repeat the command, which "
                "asks their rows again"
            ) from None
        yield from zip(*values, strict=True)

    def _summary(self, earlier: int, stopped: str) -> FleetSummary:
        work = self._work.read()
        finished = len(self._finished_ids())
        wanted = {item.id for item in self._items}
        failed, counts = 0, 0
        ids: set[str] = set()
        for each, error in self._rows("id", "error"):
            if each in wanted:
                ids.add(each)
                counts += 1
                failed += error is not None
        if not stopped and not finished == counts == len(ids) == len(self._items):
            raise EdgeError(
                f"{self._output} has {counts} rows of {len(ids)} ids, {finished} of them finished, for "
                f"{len(self._items)} items; repeat the command, and report this if it stays so"
            )
        return FleetSummary(
            items=len(self._items),
            earlier=earlier,
            answered=finished - min(failed, finished),
            failed=failed,
            output_tokens=work.output_tokens,
            seconds=time.monotonic() - self._began,
            stopped=stopped,
            repeated=max(0, work.items - (finished - earlier)),
            restarts=self._restarts,
            workers=tuple(work.workers()),
        )


def _block(path: Path) -> str:
    """Return the name of the checkpoint that a file of rows belongs to: NAME of NAME-0.parquet."""
    return path.stem.rpartition("-")[0]


def _alive(ray: Any) -> list[dict[str, float]]:
    """Return the resources of the nodes that live."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
