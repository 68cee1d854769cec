"""What an installation takes on disk: a new environment with the wheel and one extra, package by package.

    python benchmarks/install_size.py cpu

pip and setuptools, which the environment brings along, are left out. pip also compiles every module; a second
environment is made without that (`pip install --no-compile`) and measured before and after its first answer, when
Python has compiled what it used. Writes results/install-size-EXTRA.json.
"""

from __future__ import annotations

import argparse
import os
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
    lean = facts["not_compiled"]
    print(
        f"wheel {facts['wheel_bytes'] / 2**20:.1f} MiB, environment {facts['bytes'] / 2**20:.0f} MiB, not compiled "
        f"{lean['bytes'] / 2**20:.0f} MiB, after the first answer {lean['bytes_after_an_answer'] / 2**20:.0f} MiB"
    )


def measure(scratch: Path, extra: str) -> dict[str, Any]:
    # setuptools takes up what an earlier build left.
    shutil.rmtree(HERE.parent / "build", ignore_errors=True)
    run(sys.executable, "-m", "build", "--wheel", "--outdir", str(scratch / "dist"), str(HERE.parent))
    shutil.rmtree(HERE.parent / "build")
    (wheel,) = (scratch / "dist").glob("*.whl")
    sizes = sizes_of(install(scratch / "venv", f"{wheel}[{extra}]"))
    largest = sorted(sizes.items(), key=lambda entry: -entry[1])
    lean = install(scratch / "lean", f"{wheel}[{extra}]", "--no-compile")
    before = sum(sizes_of(lean).values())
    bundle = scratch / "bundle"
    program = "from internvl_edge.cli import main; main()"
    demo = HERE.parent / "internvl_edge" / "demo"
    run(sys.executable, "-c", program, "export", str(demo / "qwen2"), "-o", str(bundle))
    question = ["What is the total?", "--image", str(demo / "receipt.png")]
    run(str(scratch / "lean" / "bin" / "internvl-edge"), "run", str(bundle), *question, clean=True)
    return {
        "extra": extra,
        "wheel_bytes": wheel.stat().st_size,
        "bytes": sum(sizes.values()),
        "not_compiled": {"bytes": before, "bytes_after_an_answer": sum(sizes_of(lean).values())},
        "packages": dict(largest[:16]),
    }


def install(environment: Path, what: str, *options: str) -> Path:
    """Make an environment with one package and what it requires, and return the folder of its packages."""
    run(sys.executable, "-m", "venv", str(environment))
    run(str(environment / "bin" / "pip"), "install", *options, what, clean=True)
    (packages,) = (environment / "lib").glob("python*/site-packages")
    return packages


def sizes_of(packages: Path) -> dict[str, int]:
    return {
        path.name: disk_usage(path)
        for path in packages.iterdir()
        if path.name not in LEFT_OUT and not path.name.startswith(("pip-", "setuptools-"))
    }


def run(*command: str, clean: bool = False) -> None:
    """Run a command; a clean one sees nothing of this environment's Python settings."""
    kept = {name: value for name, value in os.environ.items() if not (clean and name.startswith("PYTHON"))}
    subprocess.run(command, check=True, capture_output=True, env=kept)


def disk_usage(path: Path) -> int:
    """Bytes of the blocks that files take, as `du` counts."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.lstat().st_blocks * 512 for file in files)


if __name__ == "__main__":
    main()
