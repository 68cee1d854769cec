"""`internvl-edge native`: compile the attention operators for ONNX Runtime on CPUs, now and not at the first start."""

from __future__ import annotations

from pathlib import Path

import click

from internvl_edge.base.files import readable_disk_errors

from .output import print_json, print_table, quiet_option, shown_progress


@click.command("native")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the library to this file, for machines of the same kind without a compiler. There, the environment "
    "variable INTERNVL_EDGE_NATIVE is its path.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@quiet_option
def command(output: Path | None, as_json: bool, quiet: bool) -> None:
    """Compile the attention operators with this machine's C++ compiler (g++ or clang++), and check them.

    The first start of a quantized bundle does this by itself where there is a compiler. This command repeats it, also
    after it failed. Nothing needs the operators: without them, bundles run with ONNX Runtime's own, more slowly.
    """
    from internvl_edge.runtime.native.build import build, ensure_library
    from internvl_edge.runtime.native.choice import check, level

    with shown_progress(quiet) as progress, progress.phase("compiling the attention operators"):
        if output is None:
            library = ensure_library(again=True)
        else:
            with readable_disk_errors(output):
                build(output)
            library = output.absolute()
        check(library)
    facts = {"library": str(library), "level": level(library)}
    if as_json:
        print_json(facts)
    else:
        print_table(list(facts.items()))
