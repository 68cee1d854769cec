"""Answer a batch on a Ray cluster: Ray Data moves the items, its actors hold the bundle, Parquet files hold the rows.

A block of items is the unit of work. Ray Data writes the ids of a block before its file and commits them after it, so
an id is in the output once, whatever was killed; a block that was under way is computed again. Everything lies in the
folder of the output, which all nodes must see:

    OUT/*.parquet               rows
    OUT/_batch/record.json      what decides all answers; a batch continues only under the same record
    OUT/_batch/items.parquet    what is asked
    OUT/_batch/checkpoint/      ids that are finished, by Ray Data
    OUT/_batch/work/            what each worker computed: one small file for each block, also of repeated work

Ray is imported where it is used: it is an extra of its own.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from internvl_edge.base.errors import EdgeError, EngineError
from internvl_edge.base.extras import require_extras, requires
from internvl_edge.base.files import readable_disk_errors, replacing
from internvl_edge.base.jsonable import decode
from internvl_edge.base.locks import only_writer
from internvl_edge.base.progress import SILENT, Progress
from internvl_edge.base.text import one_line, shown
from internvl_edge.base.units import rounded
from internvl_edge.runtime.answer_format import AnswerFormat
from internvl_edge.runtime.model import InternVL

from .items import Ask, Item, grouped
from .journal import check_record
from .node_bundle import node_bundle
from .output import flat_row, row_schema
from .run import Summary, answers, too_many

_PRIVATE = "_batch"
# CPUs that no worker takes: one for reading, cutting and writing blocks, one for the filter of finished ids.
SPARE_CPUS = 2
# Rows of a block: the most work that is lost with a worker, and the fewest rows of a file.
_SMALLEST_BLOCK, _LARGEST_BLOCK = 8, 1000
_BLOCKS_PER_WORKER = 20
# Memory that Ray sets aside for the filter of finished ids; Ray Data's own gigabyte does not fit small boxes.
_FILTER_BYTES = 64 << 20
# Seconds between two looks at the work, and without any progress until a cluster that lost nodes is given up.
_LOOK = 1.0
_PATIENCE = 120.0
_OTHER = "give another --output"


@dataclass(frozen=True)
class Fleet:
    """Where and how a batch is spread.

    Attributes:
        address: of a Ray cluster ("192.0.2.7:6379"), or "auto" for the one that `ray start` began on this machine.
        least, most: workers that are waited for at the start, and at most; None is as many as fit.
        cpus: of one worker, which is also its number of threads.
        gpus: of one worker.
    """

    address: str
    least: int = 1
    most: int | None = None
    cpus: float = 1.0
    gpus: float = 0.0


@dataclass(frozen=True)
class Job:
    """What workers do.

    Attributes:
        bundle: a path that every node sees, or an address such as "s3://bucket/bundle" (see `node_bundle`).
        digest: `journal.bundle_digest` of its manifest; a node with another bundle is refused.
        loading: arguments of `InternVL.load`.
        rows: answers that a worker computes together, on a CPU.
        max_errors: stop as soon as more rows than this have errors; None never does.
    """

    bundle: str
    digest: str
    loading: Mapping[str, Any]
    rows: int
    max_errors: int | None = None


@dataclass(frozen=True)
class WorkerSummary:
    """What one worker did in a run.

    Attributes:
        worker: its name; a worker that was killed comes back under another one.
        node: name of its machine.
        items, failed: rows that it computed, and those of them with an error.
        output_tokens: of these.
        busy_s, loading_s: seconds that it answered, and that it loaded the bundle.
    """

    worker: str
    node: str
    items: int
    failed: int
    output_tokens: int
    busy_s: float
    loading_s: float

    @property
    def items_per_s(self) -> float:
        """Rows in a second of answering."""
        return self.items / max(self.busy_s, 1e-9)


@dataclass(frozen=True)
class FleetSummary(Summary):
    """What a run on a cluster did.

    Attributes:
        repeated: rows that were computed in this run and thrown away, because their worker or node died.
        workers: each by itself.
    """

    repeated: int = 0
    workers: tuple[WorkerSummary, ...] = ()


def parse_workers(text: str | None) -> tuple[int, int | None]:
    """Return the bounds that "4", "2:16" or None state.

    Raises:
        EdgeError: anything else.
    """
    if text is None:
        return 1, None
    least, colon, most = text.partition(":")
    if (
        not least.isdecimal()
        or (colon and not most.isdecimal())
        or not 1 <= int(least) <= int(most or least) <= 100_000
    ):
        raise EdgeError(f"--workers is {shown(text)}, expected a number such as 4, or bounds such as 2:16")
    return int(least), int(most or least)


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
        (folder / "work").mkdir(parents=True, exist_ok=True)
        with only_writer(output, _OTHER):
            check_record(folder / "record.json", output, record, _OTHER)
            return _Run(job, items, output, fleet, progress).run()


class _Run:
    """One run on a cluster."""

    def __init__(self, job: Job, items: Sequence[Item], output: Path, fleet: Fleet, progress: Progress) -> None:
        self._items, self._output, self._folder = items, output.absolute(), output.absolute() / _PRIVATE
        self._fleet, self._max_errors, self._progress = fleet, job.max_errors, progress
        run, threads = secrets.token_hex(6), job.loading.get("threads") or max(1, int(fleet.cpus))
        self._worker: dict[str, Any] = {
            "job": replace(job, loading={**job.loading, "threads": threads}),
            "work": str(self._folder / "work"),
            "run": run,
            "kept": list(dict.fromkeys(name for item in items for name in item.kept)),
        }
        self._work = _WorkLog(self._folder / "work", run)
        self._began = time.monotonic()

    def run(self) -> FleetSummary:
        """Compute what is missing."""
        self._check_finished()
        earlier = len(self._finished_ids())
        if earlier == len(self._items):
            return self._summary(earlier, "")
        write_items(self._items, self._folder / "items.parquet")
        with _cluster(self._fleet) as ray:
            self._began = time.monotonic()
            stopped = self._compute(ray, earlier)
        return self._summary(earlier, stopped)

    def _compute(self, ray: Any, earlier: int) -> str:
        """Run the pipeline in a thread, and watch it. Returns why it was stopped, "" if it was not."""
        least, most = fitting_workers([node["Resources"] for node in ray.nodes() if node["Alive"]], self._fleet)
        self._progress.remark(f"{least} to {most} workers on {ray.get_runtime_context().gcs_address}")
        failures: list[BaseException] = []

        def work() -> None:
            try:
                self._pipeline(ray, least, most, len(self._items) - earlier)
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=work, name="fleet", daemon=True)
        with self._progress.phase("answering", len(self._items), "items") as step:
            step(earlier)
            thread.start()
            moved, shown_rows = time.monotonic(), 0
            while thread.is_alive():
                thread.join(_LOOK)
                done = min(self._work.read().items, len(self._items) - earlier)
                if done > shown_rows:
                    seconds = time.monotonic() - self._began
                    step.facts = f"{rounded(done / max(seconds, 1e-9))} items/s, {self._work.failed} with errors"
                    step(done - shown_rows)
                    moved, shown_rows = time.monotonic(), done
                if stopped := too_many(self._work.failed, self._max_errors):
                    return stopped
                if time.monotonic() - moved > _PATIENCE:
                    self._require_room(ray)
        if failures:
            raise _as_edge_error(failures[0])
        return ""

    def _pipeline(self, ray: Any, least: int, most: int, left: int) -> None:
        import ray.data as data
        from ray.data.checkpoint import CheckpointConfig

        context = data.DataContext.get_current()
        config = CheckpointConfig("id", str(self._folder / "checkpoint"), delete_checkpoint_on_success=False)
        config.checkpoint_actor_memory_bytes = _FILTER_BYTES
        context.checkpoint_config = config
        context.enable_progress_bars = False
        context.max_errored_blocks = 0
        block = min(max(left // (most * _BLOCKS_PER_WORKER), _SMALLEST_BLOCK), _LARGEST_BLOCK)
        found = data.read_parquet(str(self._folder / "items.parquet"), num_cpus=0.1)
        found = found.repartition(target_num_rows_per_block=block)
        found = found.map_batches(
            _Worker,
            fn_constructor_kwargs=self._worker,
            batch_size=None,
            batch_format="pyarrow",
            compute=data.ActorPoolStrategy(min_size=least, max_size=most),
            num_cpus=self._fleet.cpus,
            **({"num_gpus": self._fleet.gpus} if self._fleet.gpus else {}),
        )
        found.write_parquet(str(self._output), ray_remote_args={"num_cpus": 0.1})

    def _require_room(self, ray: Any) -> None:
        """Raise EdgeError where a cluster without progress has no room for reading beside the least workers."""
        alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        try:
            fitting_workers(alive, self._fleet)
        except EdgeError as error:
            raise EdgeError(f"nothing was finished in {_PATIENCE:.0f} s, and {error}; finished rows are kept") from None

    def _check_finished(self) -> None:
        """Refuse to continue an output whose rows answer something else than the items of the same ids."""
        asked = {item.id: item.request for item in self._items}
        for each, request in self._rows("id", "request"):
            if asked.get(each, request) != request:
                raise EdgeError(
                    f"{self._output} has an answer for {shown(each)} to another prompt, image or option; {_OTHER}"
                )

    def _finished_ids(self) -> set[str]:
        """Return the ids that Ray Data committed."""
        from pyarrow import parquet

        wanted = {item.id for item in self._items}
        found: set[str] = set()
        for path in (self._folder / "checkpoint").glob("*.parquet"):
            found.update(parquet.read_table(path, columns=["id"]).column("id").to_pylist())
        return found & wanted

    def _rows(self, *columns: str) -> Iterator[tuple[Any, ...]]:
        """Yield columns of all rows in the output."""
        from pyarrow import parquet

        for path in self._output.glob("*.parquet"):
            table = parquet.read_table(path, columns=list(columns))
            yield from zip(*(table.column(name).to_pylist() for name in columns), strict=True)

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
            workers=tuple(work.workers()),
        )


class _Worker:
    """An actor of Ray Data: it loads the bundle once, and answers blocks of items."""

    def __init__(self, job: Job, work: str, run: str, kept: list[str]) -> None:
        began = time.monotonic()
        folder = node_bundle(job.bundle, job.digest)
        rows = job.rows if job.loading["device"] == "cpu" else 1
        self._model = InternVL.load(folder, rows=rows, prompts_first=True, **job.loading)
        self._loading_s = time.monotonic() - began
        self._work, self._run, self._kept = Path(work), run, kept
        self._name = f"{socket.gethostname()}-{os.getpid()}"

    def __call__(self, block: Any) -> Any:
        """Return the rows of a block of items, [rows] of `output.row_schema`."""
        import pyarrow

        began = time.monotonic()
        items = [item_of(text, pictures) for text, pictures in zip(*_columns(block, "item", "pictures"), strict=True)]
        found = {item.id: row for item, row in answers(self._model, grouped(items))}
        rows = [found[item.id] for item in items]
        done = WorkerSummary(
            worker=self._name,
            node=socket.gethostname(),
            items=len(rows),
            failed=sum(row.error is not None for row in rows),
            output_tokens=sum(row.output_tokens for row in rows),
            busy_s=time.monotonic() - began,
            loading_s=self._loading_s,
        )
        with replacing(self._work / f"{self._run}-{secrets.token_hex(6)}.json") as path:
            path.write_text(json.dumps(asdict(done)), encoding="utf-8")
        schema = row_schema(pyarrow, self._kept)
        values = [flat_row(json.loads(json.dumps(row.as_json(), default=str))) for row in rows]
        return pyarrow.Table.from_pylist(values, schema)


class _WorkLog:
    """What the workers of one run reported."""

    def __init__(self, folder: Path, run: str) -> None:
        self._folder, self._run = folder, run
        self._seen: set[str] = set()
        self._of: dict[str, WorkerSummary] = {}

    def read(self) -> _WorkLog:
        """Read the reports that are new."""
        for entry in os.scandir(self._folder):
            if entry.name in self._seen or not entry.name.startswith(self._run) or not entry.name.endswith(".json"):
                continue
            self._seen.add(entry.name)
            one = decode(WorkerSummary, json.loads(Path(entry.path).read_text(encoding="utf-8")))
            old = self._of.get(one.worker)
            self._of[one.worker] = (
                one
                if old is None
                else replace(
                    one,
                    items=old.items + one.items,
                    failed=old.failed + one.failed,
                    output_tokens=old.output_tokens + one.output_tokens,
                    busy_s=old.busy_s + one.busy_s,
                )
            )
        return self

    @property
    def items(self) -> int:
        """Rows that were computed, repeated ones included."""
        return sum(worker.items for worker in self._of.values())

    @property
    def failed(self) -> int:
        """Rows with an error, repeated ones included."""
        return sum(worker.failed for worker in self._of.values())

    @property
    def output_tokens(self) -> int:
        """Tokens of all rows."""
        return sum(worker.output_tokens for worker in self._of.values())

    def workers(self) -> list[WorkerSummary]:
        """List what each worker did."""
        return sorted(self._of.values(), key=lambda worker: worker.worker)


# ---- the cluster ----


@contextlib.contextmanager
def _cluster(fleet: Fleet) -> Iterator[Any]:
    """Connect to a cluster, and leave it at the end.

    Raises:
        EdgeError: there is none, it has another Ray or Python, or anybody who reaches its port could run code.
    """
    with requires("fleet", "a batch on a Ray cluster"):
        import ray
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        ray.init(address=fleet.address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=True)
    except Exception as error:  # Ray raises ConnectionError, RuntimeError, ValueError and its own, by the cause
        reason = one_line(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__, 200)
        raise EdgeError(
            f"no Ray cluster at {shown(fleet.address)} ({reason}); begin one with ray start --head, and give its "
            "address"
        ) from None
    try:
        require_protection(ray.get_runtime_context().gcs_address, os.environ.get("RAY_AUTH_MODE", ""))
        yield ray
    finally:
        ray.shutdown()


def require_protection(address: str, mode: str) -> None:
    """Refuse a cluster that others can reach and that asks nobody for a token.

    Whoever reaches the port of such a cluster runs code on all of its machines.

    Args:
        address: of the cluster's head, HOST:PORT.
        mode: the value of RAY_AUTH_MODE.

    Raises:
        EdgeError: the host is not this machine alone, and the mode is not "token".
    """
    host = address.rsplit(":", 1)[0].strip("[]")
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if not local and mode.lower() != "token":
        raise EdgeError(
            f"the Ray cluster at {address} asks for no token, so whoever reaches it runs code there; set "
            "RAY_AUTH_MODE=token for it and here (ray get-auth-token --generate makes a token)"
        )


def fitting_workers(nodes: Sequence[Mapping[str, float]], fleet: Fleet) -> tuple[int, int]:
    """Return how many workers to begin with, and how many at most, so that `SPARE_CPUS` stay free.

    Without them, Ray Data waits for ever and says nothing.

    Args:
        nodes: the resources of each node: "CPU", "GPU".
        fleet: what is asked for.

    Raises:
        EdgeError: not even the least number fits.
    """
    cpus = [node.get("CPU", 0.0) for node in nodes]
    fit = [
        int(min(node.get("CPU", 0.0) / fleet.cpus, node.get("GPU", 0.0) / fleet.gpus if fleet.gpus else 1e9))
        for node in nodes
    ]

    def free(place: int) -> float:
        return cpus[place] - fit[place] * fleet.cpus

    while sum(int(free(place) + 1e-9) for place in range(len(fit))) < SPARE_CPUS and any(fit):
        # The node that is nearest to another whole free CPU gives up a worker.
        place = max((place for place in range(len(fit)) if fit[place]), key=lambda place: free(place) % 1)
        fit[place] -= 1
    if sum(fit) < fleet.least:
        gpus = f" and {fleet.gpus:g} GPUs" if fleet.gpus else ""
        raise EdgeError(
            f"the cluster has {sum(cpus):g} CPUs on {len(nodes)} nodes, which leaves room for {sum(fit)} workers of "
            f"{fleet.cpus:g} CPUs{gpus} beside {SPARE_CPUS} CPUs for reading and writing; {fleet.least} were asked "
            "for: lower --workers or --cpus-per-worker, or add nodes"
        )
    return fleet.least, max(fleet.least, min(fleet.most or sum(fit), sum(fit)))


def _as_edge_error(error: BaseException) -> EdgeError:
    """Return what went wrong in a worker as one line; finished rows are kept."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, EdgeError):
            return EngineError(f"a worker cannot go on: {cause}; finished rows are kept")
        cause = getattr(cause, "cause", None) or cause.__cause__
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return EdgeError(
        f"the cluster failed: {one_line(lines[-1] if lines else repr(error), 250)}; finished rows are kept"
    )


# ---- items as rows of a table ----


def write_items(items: Sequence[Item], path: Path) -> None:
    """Write items as Parquet: id, the item as JSON, and the bytes of those images that are no files."""
    import pyarrow
    from pyarrow import parquet

    schema = pyarrow.schema(
        [("id", pyarrow.string()), ("item", pyarrow.string()), ("pictures", pyarrow.list_(pyarrow.binary()))]
    )
    with replacing(path) as temporary, parquet.ParquetWriter(temporary, schema) as writer:
        for begun in range(0, len(items), _LARGEST_BLOCK):
            rows = [_item_row(item) for item in items[begun : begun + _LARGEST_BLOCK]]
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))


def _item_row(item: Item) -> dict[str, Any]:
    images: list[str | None] = []
    pictures: list[bytes] = []
    for image in item.images:
        if isinstance(image, str | Path):
            images.append(str(image) if isinstance(image, str) else os.path.abspath(image))
        else:
            images.append(None)
            pictures.append(image.read())  # type: ignore[union-attr]  # tables make files and ImageCells, no others
    values = {
        "id": item.id,
        "place": item.place,
        "ask": {**item.ask.described(), "choices": item.ask.choices},
        "images": images,
        "names": item.names,
        "kept": item.kept,
    }
    return {"id": item.id, "item": json.dumps(values, ensure_ascii=False, default=str), "pictures": pictures}


def item_of(text: str, pictures: Sequence[bytes]) -> Item:
    """Return the item of a row that `write_items` wrote."""
    values = json.loads(text)
    asked, held = values["ask"], iter(pictures)
    choices = None if asked["choices"] is None else tuple(asked["choices"])
    form = None if choices or asked["form"] is None else AnswerFormat(**asked["form"])
    ask = Ask(
        prompt=asked["prompt"],
        answer_format=form,
        choices=choices,
        votes=asked["votes"],
        sure=asked["sure"],
        reason=asked["reason"],
        options=asked["options"],
    )
    images = tuple(next(held) if image is None else image for image in values["images"])
    return Item(values["id"], values["place"], ask, images, tuple(values["names"]), values["kept"])


def _columns(block: Any, *names: str) -> list[list[Any]]:
    return [block.column(name).to_pylist() for name in names]
