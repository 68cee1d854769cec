"""From the images of a request to tiles: fetched, measured, then decoded one after the other.

Sizes come from the headers of the files and are checked before any pixel is decoded. Images are decoded in a pool of
few threads, and a large one only while no other large one is.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import anyio
import anyio.to_thread

from internvl_edge.base.errors import ImageError
from internvl_edge.model.preprocess import image_size
from internvl_edge.runtime.model import InternVL
from internvl_edge.runtime.request import Tiles

from .admission import Reservation
from .chat_request import ImageRef
from .errors import invalid
from .fetch import Fetcher
from .settings import LARGE_PIXELS, Settings


class ImageReader:
    """Reads the images of requests.

    Attributes:
        pool: limits the threads that read bodies and images, for `anyio.to_thread.run_sync`.
    """

    def __init__(self, settings: Settings, fetcher: Fetcher, threads: int = 2) -> None:
        self.pool = anyio.CapacityLimiter(threads)
        self._limits = settings.limits
        self._exif = settings.exif
        self._background = settings.background
        self._fetcher = fetcher
        self._large = anyio.Lock()

    async def read(self, images: Sequence[ImageRef], model: InternVL, memory: Reservation) -> list[Tiles]:
        """Return the tiles of images, in their order.

        Raises:
            ApiError: 400, an image cannot be read or fetched, or is beyond a limit; 429, there is no memory now.
        """
        contents = []
        for image in images:
            content = image.data
            if content is None:
                assert image.url is not None
                content = await self._fetcher.fetch(image.url, image.param)
            contents.append(content)
        sizes = [await self._size(image, content) for image, content in zip(images, contents, strict=True)]
        count = sum(
            model.requests.tile_count(*size, image.max_tiles) for size, image in zip(sizes, images, strict=True)
        )
        if count > self._limits.tiles:
            raise invalid(
                "messages",
                f"the images have {count} tiles, this server takes {self._limits.tiles} in a request; send fewer "
                'images, or give "detail": "low"',
            )
        side = model.config.vision.image_size
        memory.take(sum(map(len, contents)) + count * 3 * side * side)
        tiles = []
        for image, content, (width, height) in zip(images, contents, sizes, strict=True):
            decode = partial(self._decode, model, image, content)
            if width * height > LARGE_PIXELS:
                async with self._large:
                    tiles.append(await anyio.to_thread.run_sync(decode, limiter=self.pool))
            else:
                tiles.append(await anyio.to_thread.run_sync(decode, limiter=self.pool))
        memory.take(count * 3 * side * side)
        return tiles

    async def _size(self, image: ImageRef, content: bytes) -> tuple[int, int]:
        """The width and height that a header says, within the limit."""
        try:
            measure = partial(image_size, content, exif=self._exif)
            width, height = await anyio.to_thread.run_sync(measure, limiter=self.pool)
        except ImageError as error:
            raise invalid(image.param, f"{image.param}: {error}", code="invalid_image") from None
        if width < 1 or height < 1 or width * height > self._limits.pixels:
            raise invalid(
                image.param,
                f"{image.param} has {width}x{height} pixels, this server takes 1 to {self._limits.pixels}; make it "
                "smaller",
                code="invalid_image",
            )
        return width, height

    def _decode(self, model: InternVL, image: ImageRef, content: bytes) -> Tiles:
        try:
            return model.requests.tile(
                content,
                image.max_tiles,
                exif=self._exif,
                background=self._background,
                max_pixels=self._limits.pixels,
            )
        except ImageError as error:
            raise invalid(image.param, f"{image.param}: {error}", code="invalid_image") from None
