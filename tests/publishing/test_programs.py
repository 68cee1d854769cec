"""Which programs load a checkpoint: schemes, layouts, and the words of the command."""

from __future__ import annotations

import pytest

from internvl_edge.model.linear import INT8, W8A8, Scheme
from internvl_edge.publishing.programs import Schemes, lmdeploy, programs, vllm

LAYER = "decoder.layers.0."
NAMES = [*(f"self_attn.{part}_proj" for part in "qkvo"), *(f"mlp.{part}_proj" for part in ("gate", "up", "down"))]


def all_in(scheme: Scheme) -> dict[str, Scheme | None]:
    return {LAYER + name: scheme for name in NAMES}


WHOLE = all_in(Scheme(4, 128, symmetric=True))
FINER = Scheme(4, 32, symmetric=True)


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
