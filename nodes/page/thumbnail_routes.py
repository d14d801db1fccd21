"""An HTTP route for the small images of the caption grid, which are made when the page shows them."""

from __future__ import annotations

import asyncio
import collections

from ...trainers.data.captions.manual_edits import build_caption_card, thumbnail_file_name
from ...trainers.data.records import ImageRecord
from .. import paths

THUMBNAIL_ROUTE = "/trainyard/thumbnails/{name}"
MAX_SHOWN_IMAGES = 200_000
THUMBNAIL_THREADS = 4

SHOWN_IMAGES: collections.OrderedDict[str, ImageRecord] = collections.OrderedDict()  # by the name of the thumbnail


def remember_shown_images(records) -> None:
    """The page may ask for thumbnails of these images, and of no others."""
    for record in records:
        SHOWN_IMAGES[thumbnail_file_name(record)] = record
    while len(SHOWN_IMAGES) > MAX_SHOWN_IMAGES:
        SHOWN_IMAGES.popitem(last=False)


def make_shown_thumbnail(name: str):
    """The file of a thumbnail that was promised to the page, made when it is not there. ValueError where there is no
    such image, or it cannot be opened."""
    record = SHOWN_IMAGES.get(name)
    if record is None:
        raise ValueError("This image was shown before ComfyUI was started again. Press Run to see it.")
    card = build_caption_card(record, paths.thumbnails_folder())
    if card.thumb is None:
        raise ValueError(card.why)
    return paths.thumbnails_folder() / card.thumb


def register_thumbnail_routes(routes) -> None:
    """Add the route to the host's table."""
    from aiohttp import web

    room = asyncio.Semaphore(THUMBNAIL_THREADS)

    @routes.get(THUMBNAIL_ROUTE)
    async def thumbnail(request):
        try:
            async with room:
                file = await asyncio.to_thread(make_shown_thumbnail, request.match_info["name"])
        except ValueError as error:
            return web.Response(status=404, text=str(error))
        return web.FileResponse(file, headers={"Content-Type": "image/webp", "Cache-Control": "no-cache"})
