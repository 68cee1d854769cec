"""Turn calibration items into the device's own inputs (token ids and tiles) with the code that the runtime uses.

Broken items are reported and skipped up to a limit. One more is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from internvl_edge.base.errors import EdgeError
from internvl_edge.model.config import ModelConfig
from internvl_edge.model.preprocess import load_image, tile_image
from internvl_edge.model.prompt import build_prompt
from internvl_edge.model.template import template_for
from internvl_edge.model.tokenizer import Tokenizer

from .items import CalibrationItem

DEFAULT_MAX_TOKENS = 8192


@dataclass(frozen=True)
class Sample:
    """One sequence of tokens.

    Attributes:
        name: name of the item, for messages.
        ids: [tokens] int32 token ids; image tokens are the placeholder.
        tiles: uint8 [tiles, S, S, 3], the tiles of all images in order.
    """

    name: str
    ids: NDArray[np.int32]
    tiles: NDArray[np.uint8]


class SampleBuilder:
    """Builds samples for one model.

    Args:
        config: the model.
        tokenizer: a `tokenizer.json`.
        max_tiles: most tiles of one image, without the thumbnail; the model's own limit, where that is lower.
        max_tokens: an item with more tokens is broken.
    """

    def __init__(
        self, config: ModelConfig, tokenizer: Path, max_tiles: int, max_tokens: int = DEFAULT_MAX_TOKENS
    ) -> None:
        self._config = config
        self._template = template_for(config.template, config.system_message)
        self._tokenizer = Tokenizer(tokenizer)
        self._max_tiles = min(max_tiles, config.max_tiles)  # more would be inputs that the model never sees
        self._max_tokens = max_tokens
        self.image_token = self._tokenizer.token_id(self._template.image_context)

    def build(self, item: CalibrationItem) -> Sample:
        """Return the sample of one item.

        Raises:
            EdgeError: the item is broken in any way.
        """
        if item.problem:
            raise EdgeError(item.problem)
        images = [self._tile(image) for image in item.images]
        counts = [len(tiles) for tiles in images]
        text = build_prompt(
            self._template,
            item.prompt,
            counts,
            tokens_per_tile=self._config.tokens_per_tile,
            history=item.history,
            system=item.system,
        )
        if item.answer:
            if self._template.image_context in item.answer:
                raise EdgeError(f"the answer holds {self._template.image_context}, which only images may become")
            text += item.answer + self._template.turn_end
        ids = np.array(self._tokenizer.encode(text), np.int32)
        if len(ids) > self._max_tokens:
            raise EdgeError(f"{len(ids)} tokens, the limit is {self._max_tokens}; use fewer tiles or a shorter text")
        size = self._config.vision.image_size
        tiles = np.concatenate(images) if images else np.empty((0, size, size, 3), np.uint8)
        return Sample(item.name, ids, tiles)

    def _tile(self, image: object) -> NDArray[np.uint8]:
        config = self._config
        return tile_image(
            load_image(image),  # type: ignore[arg-type]  # checks the type itself
            image_size=config.vision.image_size,
            max_tiles=self._max_tiles,
            min_tiles=min(config.min_tiles, self._max_tiles),
            use_thumbnail=config.use_thumbnail,
        )


def good_samples(
    items: Iterable[CalibrationItem],
    builder: SampleBuilder,
    count: int,
    max_broken: int,
    report: Callable[[str], None],
) -> Iterator[Sample]:
    """Yield the first `count` good samples. `report` gets one line for each broken item before them.

    Raises:
        EdgeError: more than `max_broken` broken items, or no good one.
    """
    good = broken = 0
    last = ""
    for item in items:
        if good == count:
            break
        try:
            sample = builder.build(item)
        except EdgeError as error:
            broken, last = broken + 1, f"{item.name}: {error}"
            if broken > max_broken:
                raise EdgeError(
                    f"{broken} broken calibration items, the limit is {max_broken} (--max-broken); the last is {last}"
                ) from None
            report(last)
            continue
        good += 1
        yield sample
    if not good:
        raise EdgeError("the calibration data holds no usable item" + (f"; the last is {last}" if last else ""))
