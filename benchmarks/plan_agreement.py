"""What `plan` counts against what a bundle really holds and the engine really allocates.

    python benchmarks/plan_agreement.py NAME=BUNDLE ...          e.g. 1B=bundles/1B 2B=bundles/2B

Writes results/plan-agreement.json; exit status 1 where they differ by more than 5 %.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from record import write_results

from internvl_edge.bundle.bundle import Bundle
from internvl_edge.bundle.names import EMBEDDINGS
from internvl_edge.planning.footprint import Footprint
from internvl_edge.planning.storage import bundle_storage
from internvl_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine

CONTEXT = 512
ALLOWED = 0.05


def main() -> None:
    """Compare, write, judge."""
    named = [argument.partition("=") for argument in sys.argv[1:]]
    if not named or not all(folder for _, _, folder in named):
        sys.exit(__doc__)
    found = {name: compare(Bundle.open(Path(folder))) for name, _, folder in named}
    print(write_results("plan-agreement", {"context": CONTEXT, "allowed": ALLOWED, "bundles": found}))
    off = [
        f"{name}: {part} is {sizes['off']:+.1%}"
        for name, parts in found.items()
        for part, sizes in parts.items()
        if abs(sizes["off"]) > ALLOWED
    ]
    sys.exit("; ".join(off) or 0)


def compare(bundle: Bundle) -> dict[str, dict[str, Any]]:
    """Part -> bytes counted and real, and how far the first is off."""
    storage = bundle_storage(bundle.manifest)
    footprint = Footprint(bundle.manifest.model, storage)
    counted, files = footprint.weights, bundle.manifest.files
    # The CPU engine's cache holds what its graphs compute in, the planned one 16 or 8 bits.
    cache = OnnxRuntimeEngine(bundle, capacity=CONTEXT)._buffers.arrays
    allocated = sum(array.size for array in cache.values()) * storage.cache_bytes
    pairs = {
        "vision": (counted.vision, files["vision.data"].bytes),
        "decoder": (counted.decoder + counted.head, files["decoder.data"].bytes),
        "token table": (counted.embeddings, files[EMBEDDINGS].bytes),
        "KV cache": (footprint.cache_bytes(CONTEXT), allocated),
    }
    return {part: {"counted": a, "real": b, "off": round(a / b - 1, 5)} for part, (a, b) in pairs.items()}


if __name__ == "__main__":
    main()
