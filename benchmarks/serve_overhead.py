"""What the server costs beyond the engine: time to start, memory at rest, and time per request.

    python benchmarks/serve_overhead.py WORK [--requests 60]

The demo bundle is exported to WORK. Each server is a process of its own with one thread.

* start: from the start of the process to the first 200 of /readyz, five times. The limit beside it is the same process
  that only imports the runtime and loads the bundle.
* memory: resident and private (USS) bytes of the idle server after it was asked once, beside a process that loads the
  bundle, asks it once and has no server.
* overhead: seconds from the first byte of a request to the last of its answer as the client sees it, without the
  seconds of the engine that the answer itself says (waiting, vision, prefill, decode). The same requests are answered
  by `InternVL.chat` in a process without a server, whose own overhead stands beside it. Both alternate. On a machine
  that others use, wall clock says little; CPU time of the two processes per request stands beside it.

Results: results/serve_overhead.json.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
from record import write_results

from internvl_edge import InternVL, export_bundle
from internvl_edge.demo import CHECKPOINT, demo_questions

STARTS = 5
ENGINE = ("waiting_s", "vision_s", "prefill_s", "decode_s")
SERVE = "from internvl_edge.cli import main; main()"
ALONE = """
import sys
from internvl_edge import InternVL
model = InternVL.load(sys.argv[1], device="cpu", engine="onnxruntime", rows=4, threads=1)
print("ready", flush=True)
for line in sys.stdin:
    model.chat("Hello", max_new_tokens=4)
    print("asked", flush=True)
"""


class Served:
    """A server in a process of its own."""

    def __init__(self, bundle: Path) -> None:
        options = ["--port", "0", "--threads", "1", "--engine", "onnxruntime", "--device", "cpu", "--no-access-log"]
        self.started = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVE, "serve", str(bundle), "--quiet", *options], stderr=subprocess.PIPE, text=True
        )
        assert self.process.stderr is not None
        line = self.process.stderr.readline()
        self.port = int(line.rpartition(":")[2].partition("/")[0])
        assert self.request("GET", "/readyz")[0] == 200
        self.start_s = {"wall": time.perf_counter() - self.started, "cpu": cpu_s(self.process.pid)}

    def request(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request(method, path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        found = response.status, response.read()
        connection.close()
        return found

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)


def memory(pid: int) -> dict[str, float]:
    """Resident and private memory of a process in MB."""
    found: dict[str, int] = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]:
        name, _, size = line.partition(":")
        found[name] = int(size.split()[0])
    private = found["Private_Clean"] + found["Private_Dirty"]
    return {"rss_mb": round(found["Rss"] / 1024, 1), "uss_mb": round(private / 1024, 1)}


def alone(bundle: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds to load the bundle in a new process, and its memory after one answer."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", ALONE, str(bundle)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    seconds, cpu = time.perf_counter() - started, cpu_s(process.pid)
    process.stdin.write("ask\n")
    process.stdin.flush()
    assert process.stdout.readline() == "asked\n"
    found = memory(process.pid)
    process.stdin.close()
    process.wait(30)
    return {"wall": seconds, "cpu": cpu}, found


def cpu_s(pid: int) -> float:
    """CPU seconds of a process so far, in steps of 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def overheads(served: Served, bundle: Path, requests: int) -> dict[str, Any]:
    """Milliseconds beyond the engine, over HTTP and in the process, for a text and for an image."""
    receipt = next(each for each in demo_questions() if each.image.name == "receipt.png")
    url = "data:image/png;base64," + base64.b64encode(receipt.image.read_bytes()).decode()
    contents: dict[str, Any] = {
        "text": "Hello",
        "image": [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": receipt.question},
        ],
    }
    images = {"text": [], "image": [receipt.image]}
    questions = {"text": "Hello", "image": receipt.question}
    found: dict[str, Any] = {}
    with InternVL.load(bundle, device="cpu", engine="onnxruntime", rows=4, threads=1) as model:
        for kind, content in contents.items():
            body = json.dumps({"messages": [{"role": "user", "content": content}], "max_tokens": 8}).encode()
            over_http, inside = [], []
            served_cpu = inside_cpu = 0.0
            for number in range(requests + 5):
                if number == 5:
                    served_cpu, inside_cpu = -cpu_s(served.process.pid), 0.0
                started = time.perf_counter()
                status, answer = served.request("POST", "/v1/chat/completions", body)
                seconds = time.perf_counter() - started
                assert status == 200
                timings = json.loads(answer)["timings"]
                over_http.append(1000 * (seconds - sum(timings[name] for name in ENGINE)))
                started, began = time.perf_counter(), time.process_time()
                reply = model.chat(questions[kind], images[kind], max_new_tokens=8, max_tiles=6)
                seconds = time.perf_counter() - started
                inside_cpu += time.process_time() - began
                inside.append(1000 * (seconds - sum(reply.timings[name] for name in ENGINE)))
            served_cpu += cpu_s(served.process.pid)
            found[kind] = {
                "server_cpu_ms": round(1000 * served_cpu / requests, 2),
                "in_process_cpu_ms": round(1000 * inside_cpu / requests, 2),
                "server_beyond_in_process_cpu_ms": round(1000 * (served_cpu - inside_cpu) / requests, 2),
                "http_ms": summary(over_http[5:]),
                "in_process_ms": summary(inside[5:]),
                "server_ms": round(statistics.median(over_http[5:]) - statistics.median(inside[5:]), 2),
            }
    return found


def summary(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "p10": round(ordered[len(ordered) // 10], 2),
        "p50": round(statistics.median(ordered), 2),
        "p95": round(ordered[int(len(ordered) * 0.95)], 2),
    }


def spread(values: list[dict[str, float]]) -> dict[str, float]:
    found = {}
    for name in ("wall", "cpu"):
        found[f"{name}_median"] = round(statistics.median(each[name] for each in values), 2)
        found[f"{name}_least"] = round(min(each[name] for each in values), 2)
    return found


@click.command()
@click.argument("work", type=click.Path(path_type=Path))
@click.option("--requests", default=60, show_default=True)
def main(work: Path, requests: int) -> None:
    bundle = work / "demo"
    if not bundle.is_dir():
        export_bundle(CHECKPOINT, bundle)
    with InternVL.load(bundle):  # hashes are verified once
        pass
    starts, loads, memories = [], [], []
    for _ in range(STARTS):
        served = Served(bundle)
        starts.append(served.start_s)
        served.request(
            "POST", "/v1/chat/completions", b'{"messages":[{"role":"user","content":"Hello"}],"max_tokens":4}'
        )
        time.sleep(0.5)
        memories.append(memory(served.process.pid))
        served.stop()
        seconds, without = alone(bundle)
        loads.append((seconds, without))
    served = Served(bundle)
    try:
        overhead = overheads(served, bundle, requests)
    finally:
        served.stop()
    with_server = {name: statistics.median(each[name] for each in memories) for name in memories[0]}
    without_server = {name: statistics.median(each[1][name] for each in loads) for name in memories[0]}
    results = {
        "load_average": os.getloadavg()[0],
        "start_to_ready_s": spread(starts),
        "load_alone_s": spread([each[0] for each in loads]),
        "idle_memory": {
            "server": with_server,
            "engine_alone": without_server,
            "server_beyond_engine_mb": {
                name: round(with_server[name] - without_server[name], 1) for name in with_server
            },
        },
        "overhead": overhead,
    }
    print(json.dumps(results, indent=2))
    print(write_results("serve_overhead", results))


if __name__ == "__main__":
    main()
