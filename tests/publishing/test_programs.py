"""Which programs load a checkpoint: schemes, layouts, and the words of the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from internvl_edge.base.jsonable import decode
from internvl_edge.model.linear import INT8, W8A8, Scheme
from internvl_edge.publishing.programs import Schemes, lmdeploy, programs, vllm

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
LAYER = "decoder.layers.0."
NAMES = [*(f"self_attn.{part}_proj" for part in "qkvo"), *(f"mlp.{part}_proj" for part in ("gate", "up", "down"))]


def all_in(scheme: Scheme) -> dict[str, Scheme | None]:
    return {LAYER + name: scheme for name in NAMES}


WHOLE = all_in(Scheme(4, 128, symmetric=True))
FINER = Scheme(4, 32, symmetric=True)
# Words of vLLM's refusals, and of what is said of such a checkpoint.
SAME = {
    "'mlp1.": "projector",
    "'multi_modal_projector.": "projector",
    "'encoder.layer.": "tower",
    "uint8b128": "8-bit weights with float inputs",
    "load_merged_column_weight": "joins",
}


def test_what_vllm_does_not_load_is_said() -> None:
    tower = WHOLE | {"vision.layers.0.mlp.fc1": W8A8}
    assert vllm(WHOLE, "remote") == vllm(tower, "remote")
    assert "tower" in vllm(tower, "native").obstacles[0]
    for layout in ("remote", "native"):
        whole = vllm(WHOLE, layout)
        assert not whole.obstacles
        assert not whole.only_gpu
        assert "projector" in vllm(WHOLE | {"projector.fc1": W8A8}, layout).obstacles[0]
        for name in ("self_attn.q_proj", "mlp.up_proj"):
            assert "joins" in vllm(WHOLE | {f"{LAYER}{name}": FINER}, layout).obstacles[0]
            assert "joins" in vllm(WHOLE | {f"{LAYER}{name}": None}, layout).obstacles[0]
        assert not vllm(WHOLE | {f"{LAYER}mlp.down_proj": FINER}, layout).obstacles
        head = vllm(WHOLE | {"decoder.lm_head": INT8}, layout)
        assert not head.obstacles
        assert head.only_gpu == "1 linear has 8-bit weights with float inputs"
        assert not head.tried  # nobody here had a GPU
        assert not vllm(WHOLE | {"decoder.lm_head": FINER}, layout).tried
        assert whole.tried
        assert vllm({}, layout).tried


def measured_rows(file: str) -> list[Any]:
    """The rows of a benchmark's results, each with an id."""
    rows = json.loads((RESULTS / f"{file}.json").read_text(encoding="utf-8"))["rows"]
    return [pytest.param(row, id=f"{row['model']}/{row['variant']}") for row in rows]


@pytest.mark.parametrize("row", measured_rows("vllm-load"))
def test_what_is_said_of_vllm_is_what_vllm_did_on_a_cpu(row: dict[str, Any]) -> None:
    """Also the reason: where vLLM refuses a checkpoint, it names what the obstacle names."""
    groups = row["quantized"]
    schemes = {name: decode(Scheme, group["scheme"]) for group in groups for name in group["linears"]}
    said = vllm(schemes, row["layout"])
    assert row["loaded"] == (not said.obstacles and not said.only_gpu)
    assert said.tried or not row["loaded"]
    if not row["loaded"]:
        reasons = [*said.obstacles, said.only_gpu]
        assert any(word in row["error"] and any(part in reason for reason in reasons) for word, part in SAME.items())


@pytest.mark.parametrize(
    ("schemes", "reason"),
    [
        (WHOLE, ""),
        (all_in(FINER), ""),
        (all_in(Scheme(4, 128, symmetric=False)), ""),
        (all_in(Scheme(4, 64, symmetric=True)), "groups of 128 with zero points, and of 32 or 128 without"),
        (all_in(Scheme(4, 32, symmetric=False)), "groups of 128 with zero points"),
        (all_in(INT8), "4-bit weights alone"),
        (WHOLE | {f"{LAYER}mlp.down_proj": FINER}, "one scheme"),
        (WHOLE | {f"{LAYER}self_attn.q_proj": None}, "one scheme"),
        (WHOLE | {"decoder.lm_head": INT8}, "in the decoder's layers alone"),
        (WHOLE | {"vision.layers.0.mlp.fc1": W8A8}, "in the decoder's layers alone"),
    ],
)
def test_what_lmdeploy_reads(schemes: Schemes, reason: str) -> None:
    found = lmdeploy(schemes, "remote")
    assert len(found.obstacles) == bool(reason)
    assert not reason or reason in found.obstacles[0]
    assert not found.tried
    assert found.only_gpu


def test_commands_can_be_copied_and_name_the_layout() -> None:
    served, turbomind = programs(WHOLE, "remote", "my model")
    assert served.command == "vllm serve 'my model' --trust-remote-code"
    assert turbomind.command == "lmdeploy serve api_server 'my model' --backend turbomind"
    native, refused = programs(WHOLE, "native", "org/name", "--revision", "abc")
    assert native.command == "vllm serve org/name --revision abc"
    assert not native.obstacles
    assert "layout" in refused.obstacles[0]
