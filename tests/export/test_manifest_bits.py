"""No single bit of the demo bundle's manifest changes what it says: it is refused, or it says the same."""

from __future__ import annotations

from pathlib import Path

from helpers.mutations import memory_folder, outcome
from internvl_edge import export_bundle
from internvl_edge.bundle.manifest import Manifest
from internvl_edge.bundle.names import MANIFEST
from internvl_edge.demo import CHECKPOINT


def test_no_single_bit_changes_what_the_demo_bundle_says(tmp_path: Path) -> None:
    bundle = export_bundle(CHECKPOINT, tmp_path / "bundle", "float16")
    expected, content = Manifest.read(bundle), (bundle / MANIFEST).read_bytes()
    refused = 0
    with memory_folder() as folder:
        for place in range(8 * len(content)):
            flipped = bytearray(content)
            flipped[place // 8] ^= 1 << place % 8
            (folder / MANIFEST).write_bytes(flipped)
            found, line = outcome(lambda: Manifest.read(folder), 0.2, 50)
            assert line is not None or found == expected, place  # the capital letter of an exponent, a space
            refused += line is not None
    assert refused > 7.9 * len(content)
