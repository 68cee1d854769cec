"""The native library, compiled once for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from internvl_edge.runtime.native.build import NativeError, build, find_compiler, machine_kind


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        find_compiler(), machine_kind()
    except NativeError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("native", numbered=True)
    build(folder / "native.so")
    return folder / "native.so"
