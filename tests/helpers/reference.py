"""An independent InternVL in plain torch. Every graph and engine is compared with it.

It reads a checkpoint folder with its own code (remote-code and native layout, either key prefix, safetensors or `.bin`,
one file or shards) and computes what the original code computes: tiles, image features, logits, greedy tokens with a
key/value cache. It imports nothing from internvl_edge, so that a mistake there cannot be hidden here. It does not know
prompts, tokenizers or quantized weights. A tensor that it would not use is an error. `test_reference.py` compares it
with the goldens of the original code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
PROJECTOR_EPS = 1e-5

# On tensors this small, threads cost more at their barriers than they save. One thread is about five times as fast.
torch.set_num_threads(1)

# Every layout is renamed to: remote-code names for the vision tower and mlp1, Llama names for the text model.
RENAMES = [
    (r"^model\.(?=vision_tower|multi_modal_projector|language_model)", ""),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^language_model\.(?=embed_tokens|layers|norm)", "language_model.model."),
    (r"^vision_tower\.embeddings\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"^vision_tower\.embeddings\.position_embeddings$", "vision_model.embeddings.position_embedding"),
    (r"^vision_tower\.embeddings\.patch_embeddings\.projection\.", "vision_model.embeddings.patch_embedding."),
    (r"^vision_tower\.encoder\.layer\.", "vision_model.encoder.layers."),
    (r"^(vision_model.*)\.attention\.projection_layer\.", r"\1.attn.proj."),
    (r"^(vision_model.*)\.attention\.", r"\1.attn."),
    (r"^(vision_model.*)\.lambda_", r"\1.ls"),
    (r"^(vision_model.*)\.layernorm_before\.", r"\1.norm1."),
    (r"^(vision_model.*)\.layernorm_after\.", r"\1.norm2."),
    (r"^multi_modal_projector\.layer_norm\.", "mlp1.0."),
    (r"^multi_modal_projector\.linear_1\.", "mlp1.1."),
    (r"^multi_modal_projector\.linear_2\.", "mlp1.3."),
    (r"^language_model\.model\.tok_embeddings\.", "language_model.model.embed_tokens."),
    (r"^language_model\.output\.", "language_model.lm_head."),
    (r"^(language_model.*)\.attention\.wo\.", r"\1.self_attn.o_proj."),
    (r"^(language_model.*)\.attention\.wqkv\.", r"\1.self_attn.wqkv."),
    (r"^(language_model.*)\.feed_forward\.w1\.", r"\1.mlp.gate_proj."),
    (r"^(language_model.*)\.feed_forward\.w3\.", r"\1.mlp.up_proj."),
    (r"^(language_model.*)\.feed_forward\.w2\.", r"\1.mlp.down_proj."),
    (r"^(language_model.*)\.attention_norm\.", r"\1.input_layernorm."),
    (r"^(language_model.*)\.ffn_norm\.", r"\1.post_attention_layernorm."),
]
# Nothing else may remain after renaming and splitting. Otherwise a bias under an unknown name would pass unnoticed.
USED = re.compile(
    r"vision_model\.embeddings\.(class_embedding|position_embedding|patch_embedding\.(weight|bias))"
    r"|vision_model\.encoder\.layers\.\d+\.(ls1|ls2|(norm1|norm2|attn\.(qkv|proj|q_norm|k_norm)|mlp\.fc[12])\.(weight|bias))"
    r"|mlp1\.[013]\.(weight|bias)"
    r"|language_model\.(lm_head|model\.embed_tokens|model\.norm)\.weight"
    r"|language_model\.model\.layers\.\d+\.(input|post_attention)_layernorm\.weight"
    r"|language_model\.model\.layers\.\d+\.self_attn\.[qk]_norm\.weight"
    r"|language_model\.model\.layers\.\d+\.(self_attn\.[qkvo]_proj\.(weight|bias)|mlp\.(gate|up|down)_proj\.weight)"
)


class Generation(NamedTuple):
    """The result of `Reference.generate`. `step_logits[i]` chose `ids[i]`, and row 0 is `prefill_logits`."""

    ids: list[int]
    prefill_logits: Tensor
    step_logits: Tensor


@dataclass
class Numbers:
    """The numbers of config.json that the arithmetic needs."""

    vision_layers: int
    vision_heads: int
    image_size: int
    patch_size: int
    rms_norm: bool
    vision_eps: float
    qk_eps: float
    select_layer: int
    shuffle: int
    ps_version: str
    image_token_id: int | None
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    rms_eps: float
    max_positions: int
    rope_theta: float
    rope_type: str
    rope_factor: float

    @classmethod
    def read(cls, folder: Path) -> Numbers:
        """Read the numbers from the config.json of either layout."""
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        native = config["model_type"] == "internvl"
        vision = config["vision_config"]
        text = config["text_config"] if native else config["llm_config"]
        rope: dict[str, Any] = text.get("rope_parameters") or text.get("rope_scaling") or {}
        theta = rope.get("rope_theta", text.get("rope_theta"))
        image_size, patch_size = vision["image_size"], vision["patch_size"]
        return cls(
            vision_layers=vision["num_hidden_layers"],
            vision_heads=vision["num_attention_heads"],
            image_size=image_size[0] if native else config.get("force_image_size") or image_size,
            patch_size=patch_size[0] if native else patch_size,
            rms_norm=vision["norm_type"] == "rms_norm",
            vision_eps=vision["layer_norm_eps"],
            qk_eps=1e-6 if native else vision["layer_norm_eps"],
            select_layer=config["vision_feature_layer"] if native else config["select_layer"],
            shuffle=round(1 / config["downsample_ratio"]),
            ps_version="v2" if native else config["ps_version"],
            image_token_id=config["image_token_id"] if native else None,
            heads=text["num_attention_heads"],
            kv_heads=text["num_key_value_heads"],
            head_dim=text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"],
            layers=text["num_hidden_layers"],
            rms_eps=text["rms_norm_eps"],
            max_positions=text["max_position_embeddings"],
            rope_theta=float(theta),
            rope_type={"default": "none"}.get(kind := rope.get("rope_type", rope.get("type", "none")), kind),
            rope_factor=float(rope.get("factor", 1.0)),
        )


@dataclass
class Cache:
    """Keys and values of each layer, [kv_heads, length, head_dim]. Keys are rotated once, when they are written.

    With `scales` of keys and of values [layers, kv_heads, head_dim], both are rounded to multiples of these.
    """

    scales: tuple[Tensor, Tensor] | None = None
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    @property
    def length(self) -> int:
        """The number of positions in the cache."""
        return self.keys[0].shape[1] if self.keys else 0

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add new positions to a layer and return all of that layer."""
        if self.scales is not None:
            steps = (scale[layer][:, None] for scale in self.scales)
            key, value = (
                (x / step).round().clamp(-128, 127) * step for x, step in zip((key, value), steps, strict=True)
            )
        if layer == len(self.keys):
            self.keys.append(key)
            self.values.append(value)
        else:
            self.keys[layer] = torch.cat([self.keys[layer], key], dim=1)
            self.values[layer] = torch.cat([self.values[layer], value], dim=1)
        return self.keys[layer], self.values[layer]


class Reference:
    """One checkpoint, computed in `dtype` (float32 or float64) on the CPU. It keeps no state between calls."""

    def __init__(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        self.folder, self.dtype = Path(folder), dtype
        self.kv_scales: tuple[Tensor, Tensor] | None = None
        self.numbers = Numbers.read(self.folder)
        self.weights = {name: tensor.to(dtype) for name, tensor in read_weights(self.folder).items()}
        self._split_wqkv()
        self._join_vision_qkv()
        unused = [name for name in self.weights if not USED.fullmatch(name)]
        assert not unused, f"tensors that the reference does not know: {unused}"
        if "language_model.lm_head.weight" not in self.weights:
            self.weights["language_model.lm_head.weight"] = self.weights["language_model.model.embed_tokens.weight"]

    def _split_wqkv(self) -> None:
        """Split InternLM2's fused rows: for each key/value head its query heads, then the key, then the value."""
        n = self.numbers
        groups = n.heads // n.kv_heads
        for name in [name for name in self.weights if ".wqkv." in name]:
            tensor = self.weights.pop(name)
            rows = tensor.reshape(n.kv_heads, groups + 2, n.head_dim, *tensor.shape[1:])
            self.weights[name.replace(".wqkv.", ".q_proj.")] = rows[:, :groups].flatten(0, 2)
            self.weights[name.replace(".wqkv.", ".k_proj.")] = rows[:, groups].flatten(0, 1)
            self.weights[name.replace(".wqkv.", ".v_proj.")] = rows[:, groups + 1].flatten(0, 1)

    def _join_vision_qkv(self) -> None:
        """Join the tower's q, k and v, which the native layout stores separately."""
        for name in [name for name in self.weights if name.startswith("vision_model") and ".q_proj." in name]:
            parts = [self.weights.pop(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
            self.weights[name.replace(".q_proj.", ".qkv.")] = torch.cat(parts)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def _rms_norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        return self.weights[f"{name}.weight"] * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))

    def _layer_norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], eps)

    # ---- vision ----

    def _vision_norm(self, x: Tensor, name: str) -> Tensor:
        if self.numbers.rms_norm:
            return self._rms_norm(x, name, self.numbers.vision_eps)
        return self._layer_norm(x, name, self.numbers.vision_eps)

    def _vision_attention(self, x: Tensor, name: str) -> Tensor:
        """Apply multi-head self-attention to x [tiles, tokens, hidden]. A q/k norm spans all heads."""
        heads = self.numbers.vision_heads
        q, k, v = self._linear(x, f"{name}.qkv").chunk(3, dim=-1)
        if f"{name}.q_norm.weight" in self.weights:
            q = self._rms_norm(q, f"{name}.q_norm", self.numbers.qk_eps)
            k = self._rms_norm(k, f"{name}.k_norm", self.numbers.qk_eps)
        q, k, v = (part.reshape(*part.shape[:2], heads, -1).transpose(1, 2) for part in (q, k, v))
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        return self._linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), f"{name}.proj")

    def _position_embedding(self, grid: int) -> Tensor:
        """Return the stored table. Its grid is resized bicubically where the tile has another number of patches."""
        table = self.weights["vision_model.embeddings.position_embedding"]
        stored = round((table.shape[1] - 1) ** 0.5)
        if stored == grid:
            return table
        patches = table[:, 1:].reshape(1, stored, stored, -1).permute(0, 3, 1, 2)
        patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)
        return torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)

    def vision_hidden_states(self, tiles: np.ndarray) -> list[Tensor]:
        """Return embeddings and each block's output, [tiles, 1 + patches, hidden], of uint8 [tiles, size, size, 3]."""
        assert tiles.dtype == np.uint8
        assert tiles.shape[1:] == (self.numbers.image_size, self.numbers.image_size, 3)
        mean, std = (torch.tensor(values, dtype=self.dtype) for values in (IMAGE_MEAN, IMAGE_STD))
        pixels = ((torch.from_numpy(tiles.copy()).to(self.dtype) / 255 - mean) / std).permute(0, 3, 1, 2)
        kernel, bias = (self.weights[f"vision_model.embeddings.patch_embedding.{part}"] for part in ("weight", "bias"))
        patches = F.conv2d(pixels, kernel, bias, stride=self.numbers.patch_size)
        class_token = self.weights["vision_model.embeddings.class_embedding"].expand(len(tiles), -1, -1)
        x = torch.cat([class_token, patches.flatten(2).transpose(1, 2)], dim=1)
        x = x + self._position_embedding(patches.shape[-1])
        states = [x]
        for index in range(self.numbers.vision_layers):
            block = f"vision_model.encoder.layers.{index}"
            attended = self._vision_attention(self._vision_norm(x, f"{block}.norm1"), f"{block}.attn")
            x = x + self.weights[f"{block}.ls1"] * attended
            hidden = F.gelu(self._linear(self._vision_norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
            x = x + self.weights[f"{block}.ls2"] * self._linear(hidden, f"{block}.mlp.fc2")
            states.append(x)
        return states

    def pixel_shuffle(self, x: Tensor) -> Tensor:
        """Merge [tiles, grid * grid, c] to [tiles, tokens, c * r * r] as the original's views.

        v1 omits the last permute.
        """
        r, grid = self.numbers.shuffle, round(x.shape[1] ** 0.5)
        n, _, c = x.shape
        x = x.reshape(n, grid, grid // r, c * r).permute(0, 2, 1, 3)
        x = x.reshape(n, grid // r, grid // r, c * r * r)
        if self.numbers.ps_version != "v1":
            x = x.permute(0, 2, 1, 3)
        return x.reshape(n, -1, c * r * r)

    @torch.no_grad()
    def extract_feature(self, tiles: np.ndarray) -> Tensor:
        """Compute image embeddings [tiles, tokens, text hidden] of uint8 tiles [tiles, size, size, 3]."""
        x = self.pixel_shuffle(self.vision_hidden_states(tiles)[self.numbers.select_layer][:, 1:])
        x = self._layer_norm(x, "mlp1.0", PROJECTOR_EPS)
        return self._linear(F.gelu(self._linear(x, "mlp1.1")), "mlp1.3")

    # ---- text ----

    def _rotary(self, start: int, length: int) -> tuple[Tensor, Tensor]:
        """Return cos and sin [length - start, head_dim] for one call that ends with `length` positions in the cache."""
        n = self.numbers
        theta, positions = n.rope_theta, torch.arange(start, length, dtype=torch.float64)
        if n.rope_type == "linear":
            positions = positions / n.rope_factor
        elif n.rope_type == "dynamic" and length > n.max_positions:
            stretch = n.rope_factor * length / n.max_positions - (n.rope_factor - 1)
            theta *= stretch ** (n.head_dim / (n.head_dim - 2))
        elif n.rope_type not in ("none", "dynamic"):
            raise ValueError(f"rope scaling {n.rope_type!r}")
        frequencies = theta ** -(torch.arange(0, n.head_dim, 2, dtype=torch.float64) / n.head_dim)
        angles = torch.outer(positions, frequencies).repeat(1, 2)
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)

    def _attention(self, x: Tensor, layer: int, cache: Cache, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Apply causal grouped-query attention of x [new, hidden] over the cache and itself."""
        n, name = self.numbers, f"language_model.model.layers.{layer}.self_attn"
        q, k, v = (self._linear(x, f"{name}.{part}_proj") for part in "qkv")
        q, k, v = (part.reshape(len(x), -1, n.head_dim).transpose(0, 1) for part in (q, k, v))
        if f"{name}.q_norm.weight" in self.weights:  # Qwen3: over each head, before the rotation
            q, k = (self._rms_norm(part, f"{name}.{which}_norm", n.rms_eps) for which, part in (("q", q), ("k", k)))
        keys, values = cache.append(layer, _rotate(k, *rotary), v)
        groups, new, length = n.heads // n.kv_heads, len(x), keys.shape[1]
        q = _rotate(q, *rotary).reshape(n.kv_heads, groups, new, n.head_dim)
        scores = q @ keys.unsqueeze(1).transpose(-1, -2) * n.head_dim**-0.5
        future = torch.ones(new, length, dtype=torch.bool).triu(length - new + 1)
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        return self._linear((weights @ values.unsqueeze(1)).flatten(0, 1).transpose(0, 1).flatten(1), f"{name}.o_proj")

    def _decoder(self, x: Tensor, cache: Cache) -> Tensor:
        """Return hidden states after the final norm, [new, hidden], of new embeddings. They are added to the cache."""
        rotary = self._rotary(cache.length, cache.length + len(x))
        for index in range(self.numbers.layers):
            block = f"language_model.model.layers.{index}"
            normed = self._rms_norm(x, f"{block}.input_layernorm", self.numbers.rms_eps)
            x = x + self._attention(normed, index, cache, rotary)
            normed = self._rms_norm(x, f"{block}.post_attention_layernorm", self.numbers.rms_eps)
            gate = F.silu(self._linear(normed, f"{block}.mlp.gate_proj"))
            x = x + self._linear(gate * self._linear(normed, f"{block}.mlp.up_proj"), f"{block}.mlp.down_proj")
        return self._rms_norm(x, "language_model.model.norm", self.numbers.rms_eps)

    @torch.no_grad()
    def embed(self, ids: Sequence[int], tiles: np.ndarray | None = None) -> Tensor:
        """Return input embeddings [len(ids), hidden].

        Image tokens are overwritten in order by the features of `tiles`.
        """
        tokens = torch.tensor(list(ids))
        x = self.weights["language_model.model.embed_tokens.weight"][tokens]
        if tiles is None or not len(tiles):
            return x
        features = self.extract_feature(tiles).flatten(0, 1)
        places = tokens == self.image_token_id()
        assert int(places.sum()) == len(features), f"{int(places.sum())} image tokens for {len(features)} features"
        x[places] = features
        return x

    def image_token_id(self) -> int:
        """Return the native config's id, or that of `<IMG_CONTEXT>` in added_tokens.json."""
        if self.numbers.image_token_id is not None:
            return self.numbers.image_token_id
        return int(json.loads((self.folder / "added_tokens.json").read_text(encoding="utf-8"))["<IMG_CONTEXT>"])

    @torch.no_grad()
    def logits(self, ids: Sequence[int], tiles: np.ndarray | None = None) -> Tensor:
        """Return logits [len(ids), vocab] of one uncached forward.

        With dynamic NTK this differs from cached decoding.
        """
        return self._linear(self._decoder(self.embed(ids, tiles), Cache(self.kv_scales)), "language_model.lm_head")

    @torch.no_grad()
    def generate(
        self,
        ids: Sequence[int],
        tiles: np.ndarray | None = None,
        max_new_tokens: int = 24,
        stop_ids: Sequence[int] = (),
        forced: Sequence[int] | None = None,
    ) -> Generation:
        """Decode greedily with a cache, as the original's `generate`: a stop id ends it and is the last id returned.

        `forced` feeds these tokens instead of the argmax, so that another implementation's logits can be compared
        step by step after a near-tie. The ids returned are then the forced ones.
        """
        cache, x = Cache(self.kv_scales), self.embed(ids, tiles)
        new: list[int] = []
        steps: list[Tensor] = []
        limit = max_new_tokens if forced is None else len(forced)
        while len(new) < limit and not (new and new[-1] in stop_ids):
            steps.append(self._linear(self._decoder(x, cache)[-1], "language_model.lm_head"))
            new.append(int(steps[-1].argmax()) if forced is None else forced[len(new)])
            x = self.embed(new[-1:])
        return Generation(new, steps[0], torch.stack(steps))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate in the rotate-half form: the first half of a head pairs with its second half."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a folder under the names of `RENAMES`, without recomputable rotary buffers."""
    shards = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    weights: dict[str, Tensor] = {}
    for shard in shards:
        weights |= load_file(shard) if shard.suffix == ".safetensors" else torch.load(shard, weights_only=True)
    renamed = {}
    for name, tensor in weights.items():
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        if not name.endswith("inv_freq"):
            renamed[name] = tensor
    return renamed


def tile_image(image: Image.Image, max_num: int = 12, min_num: int = 1, size: int = 448) -> np.ndarray:
    """Compute the original `load_image` up to its float transform.

    The result is uint8 tiles [tiles, size, size, 3], thumbnail last.
    """
    image = image.convert("RGB")
    width, height = image.size
    sides = range(1, max_num + 1)
    grids = sorted({(c, r) for c in sides for r in sides if min_num <= c * r <= max_num}, key=lambda g: g[0] * g[1])
    best, best_difference = (1, 1), float("inf")
    for columns, rows in grids:
        difference = abs(width / height - columns / rows)
        large = width * height > 0.5 * size * size * columns * rows
        if difference < best_difference or (difference == best_difference and large):
            best, best_difference = (columns, rows), difference
    columns, rows = best
    resized = np.asarray(image.resize((size * columns, size * rows)))
    tiles = list(resized.reshape(rows, size, columns, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3))
    if len(tiles) > 1:
        tiles.append(np.asarray(image.resize((size, size))))
    return np.stack(tiles)
