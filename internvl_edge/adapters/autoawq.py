"""Quantize with the search of AutoAWQ 0.2.9 for scales and clipping, to compare it with the search of this project.

    python -m internvl_edge.adapters.autoawq CHECKPOINT CALIBRATION OUT --group-size 128

This works for Qwen2 models only. AutoAWQ itself calibrates on text; here it receives the embeddings that `calibrate`
made, image tokens included. The whole decoder is in memory in float32. The extra `autoawq` is necessary (AutoAWQ is
archived upstream, and works with transformers 5.5 to 5.23).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from internvl_edge.base.errors import EdgeError
from internvl_edge.base.extras import requires
from internvl_edge.base.files import readable_disk_errors
from internvl_edge.base.folders import new_folder
from internvl_edge.calibration.compute import to_numpy, to_torch
from internvl_edge.calibration.dataset import CalibrationSet
from internvl_edge.calibration.pipeline import require_same_checkpoint
from internvl_edge.calibration.work import checkpoint_identity
from internvl_edge.checkpoint.codecs import autoawq
from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.checkpoint.tensor_files import write_shards
from internvl_edge.quantize.block import QuantizedBlock
from internvl_edge.quantize.output import OutputLayout
from internvl_edge.quantize.plan import plan_decoder
from internvl_edge.recipe.recipe import Recipe

# Tokens per sequence. AutoAWQ joins its samples and cuts them into sequences of this length, its own default.
SEQUENCE_LENGTH = 512
_PARTS = ("qweight", "qzeros", "scales")


def quantize_with_autoawq(
    checkpoint: str | Path, calibration: str | Path, out: str | Path, group_size: int = 128
) -> Path:
    """Quantize the decoder of a Qwen2 checkpoint to 4 bits with AutoAWQ's search.

    Args:
        checkpoint: local folder with float weights.
        calibration: the folder that `calibrate` made with this checkpoint.
        out: the checkpoint folder to make, in AutoAWQ's GEMM format.
        group_size: inputs that share one scale.

    Raises:
        EdgeError: the text model is not Qwen2, `out` exists, AutoAWQ is missing or broken, the calibration
            folder cannot be used or is of another checkpoint, or `plan_decoder` refuses.
    """
    source, target = Checkpoint(Path(checkpoint)), Path(out)
    if source.config.decoder.architecture != "qwen2":
        raise EdgeError(
            f"AutoAWQ is wrong for {source.config.decoder.architecture}: it scales the last rows of the fused wqkv, "
            "which are not the value rows; use internvl-edge quantize"
        )

    def permit() -> None:
        if target.exists():
            raise EdgeError(f"{target} exists; choose another folder or remove it")

    permit()
    recipe = Recipe(group_size=group_size)
    plan = plan_decoder(source, recipe)
    data = CalibrationSet.open(Path(calibration))
    require_same_checkpoint(data, checkpoint_identity(source.folder))
    state = _search(source, _sequences(data), group_size)
    layout = OutputLayout(source, recipe)
    quantized = layout.tensors(_as_block(source, state))
    tensors = [*quantized, *layout.unchanged(tensor.name for tensor in quantized)]
    config = layout.config(plan, (tensor.name for tensor in quantized))
    with readable_disk_errors(target), new_folder(target, permit, "choose another folder") as folder:
        write_shards(folder, sorted(tensors, key=lambda tensor: tensor.name))
        layout.copy_side_files(folder)
        (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return target


def _sequences(data: CalibrationSet) -> Tensor:
    """Join the embedded samples, and cut them into sequences [sequences, length, hidden] float32."""
    length = min(SEQUENCE_LENGTH, data.total)
    count = data.total // length
    return torch.from_numpy(np.array(data.embeddings()[: count * length])).reshape(count, length, -1)


def _search(checkpoint: Checkpoint, sequences: Tensor, group_size: int) -> dict[str, Tensor]:
    """Run AutoAWQ, and return the tensors of the decoder's layers by their names without `decoder.`."""
    with requires("autoawq", "AutoAWQ's search"):
        from awq.models.qwen2 import Qwen2AWQForCausalLM
        from awq.quantize.quantizer import AwqQuantizer

    class Embedded(AwqQuantizer):  # type: ignore[misc]  # the library has no types
        """A quantizer that starts from embeddings instead of token ids, and copies weights before it tries scales.

        AutoAWQ saves the weights with `.cpu()`, which does not copy on a CPU. The first scale would stay in the model.
        """

        def init_quant(self, n_samples: int = 0, max_seq_len: int = 0) -> tuple[Any, dict[str, Any], Tensor]:
            positions = torch.arange(sequences.shape[1])[None]
            rotary = self.model.model.rotary_emb(sequences, positions)
            given = {"attention_mask": None, "position_ids": positions, "position_embeddings": rotary}
            return self.awq_model.get_model_layers(self.model), given, sequences

        def _compute_best_scale(self, x: Any, w_mean: Any, x_mean: Any, module: Any, *rest: Any) -> Any:
            kept = {name: tensor.clone() for name, tensor in module.state_dict().items()}
            module.state_dict = lambda: kept
            try:
                return super()._compute_best_scale(x, w_mean, x_mean, module, *rest)
            finally:
                del module.state_dict

    model = _text_model(checkpoint)
    wrapped = Qwen2AWQForCausalLM(model, "qwen2", False, model.config, None, None)
    wanted = {"zero_point": True, "q_group_size": group_size, "w_bit": 4, "version": "GEMM"}
    wrapped.quantize(None, quant_config=wanted, quantizer_cls=Embedded)
    state = model.state_dict()
    return {name.removeprefix("model."): tensor for name, tensor in state.items() if ".layers." in name}


def _text_model(checkpoint: Checkpoint) -> Any:
    """Return transformers' Qwen2ForCausalLM with the checkpoint's decoder in float32."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    decoder = checkpoint.config.decoder
    config = Qwen2Config(
        vocab_size=decoder.vocab_size,
        hidden_size=decoder.hidden_size,
        intermediate_size=decoder.intermediate_size,
        num_hidden_layers=decoder.num_hidden_layers,
        num_attention_heads=decoder.num_attention_heads,
        num_key_value_heads=decoder.num_key_value_heads,
        rms_norm_eps=decoder.rms_norm_eps,
        max_position_embeddings=decoder.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": decoder.rope.theta},
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    names = [name for name in checkpoint.shapes if name.startswith("decoder.")]
    # Copy the weights, because AutoAWQ scales them in place, and those of a float32 checkpoint are views of its file.
    tensors = {name: to_torch(checkpoint.tensor(name)).to(torch.float32, copy=True) for name in names}
    prefixes = {"decoder.lm_head": "lm_head", "decoder.": "model."}
    renamed = {_renamed(name, prefixes): tensor for name, tensor in tensors.items()}
    model.load_state_dict(renamed, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are not in the checkpoint
    return model.eval()


def _renamed(name: str, prefixes: dict[str, str]) -> str:
    return next(new + name.removeprefix(old) for old, new in prefixes.items() if name.startswith(old))


def _as_block(checkpoint: Checkpoint, state: dict[str, Tensor]) -> QuantizedBlock:
    """Convert AutoAWQ's result to a `QuantizedBlock`. Norms and biases are rounded to the dtype of the checkpoint."""
    block = QuantizedBlock()
    for name, tensor in state.items():
        module, _, kind = f"decoder.{name}".rpartition(".")
        if kind == "qweight":
            parts = (state[f"{name.removesuffix(kind)}{part}"].numpy() for part in _PARTS)
            block.linears[module] = autoawq.unpack(*parts)
        elif kind not in _PARTS:
            stored = to_torch(checkpoint.tensor(f"{module}.{kind}")).dtype
            block.tensors[f"{module}.{kind}"] = to_numpy(tensor.to(stored))
    return block


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("calibration", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--group-size", type=int, default=128, show_default=True, help="Inputs that share one scale.")
def main(checkpoint: Path, calibration: Path, out: Path, group_size: int) -> None:
    """Quantize CHECKPOINT with AutoAWQ into OUT. CALIBRATION is the folder that `internvl-edge calibrate` made."""
    try:
        click.echo(quantize_with_autoawq(checkpoint, calibration, out, group_size))
    except EdgeError as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main()
