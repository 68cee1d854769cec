"""Whether the server stays right, complete and small under load.

    python benchmarks/serve_load.py WORK [--minutes 10] [--clients 50] [--rows 4] [--queue 32]

The demo bundle is exported to WORK and served by a process of its own with one thread. Clients ask without a pause:
questions about images as a whole and as streams, sampled texts with seeds, streams that they leave, and
damaged input of seven kinds. A client that is refused with 429 comes again after Retry-After (at most 2 s here, so that
the load stays). Every answer is compared with the one that the server gave while nothing else was asked. In the end the
process gets SIGTERM while all clients ask: each stream that had begun must end whole.

Results: results/serve_load.json: requests by kind and outcome; wrong and lost answers; p50 and p95 of the seconds to
the first token, to the end, and to a refusal (as the client and as the server see it); resident memory, descriptors
and threads every five seconds; the outcomes after SIGTERM. Beside it, the answers per second that the same questions
get from `InternVL.chat` in a process without a server, asked by as many threads as there are rows: the limit that HTTP
cannot exceed.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from record import write_results

from internvl_edge import InternVL, export_bundle
from internvl_edge.demo import CHECKPOINT, demo_questions

SERVE = "from internvl_edge.cli import main; main()"
SAMPLE_S = 5.0
INSIDE_S = 30.0
TEXT_SEEDS = 8
KINDS = ("image", "image stream", "text stream", "leave", "damaged")
WEIGHTS = (3, 4, 2, 2, 2)
TEXT: dict[str, Any] = {"temperature": 1.0, "max_tokens": 40}


@dataclass
class Known:
    """A request and its right answer."""

    body: dict[str, Any]
    text: str = ""


@dataclass
class Record:
    """What happened."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, outcome: str, **seconds: float) -> None:
        with self.lock:
            self.outcomes[outcome] += 1
            for name, value in seconds.items():
                self.seconds[name].append(value)


class Load:
    """Clients of one server."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.record = Record()
        self.stopping = threading.Event()
        receipt = next(each for each in demo_questions() if each.image.name == "receipt.png")
        self.images = [Known(image_body(each.image.read_bytes(), each.question), each.expected)
                       for each in demo_questions()]  # fmt: skip
        self.texts = [Known(text_body("Tell me something.") | TEXT | {"seed": seed}) for seed in range(TEXT_SEEDS)]
        image = receipt.image.read_bytes()
        self.damaged: list[tuple[int, bytes]] = [
            (400, b"{"),
            (400, b"[" * 10_000),
            (400, encoded(image_body(image[: len(image) // 2], "What?"))),
            (400, encoded(image_body(b"no image", "What?"))),
            (400, encoded(text_body("x") | {"temperature": "hot"})),
            (400, encoded(text_body("x") | {"tools": [{}]})),
            (404, encoded(text_body("x") | {"model": "another"})),
        ]

    def learn(self) -> None:
        """Ask everything once, alone."""
        for known in self.images:
            assert self.whole(known.body) == (200, known.text), known
        for known in self.texts:
            known.text = self.whole(known.body)[1]

    def connect(self, body: bytes) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=400)
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        return connection, connection.getresponse()

    def whole(self, body: dict[str, Any]) -> tuple[int, str]:
        connection, response = self.connect(encoded(body))
        answer = json.loads(response.read())
        connection.close()
        return response.status, answer["choices"][0]["message"]["content"] if response.status == 200 else ""

    def client(self, number: int) -> None:
        order = random.Random(number)
        while not self.stopping.is_set():
            kind = order.choices(KINDS, WEIGHTS)[0]
            try:
                self.one(kind, order)
            except (OSError, http.client.HTTPException) as error:
                if not self.stopping.is_set():
                    self.record.lost.append(f"{kind}: {type(error).__name__}")

    def one(self, kind: str, order: random.Random) -> None:
        if kind == "damaged":
            self.ask_damaged(*order.choice(self.damaged))
            return
        known = order.choice(self.texts if kind == "text stream" else self.images)
        is_stream = kind != "image"
        started = time.perf_counter()
        connection, response = self.connect(encoded(known.body | {"stream": is_stream}))
        try:
            if response.status == 429:
                response.read()
                self.record.note("refused: 429", refusal_s=time.perf_counter() - started)
                wait = float(response.headers["Retry-After"])
                self.record.seconds["retry_after_s"].append(wait)
                time.sleep(min(2.0, wait))
            elif response.status != 200:
                response.read()
                self.record.note(f"{kind}: status {response.status}")
            elif not is_stream:
                text = json.loads(response.read())["choices"][0]["message"]["content"]
                self.judge(kind, known, text, total_s=time.perf_counter() - started)
            else:
                self.read_stream(kind, known, response, started, leaves=kind == "leave")
        finally:
            connection.close()

    def ask_damaged(self, status: int, body: bytes) -> None:
        started = time.perf_counter()
        connection, response = self.connect(body)
        answer = json.loads(response.read())
        connection.close()
        if response.status in (429, 503):
            self.record.note(f"damaged: {response.status}")
        elif response.status == status and set(answer) == {"error"}:
            self.record.note("damaged: refused", damaged_s=time.perf_counter() - started)
        else:
            self.record.wrong.append(f"damaged: {response.status} for {status}")

    def read_stream(
        self, kind: str, known: Known, response: http.client.HTTPResponse, started: float, leaves: bool
    ) -> None:
        text, first = "", 0.0
        for line in iter(response.readline, b""):
            if not line.startswith(b"data: "):
                continue
            if line.startswith(b"data: [DONE]"):
                self.judge(kind, known, text, first_s=first, total_s=time.perf_counter() - started)
                return
            values = json.loads(line[6:])
            if "error" in values:
                self.record.note(f"{kind}: error {values['error']['code']}")
                return
            piece = values["choices"][0]["delta"].get("content")
            if piece:
                text += piece
                first = first or time.perf_counter() - started
                if leaves:
                    self.record.note("leave: left", first_s=first)
                    return
        self.record.lost.append(f"{kind}: a stream ended without [DONE]")

    def judge(self, kind: str, known: Known, text: str, **seconds: float) -> None:
        if text == known.text:
            self.record.note(
                f"{kind}: right", **{f"{kind} {name}": value for name, value in seconds.items()}, **seconds
            )
        else:
            self.record.wrong.append(f"{kind}: {text!r}, expected {known.text!r}")


def encoded(values: dict[str, Any]) -> bytes:
    return json.dumps(values).encode()


def text_body(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]}


def image_body(image: bytes, question: str) -> dict[str, Any]:
    url = "data:image/png;base64," + base64.b64encode(image).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": content}]}


def sample(pid: int) -> dict[str, float]:
    """Resident MB, descriptors and threads of a process."""
    status = dict(
        line.split(":", 1)
        for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
        if ":" in line
    )
    return {
        "rss_mb": round(int(status["VmRSS"].split()[0]) / 1024, 1),
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(status["Threads"]),
    }


def inside(bundle: Path, rows: int) -> float:
    """Answers per second of the same image questions in this process, without a server."""
    questions = demo_questions()
    with InternVL.load(bundle, device="cpu", engine="onnxruntime", rows=rows, threads=1) as model:
        deadline = time.perf_counter() + INSIDE_S

        def ask(number: int) -> int:
            order, count = random.Random(number), 0
            while time.perf_counter() < deadline:
                asked = order.choice(questions)
                assert model.chat(asked.question, [asked.image], max_tiles=6).text == asked.expected
                count += 1
            return count

        with ThreadPoolExecutor(rows) as pool:
            return sum(pool.map(ask, range(rows))) / INSIDE_S


def quantiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "count": len(ordered),
        "p50": round(statistics.median(ordered), 3),
        "p95": round(ordered[int(len(ordered) * 0.95)], 3),
        "most": round(ordered[-1], 3),
    }


def served_metrics(port: int) -> dict[str, float]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    wanted = "internvl_edge_requests_total{"
    return {line[len(wanted) - 1 : line.index("}") + 1]: float(line.split()[-1]) for line in lines if wanted in line}


@click.command()
@click.argument("work", type=click.Path(path_type=Path))
@click.option("--minutes", default=10.0, show_default=True)
@click.option("--clients", default=50, show_default=True)
@click.option("--rows", default=4, show_default=True)
@click.option("--queue", default=32, show_default=True)
def main(work: Path, minutes: float, clients: int, rows: int, queue: int) -> None:
    bundle = work / "demo"
    if not bundle.is_dir():
        export_bundle(CHECKPOINT, bundle)
    alone = inside(bundle, rows)
    options = [
        "--port",
        0,
        "--threads",
        1,
        "--engine",
        "onnxruntime",
        "--device",
        "cpu",
        "--rows",
        rows,
        "--queue",
        queue,
    ]
    command = [sys.executable, "-c", SERVE, "serve", bundle, "--quiet", "--drain", 60, *options]
    log = work / "access.log"
    with log.open("w") as lines:
        process = subprocess.Popen(list(map(str, command)), stdout=lines, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    load = Load(int(process.stderr.readline().rpartition(":")[2].partition("/")[0]))
    load.learn()
    threads = [threading.Thread(target=load.client, args=(number,)) for number in range(clients)]
    started = time.perf_counter()
    samples = []
    for thread in threads:
        thread.start()
    while time.perf_counter() - started < 60 * minutes:
        time.sleep(min(SAMPLE_S, 60 * minutes))
        samples.append({"s": round(time.perf_counter() - started, 1), **sample(process.pid)})
    seconds = time.perf_counter() - started
    metrics = served_metrics(load.port)
    under_load, load.record = load.record, Record()
    load.stopping.set()  # new connections fail from now on, and streams that had begun are still judged
    process.terminate()
    for thread in threads:
        thread.join(120)
    status = process.wait(120)
    middle = len(samples) // 5
    logged = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    refused_in_server = [line["seconds"] for line in logged if line["status"] == 429]
    under_load.seconds["refusal_in_server_s"] = refused_in_server or [0.0]
    right = sum(count for name, count in under_load.outcomes.items() if name.endswith(": right"))
    results = {
        "clients": clients,
        "rows": rows,
        "queue": queue,
        "minutes": round(seconds / 60, 2),
        "load_average": os.getloadavg()[0],
        "outcomes": dict(sorted(under_load.outcomes.items())),
        "wrong": under_load.wrong[:20],
        "lost": under_load.lost[:20],
        "server_outcomes": metrics,
        "answers_per_s": round(right / seconds, 2),
        "in_process_answers_per_s": round(alone, 2),
        "seconds": {name: quantiles(values) for name, values in sorted(under_load.seconds.items())},
        "at_the_end": {
            "exit_status": status,
            "outcomes": dict(sorted(load.record.outcomes.items())),
            "wrong": load.record.wrong,
            "lost": load.record.lost,
        },
        "growth": {
            name: round(
                statistics.fmean(each[name] for each in samples[-max(1, middle) :])
                - statistics.fmean(each[name] for each in samples[middle : 2 * middle or 1]),
                1,
            )
            for name in ("rss_mb", "descriptors", "threads")
        },
        "samples": samples,
    }
    print(json.dumps({name: value for name, value in results.items() if name != "samples"}, indent=2))
    print(write_results("serve_load", results))


if __name__ == "__main__":
    main()
