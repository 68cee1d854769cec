"""What an installation takes on disk: a new environment with the wheel and one extra, package by package.

    python benchmarks/install_size.py cpu

pip and setuptools, which the environment brings along, are left out. Writes results/install-size-EXTRA.json.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import write_results

HERE = Path(__file__).resolve().parent
LEFT_OUT = {"pip", "setuptools", "_distutils_hack", "pkg_resources", "distutils-precedence.pth"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("extra", nargs="?", default="cpu")
    parser.add_argument("--limit-mb", type=float, default=200, help="What the environment should take at most.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        facts = measure(Path(name), options.extra)
    facts["limit_bytes"] = int(options.limit_mb * 2**20)
    write_results(f"install-size-{options.extra}", facts)
    print(f"wheel {facts['wheel_bytes'] / 2**20:.1f} MiB, environment {facts['bytes'] / 2**20:.0f} MiB")


def measure(scratch: Path, extra: str) -> dict[str, Any]:
    # setuptools takes up what an earlier build left.
    shutil.rmtree(HERE.parent / "build", ignore_errors=True)
    run(sys.executable, "-m", "build", "--wheel", "--outdir", str(scratch / "dist"), str(HERE.parent))
    shutil.rmtree(HERE.parent / "build")
    (wheel,) = (scratch / "dist").glob("*.whl")
    run(sys.executable, "-m", "venv", str(scratch / "venv"))
    run(str(scratch / "venv" / "bin" / "pip"), "install", f"{wheel}[{extra}]")
    (packages,) = (scratch / "venv" / "lib").glob("python*/site-packages")
    sizes = {
        path.name: disk_usage(path)
        for path in packages.iterdir()
        if path.name not in LEFT_OUT and not path.name.startswith(("pip-", "setuptools-"))
    }
    largest = sorted(sizes.items(), key=lambda entry: -entry[1])
    return {
        "extra": extra,
        "wheel_bytes": wheel.stat().st_size,
        "bytes": sum(sizes.values()),
        "packages": dict(largest[:16]),
    }


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def disk_usage(path: Path) -> int:
    """Bytes of the blocks that files take, as `du` counts."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.lstat().st_blocks * 512 for file in files)


if __name__ == "__main__":
    main()
