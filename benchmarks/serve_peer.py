"""The text half of a server's load beside llama.cpp's server: the same requests, the same random 1B, in turns.

    python benchmarks/serve_peer.py BUNDLE LLAMA_SERVER MODEL.gguf [--clients 12] [--rows 4] [--seconds 40] [--rounds 2]

`make bench-peers ARGS=--prepare` makes all three: BENCH/int4, BENCH/peers/llama-cpp/build/bin/llama-server and
BENCH/models/gguf/text-Q4_0.gguf. Both servers have two threads and the same number of rows (llama.cpp: slots). One is
stopped by a signal while the other is asked: A B A B. Clients ask without a pause for streams of 40 tokens that answer
texts of some sentences, each another one, so that a server can continue no more than the beginning of its template.
A round ends when all its requests have ended; what it took longer counts.

Results: results/serve-peer.json: for each server the tokens per second of all answers together, p50 and p95 of the
seconds to the first token and to the end, refusals, errors, tokens of a prompt as the server counts them, and resident
memory. Weights are random: speed alone, and noise as answers.
"""

from __future__ import annotations

import http.client
import itertools
import json
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from record import write_results
from serve_load import SERVE, encoded, quantiles, sample

THREADS = 2
TOKENS = 40
CONTEXT = 2048
READY_S = 120
# Said, so that neither server takes a text of its own.
SYSTEM = "Answer in full sentences."
SENTENCES = (
    "The harbour master counts the boats at noon.",
    "A receipt names the shop, the date and the total.",
    "Nobody had seen the clock move for years.",
    "The bridge is closed when the wind is strong.",
)


@dataclass
class Server:
    """One server: its process, what it is asked beyond the common fields, and what was measured of it."""

    label: str
    command: list[str]
    port: int
    ready: str
    fields: dict[str, Any]
    outcomes: Counter[str] = field(default_factory=Counter)
    first_s: list[float] = field(default_factory=list)
    total_s: list[float] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)
    tokens_per_s: list[float] = field(default_factory=list)
    rss_mb: list[float] = field(default_factory=list)
    tokens: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    process: Any = None

    def start(self) -> float:
        """Begin, wait until it is ready, and stop it; returns the seconds until then."""
        started = time.perf_counter()
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while self.status() != 200:
            if self.process.poll() is not None or time.perf_counter() - started > READY_S:
                raise click.ClickException(f"{self.label} did not become ready: {' '.join(self.command)}")
            time.sleep(0.01)
        seconds = time.perf_counter() - started
        self.pause()
        return seconds

    def status(self) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", self.ready)
            return connection.getresponse().status
        except OSError:
            return 0
        finally:
            connection.close()

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def ask(self, text: str) -> None:
        """One stream, to its end."""
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
        options = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": TOKENS, "temperature": 0}
        started = time.perf_counter()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        headers = {"Content-Type": "application/json"}
        try:
            connection.request(
                "POST", "/v1/chat/completions", encoded({"messages": messages, **options, **self.fields}), headers
            )
            response = connection.getresponse()
            if response.status != 200:
                response.read()
                with self.lock:
                    self.outcomes[f"status {response.status}"] += 1
                return
            first, usage = 0.0, None
            for line in iter(response.readline, b""):
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                values = json.loads(line[6:])
                usage = values.get("usage") or usage
                if not first and values.get("choices") and values["choices"][0]["delta"].get("content"):
                    first = time.perf_counter() - started
        finally:
            connection.close()
        with self.lock:
            if usage is None or not first:
                self.outcomes["ended early" if usage is None else "no text"] += 1
                return
            self.outcomes["answered"] += 1
            self.first_s.append(first)
            self.total_s.append(time.perf_counter() - started)
            self.prompt_tokens.append(usage["prompt_tokens"])
            self.tokens += usage["completion_tokens"]

    def load(self, texts: Any, clients: int, seconds: float, counts: bool) -> None:
        """One round; what comes of it is forgotten unless it `counts`."""
        before = self.tokens
        self.go_on()
        started = time.perf_counter()

        def client() -> None:
            while time.perf_counter() - started < seconds:
                with self.lock:
                    text = next(texts)
                self.ask(text)

        threads = [threading.Thread(target=client) for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        taken = time.perf_counter() - started
        self.rss_mb.append(sample(self.process.pid)["rss_mb"])
        self.pause()
        if counts:
            self.tokens_per_s.append((self.tokens - before) / taken)
        else:
            self.outcomes.clear()
            self.first_s, self.total_s, self.prompt_tokens = [], [], []

    def facts(self) -> dict[str, Any]:
        return {
            "tokens_per_s": {"median": statistics.median(self.tokens_per_s), "each": self.tokens_per_s},
            "first_s": quantiles(self.first_s),
            "total_s": quantiles(self.total_s),
            "outcomes": dict(sorted(self.outcomes.items())),
            "prompt_tokens": quantiles([float(count) for count in self.prompt_tokens]),
            "rss_mb": max(self.rss_mb),
        }


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def texts() -> Any:
    """Texts without end, each with another beginning."""
    for number in itertools.count():
        body = " ".join(SENTENCES[(number + step) % len(SENTENCES)] for step in range(2 + number % 3))
        yield f"{number}. {body} What follows from this?"


def table(figures: dict[str, dict[str, Any]]) -> str:
    """The table of docs/serve.md, one server a line."""
    head = ["server", "tokens/s in all", "first token, s, p50 / p95", "answer, s, p50 / p95", "prompt tokens, p50"]
    head += ["resident, MB", "outcomes"]
    lines = [head, ["---"] * len(head)]
    for label, facts in figures.items():
        times = [f"{facts[name]['p50']:.2f} / {facts[name]['p95']:.2f}" for name in ("first_s", "total_s")]
        outcomes = ", ".join(f"{count} {name}" for name, count in facts["outcomes"].items())
        rate = f"{facts['tokens_per_s']['median']:.1f}"
        lines.append([label, rate, *times, f"{facts['prompt_tokens']['p50']:.0f}", f"{facts['rss_mb']:.0f}", outcomes])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.argument("llama_server", type=click.Path(exists=True, path_type=Path))
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.option("--clients", default=12, show_default=True)
@click.option("--rows", default=4, show_default=True)
@click.option("--seconds", default=40.0, show_default=True)
@click.option("--rounds", default=2, show_default=True)
def main(bundle: Path, llama_server: Path, model: Path, clients: int, rows: int, seconds: float, rounds: int) -> None:
    """Load both servers in turns and write the results."""
    own, other = free_port(), free_port()
    serve = [sys.executable, "-c", SERVE, "serve", bundle, "--quiet", "--no-access-log", "--port", own, "--rows", rows]
    serve += ["--threads", THREADS, "--context", CONTEXT, "--device", "cpu", "--engine", "onnxruntime"]
    peer = [llama_server, "-m", model, "--port", other, "-np", rows, "-c", rows * CONTEXT]
    peer += ["-t", THREADS, "-tb", THREADS, "--chat-template", "chatml"]
    servers = [
        Server("internvl-edge serve", list(map(str, serve)), own, "/readyz", {}),
        # A random model may end its answer at any token.
        Server("llama-server", list(map(str, peer)), other, "/health", {"ignore_eos": True}),
    ]
    asked = texts()
    try:
        ready = {server.label: round(server.start(), 2) for server in servers}
        for server in servers:
            server.load(asked, rows, min(5.0, seconds), counts=False)
        for _ in range(rounds):
            for server in servers:
                server.load(asked, clients, seconds, counts=True)
    finally:
        for server in servers:
            if server.process is not None:
                server.go_on()
                server.process.kill()
                server.process.wait()
    figures = {server.label: {"ready_s": ready[server.label], **server.facts()} for server in servers}
    rate, other_rate = (figures[server.label]["tokens_per_s"]["median"] for server in servers)
    values = {
        "bundle": bundle.name,
        "model": model.name,
        "threads": THREADS,
        "clients": clients,
        "rows": rows,
        "answer_tokens": TOKENS,
        "seconds": seconds,
        "rounds": rounds,
        "servers": figures,
        "tokens_per_s_ratio": round(rate / other_rate, 3),
    }
    print(table(figures))
    print(write_results("serve-peer", values))


if __name__ == "__main__":
    main()
