"""4 and 8 bits by llama.cpp: cpu_gguf_quantize.py TEXT-F16.gguf OUT."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import llama_cpp

KINDS = {"Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0}


def main() -> None:
    source, out = map(Path, sys.argv[1:3])
    for name, kind in KINDS.items():
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype = kind
        target = out / f"text-{name}.gguf"
        part = target.with_suffix(".part")
        if llama_cpp.llama_model_quantize(str(source).encode(), str(part).encode(), ctypes.byref(parameters)):
            sys.exit(f"llama.cpp did not write {target}")
        part.replace(target)


if __name__ == "__main__":
    main()
