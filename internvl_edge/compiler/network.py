"""Parse a serialized ONNX header into a TensorRT network.

This module knows TensorRT's parser. If the parser rejects a graph, the error is one line that names the node.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from internvl_edge.base.errors import EngineError
from internvl_edge.runtime.engines.tensorrt.flavour import Flavour, last_error


@contextmanager
def parsed_network(flavour: Flavour, header: bytes, path: Path) -> Iterator[tuple[Any, Any]]:
    """Yield (builder, network) of a header whose external data is beside `path`, and release both on exit.

    Raises:
        EngineError: the parser rejects a node; the message names it.
    """
    api = flavour.api
    builder = api.Builder(flavour.log)
    network = flavour.network(builder)
    parser = api.OnnxParser(network, flavour.log)
    if not parser.parse(header, str(path)):
        reasons = [parser.get_error(index) for index in range(parser.num_errors)]
        reason = f"{reasons[0].node_name()}: {reasons[0].desc()}" if reasons else last_error(flavour.log)
        raise EngineError(f"{flavour.name} {flavour.version} rejects {path.name}: {' '.join(reason.split())[:300]}")
    try:
        yield builder, network
    finally:
        del network, parser, builder
