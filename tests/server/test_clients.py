"""Real clients against a real server: openai, LangChain, LiteLLM, curl, and schemathesis on the OpenAPI document.

Their packages are in an environment of their own, which `benchmarks/peers/make_env.sh serve-clients DIR` makes;
INTERNVL_EDGE_CLIENTS is its folder.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
pytest.importorskip("prometheus_client")

from helpers import client_programs
from helpers.servers import RunningServer, image_part, running
from internvl_edge.demo import demo_questions

pytestmark = pytest.mark.slow

CLIENTS = os.environ.get("INTERNVL_EDGE_CLIENTS")
ASKED = next(each for each in demo_questions() if each.image.name == "receipt.png")


@pytest.fixture(scope="module")
def served(bundle: Path) -> Iterator[RunningServer]:
    with running(bundle, rows=2) as server:
        yield server


@pytest.fixture(scope="module")
def clients() -> Path:
    if CLIENTS is None:
        pytest.skip(
            "no environment of clients; benchmarks/peers/make_env.sh serve-clients DIR, INTERNVL_EDGE_CLIENTS=DIR"
        )
    return Path(CLIENTS).resolve() / "bin"


def run(clients: Path, name: str, server: RunningServer) -> Any:
    command = [clients / "python", client_programs.__file__, name, f"http://localhost:{server.port}/v1", ASKED.image]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def expected(served: RunningServer) -> str:
    """The answer over plain sockets, to the question that all clients ask."""
    return served.ask([{"type": "text", "text": client_programs.QUESTION}, image_part(ASKED.image)]).text


@pytest.mark.parametrize("name", ["snippet", "openai_stream", "langchain", "litellm"])
def test_a_client_gets_the_answer(clients: Path, served: RunningServer, expected: str, name: str) -> None:
    found = run(clients, name, served)
    assert found["text"] == expected
    assert found.get("stream", expected) == expected
    assert found.get("usage", 1) > 0


@pytest.mark.parametrize("name", ["openai_parse", "langchain_structured"])
def test_a_client_gets_its_object(clients: Path, served: RunningServer, name: str) -> None:
    pytest.importorskip("llguidance")
    found = run(clients, name, served)
    assert isinstance(found["total"], str)
    if "function_calling" in found:
        assert "is not supported; ask for JSON with response_format" in found["function_calling"]


def test_openai_options(clients: Path, served: RunningServer) -> None:
    found = run(clients, "openai_options", served)
    assert found["choices"] == 2
    assert 0 < found["logprobs"] <= 5


def test_openai_errors_have_their_kinds(clients: Path, served: RunningServer) -> None:
    assert run(clients, "openai_errors", served) == {
        "tools": ["BadRequestError", "tools"],
        "temperature": ["BadRequestError", "temperature"],
        "model": ["NotFoundError", "model"],
        "http": ["BadRequestError", "messages[0].content[0].image_url"],
    }


def test_openai_knows_a_wrong_key(clients: Path, bundle: Path) -> None:
    with running(bundle, keys=("sk-right-key",)) as server:
        assert run(clients, "openai_key", server) == {"code": "invalid_api_key"}


def test_curl(served: RunningServer, expected: str, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl")
    content = [{"type": "text", "text": client_programs.QUESTION}, image_part(ASKED.image)]
    body = tmp_path / "body.json"
    body.write_text(json.dumps({"messages": [{"role": "user", "content": content}], "stream": True}))
    url = f"http://localhost:{served.port}/v1/chat/completions"
    command = ["curl", "-sSN", url, "-H", "Content-Type: application/json", "-d", f"@{body}"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    events = [json.loads(line[6:]) for line in found.splitlines() if line.startswith("data: {")]
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == expected
    assert found.endswith("data: [DONE]\n\n")


def test_schemathesis_finds_no_server_error(clients: Path, bundle: Path, tmp_path: Path) -> None:
    with running(bundle, rows=2, request_s=20) as server:
        checks = ("not_a_server_error", "status_code_conformance", "content_type_conformance")
        command = [
            clients / "schemathesis", "run", f"http://127.0.0.1:{server.port}/openapi.json",
            "--checks", ",".join([*checks, "response_schema_conformance"]),
            "--phases", "examples,fuzzing", "--max-examples", "120", "--workers", "2", "--seed", "1",
            "--request-timeout", "30", "--no-color",
        ]  # fmt: skip
        result = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, timeout=550, check=False, cwd=tmp_path
        )
        assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
        assert server.metric('requests_total{outcome="error"}') == 0
        assert server.get("/livez").status == 200
