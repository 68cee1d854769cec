"""Write the quantized checkpoint as a Hugging Face folder in the layout of the original one.

Packed linears take the place of their weights under the stored names. InternLM2's q, k and v become rows of the fused
`wqkv`. All other tensors are copied. config.json says how the weights are packed.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from internvl_edge.checkpoint import layouts
from internvl_edge.checkpoint.codecs import autoawq, compressed_tensors
from internvl_edge.checkpoint.json_files import read_json
from internvl_edge.checkpoint.kv_scales import KV_CACHE_SCALES
from internvl_edge.checkpoint.license import CARD
from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.checkpoint.record import RECORD, REPORTS
from internvl_edge.checkpoint.tensor_files import OutTensor, numpy_dtype, open_tensor_files
from internvl_edge.model.config import DecoderConfig
from internvl_edge.model.linear import W8A8, PackedLinear, Scheme, concatenate
from internvl_edge.recipe.recipe import Recipe

from .block import QuantizedBlock
from .plan import Plan

# The names of stored vision and projector linears, as patterns of the configuration.
_VISION_TARGETS = {
    "remote": (r"re:.*vision_model\..*\.(qkv|proj|fc1|fc2)", r"re:.*mlp1\.\d+"),
    "native": (
        r"re:.*vision_tower\..*\.(q_proj|k_proj|v_proj|projection_layer|fc1|fc2)",
        r"re:.*multi_modal_projector\.linear_\d",
    ),
}
_SECTION = {"remote": "llm_config", "native": "text_config"}
# Modules that stay float, as substrings of their names.
_FLOAT_MODULES = {"remote": ("vision_model", "mlp1"), "native": ("vision_tower", "multi_modal_projector")}
# Suffixes of files that are not copied: compiled code, pickles and what can hold them, and weights, written anew.
_LEFT_OUT = {".pyc", ".bin", ".pt", ".pth", ".pkl", ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx"}
_LEFT_OUT |= {".ckpt", ".distcp", ".joblib", ".npy", ".npz", ".pickle", ".tar", ".zip"}
# Files that this run makes itself, or that say something of another one: the scales of an int8 KV cache would give the
# result such a cache, whatever its recipe says.
_OWN = {"config.json", CARD, RECORD, KV_CACHE_SCALES, *REPORTS}
_TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_PARTS = ("query", "key", "value")
_PART = re.compile(r"\.[qkv]_proj\.")
# The stored name of a linear in the decoder's layers.
_MODULE = re.compile(r".*\.layers\.(?P<layer>\d+)\.(?P<kind>.+)")


class OutputLayout:
    """The names and forms of one checkpoint's quantized tensors."""

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe) -> None:
        self._checkpoint = checkpoint
        self._config = checkpoint.config
        self._recipe = recipe
        self._stored = open_tensor_files(checkpoint.folder)
        self._disk = {layouts.without_prefix(self._config, name): name for name in self._stored}
        weight = self._stored[self._disk[self._source("decoder.layers.0.mlp.up_proj.weight").names[0]]]
        self.float_dtype = numpy_dtype(weight.dtype)
        # Of packed weights: float16 for AutoAWQ, else the checkpoint's float type.
        self.scale_dtype = torch.float16 if recipe.is_autoawq else _TORCH[self.float_dtype.name]

    def tensors(self, block: QuantizedBlock) -> list[OutTensor]:
        """Return the tensors of one quantized block as they will be stored."""
        out = [OutTensor.of(name, array) for name, array in self._floats(block.tensors)]
        for module, packed in self._modules(block.linears):
            out += [OutTensor.of(f"{module}.{part}", array) for part, array in self._pack(packed).items()]
        return out

    def unchanged(self, replaced: Iterable[str]) -> list[OutTensor]:
        """Return all stored tensors that no tensor in `replaced` replaces.

        A tensor is replaced by one of the same name, or, for a weight, by the packed tensors of its module.
        """
        names = set(replaced)
        modules = {name.rpartition(".")[0] for name in names if name.endswith((".qweight", ".weight_packed"))}
        gone = names | {f"{module}.weight" for module in modules}
        return [OutTensor.stored(name, tensor) for name, tensor in self._stored.items() if name not in gone]

    def config(self, plan: Plan, replaced: Iterable[str]) -> dict[str, Any]:
        """Return config.json with the quantization.

        It is at the top and, where the text model is quantized, in its section too.

        `replaced` holds the names of all tensors that quantization has made.
        """
        values = read_json(self._checkpoint.folder / "config.json")
        described = self._description(plan, set(replaced))
        text = [*(choice.precision for choice in plan.values()), self._recipe.head]
        if all(precision.scheme is None for precision in text):
            return values if self._recipe.vision == "fp" else values | {"quantization_config": described}
        section = _SECTION[self._config.layout]
        values[section] = values[section] | {"quantization_config": described}
        return values | {"quantization_config": described}

    def copy_side_files(self, folder: Path) -> None:
        """Copy tokenizer, generation, processor and code files unread.

        Other programs need them. Pickles are not copied, nor files that belong to the original's own run or card.
        """
        for path in sorted(self._checkpoint.folder.iterdir()):
            written = path.name in _OWN or path.name.endswith(".index.json")
            skipped = path.suffix in _LEFT_OUT or written
            if path.is_file() and not skipped and not path.name.startswith("."):
                shutil.copyfile(path, folder / path.name)

    def _description(self, plan: Plan, replaced: set[str]) -> dict[str, Any]:
        recipe, head = self._recipe, self._source("decoder.lm_head.weight").names[0].split(".")[-2]
        if recipe.is_autoawq:
            return autoawq.configuration(recipe.group_size, [*_FLOAT_MODULES[self._config.layout], head])
        layout, ignore = self._config.layout, []
        targets: dict[Scheme, list[str]] = {}
        if recipe.vision == "int8":
            targets[W8A8] = list(_VISION_TARGETS[layout])
            ignore = [f"re:.*{re.escape(module)}" for module in self._float_linears(replaced)]
        else:
            ignore = [f"re:.*{name}.*" for name in _FLOAT_MODULES[layout]]
        for scheme, names in [*self._layer_targets(plan).items(), (recipe.head.scheme, [f"re:.*{head}"])]:
            if scheme is None:
                ignore += names
            else:
                targets[scheme] = [*targets.get(scheme, []), *names]
        return compressed_tensors.configuration(targets, ignore)

    def _layer_targets(self, plan: Plan) -> dict[Scheme | None, list[str]]:
        """Return patterns of the decoder's stored modules by scheme (None for floats), one for each kind of module.

        They match linears and nothing else: transformers would quantize whatever module a pattern matches. No two match
        the same module, so their order does not matter to any reader.
        """
        layers: dict[tuple[Scheme | None, str], set[int]] = {}
        for name, choice in plan.items():
            stored = self._disk[self._source(f"{name}.weight").names[0]].removesuffix(".weight")
            found = _MODULE.fullmatch(stored)
            assert found is not None
            layers.setdefault((choice.precision.scheme, found["kind"]), set()).add(int(found["layer"]))
        targets: dict[Scheme | None, list[str]] = {}
        for (scheme, kind), numbers in layers.items():
            every = len(numbers) == self._config.decoder.num_hidden_layers
            which = r"\d+" if every else f"({'|'.join(map(str, sorted(numbers)))})"
            pattern = rf"re:.*language_model.*\.layers\.{which}\.{re.escape(kind)}$"
            targets.setdefault(scheme, []).append(pattern)
        return targets

    def _float_linears(self, replaced: set[str]) -> list[str]:
        """Return the stored linears of tower and projector that stay float in an int8 tower."""
        names = [name for name, shape in self._checkpoint.shapes.items() if len(shape) == 2]
        stored = [
            self._disk[source].removesuffix(".weight")
            for name in names
            if name.startswith(("vision.layers.", "projector."))
            for source in self._source(name).names
        ]
        return [module for module in stored if f"{module}.input_scale" not in replaced]

    def _pack(self, linear: PackedLinear) -> dict[str, NDArray[Any]]:
        if self._recipe.is_autoawq:
            return autoawq.pack(linear)
        return compressed_tensors.pack(linear, self.float_dtype)

    def _modules(self, linears: Mapping[str, PackedLinear]) -> Iterable[tuple[str, PackedLinear]]:
        """Yield (stored module, packed layer). Parts of a fused module are joined."""
        fused: dict[str, dict[str, PackedLinear]] = {}
        for name, linear in linears.items():
            source = self._source(f"{name}.weight")
            stored = self._disk[source.names[0]].removesuffix(".weight")
            if len(source.names) > 1:  # the query, key and value of the native tower
                rows = np.split(np.arange(len(linear.values)), len(source.names))
                for name_of_part, index in zip(source.names, rows, strict=True):
                    yield self._disk[name_of_part].removesuffix(".weight"), linear.rows(index)
            elif source.part is None:
                yield stored, linear
            else:
                fused.setdefault(stored, {})[source.part] = linear
        for stored, parts in fused.items():
            yield stored, fuse_linears([parts[part] for part in _PARTS], self._config.decoder)

    def _floats(self, tensors: Mapping[str, NDArray[Any]]) -> Iterable[tuple[str, NDArray[Any]]]:
        """Yield (stored name, array). A changed part of a fused tensor is yielded once, joined with its other parts."""
        fused = set()
        for name, array in tensors.items():
            source = self._source(name)
            if source.part is None:
                yield self._disk[source.names[0]], array
            elif source.names[0] not in fused:
                fused.add(source.names[0])
                names = [_PART.sub(f".{part}_proj.", name) for part in "qkv"]
                parts = [tensors[n] if n in tensors else self._checkpoint.tensor(n) for n in names]
                yield self._disk[source.names[0]], fuse_rows(parts, self._config.decoder)

    def _source(self, name: str) -> layouts.Source:
        return layouts.tensor_source(self._config, name)


def fuse_rows(parts: list[NDArray[Any]], decoder: DecoderConfig) -> NDArray[Any]:
    """Join rows of q, k and v to rows of a fused wqkv: per KV head its query heads, then the key, then the value."""
    heads = [part.reshape(decoder.num_key_value_heads, -1, decoder.head_dim, *part.shape[1:]) for part in parts]
    fused = np.concatenate(heads, axis=1)
    return np.ascontiguousarray(fused.reshape(-1, *parts[0].shape[1:]))


def fuse_linears(parts: list[PackedLinear], decoder: DecoderConfig) -> PackedLinear:
    """Join packed q, k and v layers to one, as `fuse_rows` does for arrays."""
    joined = concatenate(parts)
    starts = np.cumsum([0, *(len(part.values) for part in parts)])
    rows = [np.arange(start, end) for start, end in pairwise(starts)]
    return joined.rows(fuse_rows(rows, decoder))
