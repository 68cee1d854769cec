"""The demo bundle, a model of it, and a server that most tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from internvl_edge import InternVL, export_bundle
from internvl_edge.demo import CHECKPOINT

if TYPE_CHECKING:
    from helpers.servers import RunningServer


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_bundle(CHECKPOINT, tmp_path_factory.mktemp("served") / "demo")


@pytest.fixture(scope="session")
def model(bundle: Path) -> Iterator[InternVL]:
    """A model of its own that has as many rows as the server's."""
    with InternVL.load(bundle, engine="onnxruntime", rows=2, threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="session")
def server(bundle: Path) -> Iterator[RunningServer]:
    for package in ("starlette", "uvicorn", "prometheus_client"):
        pytest.importorskip(package)
    from helpers.servers import running

    with running(bundle, rows=2) as found:
        yield found
