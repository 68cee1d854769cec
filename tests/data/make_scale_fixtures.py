"""Write scales.npz: the scales that autoawq 0.2.9 chooses for a tiny Qwen2, with the model and the tokens it saw.

    benchmarks/peers/make_env.sh autoawq ENV && ENV/bin/python tests/data/make_scale_fixtures.py

Clipping is off; groups of 32 with zero points. Imports nothing from internvl_edge; the class that mends autoawq on a
CPU is that of benchmarks/peers/run_autoawq.py. Runs in an environment of its own.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from awq.models.qwen2 import Qwen2AWQForCausalLM
from transformers import Qwen2Config, Qwen2ForCausalLM

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent.parent / "benchmarks" / "peers"))
from run_autoawq import CopyingQuantizer  # noqa: E402

SEQUENCES, LENGTH, GROUP = 6, 48, 32
LOUD = (3, 17, 40)
"""Channels many times louder than the rest, as language models have them."""


def model() -> Qwen2ForCausalLM:
    """Random weights that float16 holds exactly; as many key as query heads, so that o_proj is scaled, too."""
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    random = torch.Generator().manual_seed(0)
    made = Qwen2ForCausalLM(config).eval()
    for name, tensor in made.state_dict().items():
        width = tensor.shape[-1]
        drawn = torch.randn(tensor.shape, generator=random)
        if "norm" in name:
            drawn = 1 + 0.2 * drawn
            drawn[list(LOUD)] *= 8
        elif name.endswith("weight") and "embed" not in name:
            drawn *= width**-0.5 * torch.exp(0.5 * torch.randn(width, generator=random))
        tensor.copy_(drawn.half().float())
    return made


def main() -> None:
    chosen: dict[str, np.ndarray] = {}
    layer = iter(range(2))

    class Recording(CopyingQuantizer):
        """Starts from embeddings and writes down what it chooses."""

        def init_quant(self, n_samples: int = 0, max_seq_len: int = 0) -> tuple[Any, dict[str, Any], torch.Tensor]:
            positions = torch.arange(LENGTH)[None]
            rotary = self.model.model.rotary_emb(embeds, positions)
            given = {"attention_mask": None, "position_ids": positions, "position_embeddings": rotary}
            return self.awq_model.get_model_layers(self.model), given, embeds

        def _search_best_scale(self, module: Any, **group: Any) -> Any:
            producer, consumers, scale = super()._search_best_scale(module, **group)
            if producer == "input_layernorm":
                self.layer = next(layer)
            chosen[f"scale/{self.layer}.{producer}"] = scale.numpy().astype(np.float32)
            return producer, consumers, scale

    tiny = model()
    ids = torch.randint(0, 64, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1))
    embeds = tiny.model.embed_tokens(ids).detach()
    stored = {name: tensor.numpy().astype(np.float16) for name, tensor in tiny.model.state_dict().items()}
    given = {name: tensor for name, tensor in stored.items() if name.startswith("layers.")}
    wrapped = Qwen2AWQForCausalLM(tiny, "qwen2", False, tiny.config, None, None)
    wanted = {"zero_point": True, "q_group_size": GROUP, "w_bit": 4, "version": "GEMM"}
    wrapped.quantize(None, quant_config=wanted, apply_clip=False, quantizer_cls=Recording)
    path = HERE / "scales.npz"
    np.savez_compressed(path, embeds=embeds.numpy().astype(np.float16), **given, **chosen)
    print(f"{path}: {path.stat().st_size} bytes, {sorted(chosen)}")


if __name__ == "__main__":
    main()
