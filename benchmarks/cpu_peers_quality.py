"""The quality of the forms that cpu_peers.py measures, from what the benchmarks of quality wrote. Nothing is run here.

The bundles whose speed is measured have random weights. Their form (bits, head, tower, prompts) is looked up among the
recipes of trained models. Bits, tower and prompts must be the same; where the nearest row differs in something else,
the figure says in what.
"""

from __future__ import annotations

import json
from typing import Any

from reader_quality import ROWS
from record import RESULTS

from internvl_edge.recipe.files import make_recipe, read_recipe

Form = dict[str, Any]
LAYOUTS = ("qwen2", "internlm2")
_REQUIRED = ("bits", "vision", "int8_prompts")
_SHOWN = {
    "lm_head": lambda value: f"{value} head",
    "group_size": lambda value: f"groups of {value}",
    "symmetric": lambda value: "no zero points" if value else "zero points",
}


def exact_match(form: Form) -> str:
    """Exact answers of the two demo readers with the nearest recipe."""
    nearest = nearest_row(form)
    return "-" if nearest is None else " / ".join(f"{exact(layout, nearest[0]):.3f}" for layout in LAYOUTS)


def quality_source(form: Form) -> str:
    """Which row the figures come from, in what it differs, and what float weights reach."""
    nearest = nearest_row(form)
    if nearest is None:
        return "no row of reader_quality.py"
    floats = " / ".join(f"{exact(layout, 'float'):.3f}" for layout in LAYOUTS)
    source = ", ".join([nearest[0], *nearest[1]])
    rounded = "; SmolLM2 rounded to nearest in groups of 64" if form["bits"] == 4 else ""
    return f"{source} (float weights {floats}){rounded}"


def exact(layout: str, row: str) -> float:
    results = json.loads((RESULTS / f"reader-quality-{layout}.json").read_text(encoding="utf-8"))["results"]
    return float(next(result["exact_match"] for result in results if result["name"] == row))


def nearest_row(form: Form) -> tuple[str, list[str]] | None:
    """The row of reader_quality.py that is most like a form, and in what it differs."""
    candidates = []
    for name in ROWS:
        other = row_form(name)
        if all(other[key] == form[key] for key in _REQUIRED):
            differs = [f"there {_SHOWN[key](other[key])}" for key in _SHOWN if other[key] != form[key]]
            candidates.append((name, differs))
    return min(candidates, key=lambda candidate: len(candidate[1]), default=None)


def row_form(name: str) -> Form:
    """The form of one row of reader_quality.py."""
    fields = ROWS[name]
    if fields is None:
        return dict.fromkeys(("group_size", "symmetric")) | {
            "bits": 16,
            "lm_head": "fp",
            "vision": "fp",
            "int8_prompts": False,
        }
    recipe = make_recipe(read_recipe(fields) if isinstance(fields, str) else fields)
    scheme = recipe.precision(recipe.decoder).scheme
    return {
        "bits": scheme.bits if scheme else 16,
        "group_size": scheme.group_size if scheme else None,
        "symmetric": scheme.symmetric if scheme else None,
        "lm_head": recipe.lm_head,
        "vision": recipe.vision,
        "int8_prompts": name.endswith("int8 prompts"),
    }


def smollm_kl(form: Form) -> str:
    """Divergence of SmolLM2 from its float weights with the same products."""
    if form["bits"] == 8 and not form["int8_prompts"]:
        results = json.loads((RESULTS / "smollm-precision.json").read_text(encoding="utf-8"))["results"]
        return f"{next(row['all']['kl_mean'] for row in results if row['name'] == 'w8a16'):.3f}"
    if form["bits"] != 4:
        return "-"
    figures = json.loads((RESULTS / "int8-prompts.json").read_text(encoding="utf-8"))["figures"]
    kl = figures["4 bits, prompts in int8" if form["int8_prompts"] else "4 bits"]["kl"]
    return f"{kl:.3f}"
