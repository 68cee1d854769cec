"""List the compiled kernels of an engine file of TensorRT for RTX: their order, what each fuses, and the copies.

    python benchmarks/engine_kernels.py BUNDLE/engines/rtx/decoder.engine [--program 0] [--json]

Needs neither a GPU nor TensorRT. Each program is that of one optimization profile. Of a decoder with three, 0 is for
one token with a window of the cache, 1 for one token with the whole cache, and 2 for prompts.

Marks: A attention, P product, M a kernel that only moves data, C one that reads the KV cache and writes it elsewhere,
U one that dequantizes weights in memory.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from internvl_edge.compiler.compiled import CompiledProgram, Kernel, compiled_programs


def main() -> None:
    """Print the kernels of each program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--program", type=int, help="only this program")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    arguments = parser.parse_args()
    programs = dict(enumerate(compiled_programs(arguments.engine)))
    if arguments.program is not None:
        programs = {number: program for number, program in programs.items() if number == arguments.program}
    if arguments.json:
        found = [
            {"program": number, **program.summary(), "list": [asdict(kernel) for kernel in program.kernels]}
            for number, program in programs.items()
        ]
        print(json.dumps(found, indent=2))
        return
    for number, program in programs.items():
        print(f"program {number}: " + ", ".join(f"{name} {count}" for name, count in program.summary().items()))
        for kernel in program.kernels:
            print(f"  {marks(program, kernel):<3} {kernel.name}  <- {' '.join(kernel.nodes)}")


def marks(program: CompiledProgram, kernel: Kernel) -> str:
    """The letters of a kernel."""
    kinds = {
        "A": kernel.attends,
        "P": kernel.multiplies,
        "M": kernel.moves,
        "C": kernel in program.cache_rewrites,
        "U": kernel in program.unpacked,
    }
    return "".join(letter for letter, holds in kinds.items() if holds)


if __name__ == "__main__":
    main()
