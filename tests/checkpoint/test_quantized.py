"""Quantized checkpoints of every kind are read exactly; what does not fit is named, what must not be is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import tiny
from helpers.tiny_quantized import plain_weights, round_to_nearest, write_quantized
from internvl_edge.base.errors import CheckpointError
from internvl_edge.checkpoint.codecs import compressed_tensors
from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.model.linear import Scheme

INT4, INT4_SYMMETRIC, INT8 = Scheme(4, 32, False), Scheme(4, 64, True), Scheme(8, None, True)
COMPRESSED: dict[str, Any] = {"method": "compressed-tensors"}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen2 awq": ({}, {}),
    "internlm2 awq, fused": ({"text": "internlm2"}, {}),
    "qwen2 awq, at top level, nothing listed, .bin": ({}, {"place": "top", "listed": False, "file_format": "bin"}),
    "internlm2 awq, .bin": ({"text": "internlm2", "bias": True}, {"file_format": "bin", "listed": False}),
    "native awq, both places": ({"layout": "native"}, {"place": "both"}),
    "native prefixed awq": ({"layout": "native_prefixed", "transformers": 4}, {"place": "top"}),
    "qwen2 int4, zero points": ({}, COMPRESSED | {"body": INT4, "place": "top"}),
    "internlm2 int4 body, int8 head": ({"text": "internlm2"}, COMPRESSED | {"body": INT4_SYMMETRIC, "head": INT8}),
    "native tied body, int8 head": ({"layout": "native", "tie": True}, COMPRESSED | {"body": INT8, "place": "top"}),
    "int8 groups": ({}, COMPRESSED | {"body": Scheme(8, 32, False), "listed": False}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_is_what_its_integers_stand_for(tmp_path: Path, kind: str) -> None:
    sizes, choices = KINDS[kind]
    quantized, twin = write_quantized(tiny.write_checkpoint(tmp_path / "float", **sizes), tmp_path, **choices)
    read, expected = Checkpoint(quantized), Checkpoint(twin)
    assert read.shapes == expected.shapes
    packed = 0
    for name in expected.shapes:
        np.testing.assert_array_equal(read.tensor(name), expected.tensor(name), err_msg=name)
        module = name.removesuffix(".weight")
        linear = read.linear(module)
        if name.endswith(".weight") and linear is not None:
            packed += 1
            assert read.schemes[module].bits == linear.bits
            assert (linear.zero_point is None) == read.schemes[module].symmetric
            np.testing.assert_array_equal(linear.dequantize(), expected.tensor(name))
            if read.has(f"{module}.bias"):
                np.testing.assert_array_equal(linear.bias, expected.tensor(f"{module}.bias"))
    assert packed == 7 * 2 + ("head" in choices)
    assert expected.linear("decoder.layers.0.mlp.up_proj") is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_of_any_float_type_are_read_as_they_are(tmp_path: Path, dtype: torch.dtype) -> None:
    choices = COMPRESSED | {"body": INT4_SYMMETRIC}
    quantized, _ = write_quantized(tiny.write_checkpoint(tmp_path / "float"), tmp_path, **choices)
    scale = torch.rand(128, 1, generator=torch.Generator().manual_seed(0)).to(dtype)
    edit_tensors(quantized, lambda t: t.update({f"{UP}.weight_scale": scale}))
    linear = Checkpoint(quantized).linear("decoder.layers.1.mlp.up_proj")
    assert linear is not None
    np.testing.assert_array_equal(linear.scale, scale.float().numpy())


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    change(config)
    path.write_text(json.dumps(config), encoding="utf-8")


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


@pytest.fixture(scope="module")
def awq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("awq")
    return write_quantized(tiny.write_checkpoint(folder / "float"), folder)[0]


@pytest.fixture
def copy(awq: Path, tmp_path: Path) -> Path:
    for path in awq.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


UP = "language_model.model.layers.1.mlp.up_proj"
BROKEN: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "missing": (lambda t: t.pop(f"{UP}.qzeros"), rf"{UP}\.qzeros is missing"),
    "all of it missing": (
        lambda t: [t.pop(f"{UP}.{last}") for last in ("qweight", "qzeros", "scales")],
        rf"{UP}\.weight is missing",
    ),
    "weight besides": (lambda t: t.update({f"{UP}.weight": torch.zeros(128, 64)}), rf"unexpected tensor {UP}\.weight"),
    "shape": (
        lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"][:, 1:]}),
        rf"{UP}\.qweight has the shape \[64, 15\], .* needs \[64, 16\]",
    ),
    "dtype of integers": (
        lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"].long()}),
        rf"{UP}\.qweight has dtype I64, expected I32",
    ),
    "dtype of scales": (
        lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"].double()}),
        rf"{UP}\.scales has dtype F64, expected F16",
    ),
    "g_idx": (lambda t: t.update({f"{UP}.g_idx": torch.zeros(64)}), rf"unexpected tensor {UP}\.g_idx"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_tensor_that_does_not_fit_is_named(copy: Path, fault: str) -> None:
    change, message = BROKEN[fault]
    edit_tensors(copy, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint(copy)
    assert "\n" not in str(caught.value)


def test_a_damaged_scale_is_named_when_it_is_read(copy: Path) -> None:
    edit_tensors(copy, lambda t: t[f"{UP}.scales"].fill_(torch.inf))
    with pytest.raises(CheckpointError, match=rf"{UP}: a scale"):
        Checkpoint(copy).linear("decoder.layers.1.mlp.up_proj")


def test_group_sizes_that_do_not_divide_name_the_layer_and_those_that_do(copy: Path) -> None:
    edit_config(copy, lambda c: c["llm_config"]["quantization_config"].update(group_size=48))
    with pytest.raises(CheckpointError, match=r"layers\.0\..* has 64 inputs.*groups of 48.*that fit: 32, 64$"):
        Checkpoint(copy)


CONTRADICTIONS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "two places": (
        lambda c: c.update(quantization_config=c["llm_config"]["quantization_config"] | {"group_size": 64}),
        r"quantization_config and llm_config\.quantization_config contradict",
    ),
    "no configuration": (lambda c: c["llm_config"].pop("quantization_config"), r"no quantization_config"),
    "gptq": (
        lambda c: c["llm_config"]["quantization_config"].update(quant_method="gptq"),
        r"llm_config\.quantization_config\.quant_method is 'gptq', supported: awq, compressed-tensors",
    ),
    "fp8": (lambda c: c["llm_config"]["quantization_config"].update(quant_method="fp8"), r"'fp8'"),
    "2 bits": (lambda c: c["llm_config"]["quantization_config"].update(bits=2), r"2 bits, which leave too little"),
}


@pytest.mark.parametrize("kind", CONTRADICTIONS)
def test_a_configuration_that_does_not_fit_is_named(copy: Path, kind: str) -> None:
    change, message = CONTRADICTIONS[kind]
    edit_config(copy, change)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(copy)


def test_a_configuration_without_quantized_tensors_is_an_error(tmp_path: Path, awq: Path) -> None:
    folder = tiny.write_checkpoint(tmp_path / "float")
    (folder / "config.json").write_bytes((awq / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="no tensor is quantized"):
        Checkpoint(folder)


def test_a_pattern_that_is_no_regular_expression_is_named(tmp_path: Path) -> None:
    quantized, _ = write_quantized(tiny.write_checkpoint(tmp_path / "float"), tmp_path, **COMPRESSED)
    edit_config(quantized, lambda c: c["llm_config"]["quantization_config"].update(ignore=["re:.*mlp[1"]))
    with pytest.raises(CheckpointError, match=r"^config\.json: llm_config\..*'re:\.\*mlp\[1'.*no regular expr"):
        Checkpoint(quantized)


def test_several_schemes_are_told_apart_or_named(tmp_path: Path) -> None:
    choices = COMPRESSED | {"body": INT4_SYMMETRIC, "head": INT8}
    quantized, _ = write_quantized(tiny.write_checkpoint(tmp_path / "float"), tmp_path, **choices)
    checkpoint = Checkpoint(quantized)
    assert checkpoint.schemes["decoder.lm_head"] == INT8
    assert {checkpoint.schemes[name] for name in checkpoint.schemes if name != "decoder.lm_head"} == {INT4_SYMMETRIC}
    groups = lambda c: c["llm_config"]["quantization_config"]["config_groups"]  # noqa: E731
    edit_config(quantized, lambda c: groups(c)["group_1"]["weights"].update(num_bits=4))
    with pytest.raises(
        CheckpointError, match=r"lm_head\.weight_packed .* fit none of .*int4 in groups of 64, symmetric"
    ):
        Checkpoint(quantized)


# ---- policy ----

LARGE = {"hidden_size": 3200, "num_hidden_layers": 45, "num_attention_heads": 25, "qk_normalization": True}
BITSANDBYTES: dict[str, Callable[[dict[str, Any]], object]] = {
    "method at top level": lambda c: c.update(
        quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}
    ),
    "method in llm_config": lambda c: c["llm_config"].update(quantization_config={"quant_method": "bitsandbytes"}),
    "method for the tower": lambda c: c["vision_config"].update(quantization_config={"quant_method": "bitsandbytes"}),
    "flag": lambda c: c.update(load_in_4bit=True),
    "flag in llm_config": lambda c: c["llm_config"].update(load_in_8bit=True),
    "private flag": lambda c: c.update(quantization_config={"_load_in_4bit": True}),
    "key of its own": lambda c: c.update(quantization_config={"bnb_4bit_quant_type": "nf4"}),
}


@pytest.mark.parametrize("large", [True, False], ids=["6B tower", "300M tower"])
@pytest.mark.parametrize("kind", BITSANDBYTES)
def test_bitsandbytes_is_refused_with_the_reason_and_what_to_use(tmp_path: Path, kind: str, large: bool) -> None:
    """Keyed on the tower's sizes: the names in both configurations are the same."""
    folder = tiny.write_checkpoint(tmp_path / "float")
    edit_config(folder, BITSANDBYTES[kind])
    if large:
        edit_config(folder, lambda c: c["vision_config"].update(LARGE))
    with pytest.raises(CheckpointError, match="bitsandbytes") as caught:
        Checkpoint(folder)
    assert ("nonsensical output" in str(caught.value)) == large
    assert "AWQ" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_either_size_makes_a_tower_large(tmp_path: Path) -> None:
    for key in ("hidden_size", "num_hidden_layers"):
        folder = tiny.write_checkpoint(tmp_path / key)
        edit_config(folder, lambda c: c.update(load_in_4bit=True))
        edit_config(folder, lambda c, key=key: c["vision_config"].update({key: LARGE[key]}))  # type: ignore[misc]
        with pytest.raises(CheckpointError, match="nonsensical output"):
            Checkpoint(folder)


@pytest.mark.parametrize("last", ["quant_state.bitsandbytes__nf4", "absmax", "SCB"])
def test_tensors_of_bitsandbytes_are_refused_without_a_configuration(tmp_path: Path, last: str) -> None:
    folder = tiny.write_checkpoint(tmp_path / "float")
    edit_tensors(folder, lambda t: t.update({f"{UP}.weight.{last}": torch.zeros(4)}))
    with pytest.raises(CheckpointError, match=r"bitsandbytes.*cannot be exported"):
        Checkpoint(folder)


def test_flags_that_say_no_are_not_refused(tmp_path: Path) -> None:
    folder = tiny.write_checkpoint(tmp_path / "float")
    edit_config(folder, lambda c: c.update(load_in_4bit=False, quantization_config=None))
    assert Checkpoint(folder).quantization is None


def test_four_bits_on_the_tower_are_refused_and_eight_are_read(tmp_path: Path) -> None:
    source = tiny.write_checkpoint(tmp_path / "float")
    module = "vision_model.encoder.layers.0.mlp.fc1"
    for scheme in (INT8, INT4_SYMMETRIC):
        quantized, _ = write_quantized(source, tmp_path / str(scheme.bits), **COMPRESSED, body=scheme)
        linear = round_to_nearest(load_file(source / "model.safetensors")[f"{module}.weight"].float().numpy(), scheme)
        packed = {f"{module}.{last}": torch.from_numpy(a) for last, a in compressed_tensors.pack(linear).items()}
        edit_tensors(quantized, lambda t, packed=packed: t.update(packed) or t.pop(f"{module}.weight"))  # type: ignore[misc]
        if scheme.bits == 4:
            with pytest.raises(CheckpointError, match=r"vision\.layers\.0\.mlp\.fc1 has 4 bits"):
                Checkpoint(quantized)
        else:
            np.testing.assert_array_equal(
                Checkpoint(quantized).tensor("vision.layers.0.mlp.fc1.weight"), plain_weights(linear)
            )
