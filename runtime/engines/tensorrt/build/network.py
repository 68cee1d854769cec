"""A serialised header becomes a parsed TensorRT network.

Knows TensorRT's parser; a graph that it rejects is one line that names the node.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from internvl_edge.base.errors import EngineError

from ..flavour import Flavour, last_error


@contextmanager
def parsed_network(flavour: Flavour, header: bytes, path: Path) -> Iterator[tuple[Any, Any]]:
    """(builder, network) of a header whose external data lies beside `path`; released on leaving.

    Raises:
        EngineError: the parser rejects a node, which is named.
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
