"""Convert a question and its images to prompt tokens and tiles.

This module finds every error in a request, before any work starts.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.base.errors import ContextWarning, PromptError
from internvl_edge.base.text import shown
from internvl_edge.model.config import ModelConfig
from internvl_edge.model.context import trained_context
from internvl_edge.model.preprocess import (
    MAX_PIXELS,
    ImageSource,
    is_image_source,
    load_image,
    tile_count,
    tile_image,
)
from internvl_edge.model.prompt import Segment, Text, build_segments
from internvl_edge.model.template import PromptTemplate
from internvl_edge.model.tokenizer import Tokenizer

from .image_cache import pixel_key
from .options import checked_options, is_text
from .prefixes import Keys, image_keys


@dataclass(frozen=True)
class Tiles:
    """An image that is already decoded and tiled (`RequestBuilder.tile`). It stands for the image in any question.

    Attributes:
        pixels: uint8 [tiles, S, S, 3].
    """

    pixels: NDArray[np.uint8]


# One image, or one entry per `<image>` mark; a list of images shares one mark.
Images = ImageSource | Tiles | Sequence[ImageSource | Tiles | Sequence[ImageSource | Tiles]] | None


@dataclass(frozen=True)
class Request:
    """A checked request.

    Attributes:
        prompt_ids: [seq], the tokens; each image token is the placeholder token.
        is_image: [seq], True where `prompt_ids` has an image token.
        tiles: uint8 [tiles, S, S, 3] of each image. Their image tokens fill the places of `is_image` in this order.
        max_new_tokens: the most tokens of the answer.
        seconds: time to decode and tile the images.
    """

    prompt_ids: NDArray[np.int64]
    is_image: NDArray[np.bool_]
    tiles: list[NDArray[np.uint8]]
    max_new_tokens: int
    seconds: float

    def keys(self, tokens_per_tile: int) -> Keys:
        """Return what tells the tokens of the prompt apart, [seq] (see `prefixes`)."""
        keys = self.prompt_ids.copy()
        if self.tiles:
            images = [image_keys(pixel_key(tiles), len(tiles) * tokens_per_tile) for tiles in self.tiles]
            keys[self.is_image] = np.concatenate(images)
        return keys


class RequestBuilder:
    """Makes the requests of one model from questions and images.

    Attributes:
        capacity: the most tokens of prompt and answer together.
    """

    def __init__(
        self, config: ModelConfig, template: PromptTemplate, tokenizer: Tokenizer, image_token: int, capacity: int
    ) -> None:
        self._config = config
        self._template = template
        self._tokenizer = tokenizer
        self._image_token = image_token
        self.capacity = capacity
        self._warned = False

    def build(self, question: Text, images: Images, options: Mapping[str, Any]) -> Request:
        """Check and prepare one request.

        Raises:
            PromptError: question, marks, images, limits and context do not fit together.
            ImageError: an image cannot be read or exceeds a limit.
        """
        started = time.perf_counter()
        if not is_text(question):
            raise PromptError(f"the question is a {type(question).__name__}, expected a text")
        self._check_biases(options)
        groups = _groups(images)
        tiles = self._tile([source for group in groups for source in group], options)
        per_image = iter(len(image) for image in tiles)
        plain = options.get("plain_text", False)
        segments = build_segments(
            self._template,
            question,
            [sum(next(per_image) for _ in group) for group in groups],
            tokens_per_tile=self._config.tokens_per_tile,
            history=options.get("history", ()),
            system=options.get("system"),
            plain=plain,
        )
        if start := options.get("answer_start"):
            segments.append(Segment(start, is_template=False))
        ids = self._ids(segments, plain)
        max_new_tokens = options.get("max_new_tokens", 1024)
        self._check(ids, max_new_tokens, sum(map(len, tiles)))
        return Request(ids, ids == self._image_token, tiles, max_new_tokens, time.perf_counter() - started)

    def _ids(self, segments: list[Segment], plain: bool) -> NDArray[np.int64]:
        if plain:
            return np.array(self._tokenizer.encode_segments(segments), np.int64)
        return np.array(self._tokenizer.encode("".join(segment.text for segment in segments)), np.int64)

    def tile(
        self,
        source: ImageSource,
        max_tiles: int | None = None,
        *,
        exif: bool = False,
        background: str | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> Tiles:
        """Decode and tile one image. The result stands for the image in any question.

        Args:
            source: a path, bytes or a Pillow image.
            max_tiles: the most tiles; None is the checkpoint's own limit.
            exif, background: see `ChatOptions`.
            max_pixels: the most pixels (width x height); a larger image is refused before memory is allocated.

        Raises:
            ImageError: it cannot be read or exceeds a limit.
        """
        image = load_image(source, exif=exif, background=background, max_pixels=max_pixels)
        return Tiles(tile_image(image, **self._tiling(max_tiles)))

    def prompt_tokens(self, question: Text, images: Images, options: Mapping[str, Any]) -> list[int]:
        """Return the tokens of the prompt of a question, image tokens included. Raises as `build`."""
        ids: list[int] = self.build(question, images, checked_options(options)).prompt_ids.tolist()
        return ids

    def text_tokens(self, text: str) -> list[int]:
        """Return the tokens of a text in which special tokens are nothing but characters. Raises PromptError."""
        return self._tokenizer.encode_segments([Segment(text, is_template=False)])

    def tile_count(self, width: int, height: int, max_tiles: int | None = None) -> int:
        """Return the number of tiles of an image of this size. Raises ImageError as `tile`."""
        return tile_count(width, height, **self._tiling(max_tiles))

    def _tiling(self, max_tiles: int | None) -> dict[str, Any]:
        config = self._config
        limit = config.max_tiles if max_tiles is None else max_tiles
        return {
            "image_size": config.vision.image_size,
            "max_tiles": limit,
            "min_tiles": min(config.min_tiles, limit),
            "use_thumbnail": config.use_thumbnail,
        }

    def _tile(self, sources: list[Any], options: Mapping[str, Any]) -> list[NDArray[np.uint8]]:
        limits = options.get("max_tiles")
        if limits is None or isinstance(limits, int):
            limits = [limits] * len(sources)
        if len(limits) != len(sources):
            raise PromptError(
                f"max_tiles has {len(limits)} numbers for {len(sources)} images; give one, or one per image"
            )
        exif, background = options.get("exif", False), options.get("background")
        return [
            (source if isinstance(source, Tiles) else self.tile(source, limit, exif=exif, background=background)).pixels
            for source, limit in zip(sources, limits, strict=True)
        ]

    def _check(self, ids: NDArray[np.int64], max_new_tokens: int, tiles: int) -> None:
        if max_new_tokens < 1:
            raise PromptError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
        self._check_table(ids)
        image_tokens = tiles * self._config.tokens_per_tile
        found = int(np.count_nonzero(ids == self._image_token))
        if found != image_tokens:
            raise PromptError(f"the prompt holds {found} image tokens for {tiles} tiles, which need {image_tokens}")
        trained = trained_context(self._config.decoder)
        if len(ids) > trained and not self._warned:
            self._warned = True
            warnings.warn(
                f"a prompt of {len(ids)} tokens is longer than the {trained} that the model was trained on "
                "(max_position_embeddings); the answer can be wrong",
                ContextWarning,
                stacklevel=2,
            )
        if len(ids) + max_new_tokens > self.capacity:
            raise PromptError(
                f"prompt {len(ids)} tokens ({image_tokens} of images) + answer up to {max_new_tokens} exceed the "
                f"context of {self.capacity}; use fewer tiles, a shorter answer or a larger context"
            )

    def _check_biases(self, options: Mapping[str, Any]) -> None:
        rows = self._config.decoder.vocab_size
        if beyond := [token for token in options.get("logit_bias", ()) if token >= rows]:
            raise PromptError(f"logit_bias has token {beyond[0]}, but the model has {rows} tokens; leave it out")

    def _check_table(self, ids: NDArray[np.int64]) -> None:
        """Bundles of older versions can hold tokenizers with more tokens than the model has rows for."""
        rows = self._config.decoder.vocab_size
        if len(beyond := ids[ids >= rows]):
            token = self._tokenizer.decode([int(beyond[0])], skip_special=False)
            raise PromptError(
                f"the prompt holds {shown(token)}, token {beyond[0]}, but the model has {rows} tokens; leave it out, "
                "or export a checkpoint whose embedding was resized"
            )


def _groups(images: Images) -> list[list[Any]]:
    """The images of each mark.

    Raises:
        PromptError: something that cannot be images.
    """
    if images is None:
        return []
    entries = [images] if _is_one(images) else images
    if isinstance(entries, Mapping) or not hasattr(entries, "__iter__"):
        raise PromptError(f"images is a {type(images).__name__}, expected a list of paths, bytes or Pillow images")
    return [_group(entry) for entry in entries]


def _is_one(value: Any) -> bool:
    return isinstance(value, Tiles) or is_image_source(value)


def _group(entry: Any) -> list[Any]:
    if _is_one(entry) or isinstance(entry, Mapping) or not hasattr(entry, "__iter__"):
        return [entry]  # whatever is no image is named when it is read
    return list(entry)
