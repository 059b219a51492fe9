"""The media of one request: fetched, decoded and hashed at the same time, each distinct one once."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, field, replace
from typing import TypeVar

import numpy as np

from ..contract.errors import ErrorKind, TriptychError
from ..contract.request import MediaOptions, MediaPart
from ..contract.settings import Settings
from ..contract.timings import MediumTimes
from ..families.base import Preprocessor
from ..families.media_options import sampling_of
from ..media.audio import NotForSoundfileError, read_with_soundfile, to_audio
from ..media.digest import digest
from ..media.fetch import Fetcher
from ..media.image import decode_image
from ..media.limits import MAX_REQUEST_BYTES, too_large, unreadable
from ..media.pool import DecodePool, audio_job, decode, video_job
from ..media.types import Audio, Image, Medium, Video
from ..media.video import VideoInfo, frame_indices
from ..stage import Telemetry

_T = TypeVar("_T")

FIRST_DECODER_SHARE = 0.5
"""Of a request's time that the first decoder has for a video before the second one gets the rest."""


@dataclass
class Loading:
    """The media of one request on their way.

    Attributes:
        pending: field names of media that are not decoded yet.
        held: bytes they take in memory.
        times: of those that are decoded.
    """

    pending: set[str] = field(default_factory=set)
    held: int = 0
    times: list[MediumTimes] = field(default_factory=list)


class MediaLoader:
    """Turns the media parts of requests into decoded media. Lives on one asyncio loop."""

    def __init__(
        self,
        settings: Settings,
        preprocessor: Preprocessor,
        telemetry: Telemetry,
        fetcher: Fetcher,
        pool: DecodePool,
        threads: Executor,
    ) -> None:
        """Args: limits; what the checkpoint takes; telemetry; the guarded fetcher; where videos are decoded; threads
        for everything else that takes time.
        """
        self._settings = settings
        self._preprocessor = preprocessor
        self._telemetry = telemetry
        self._fetcher = fetcher
        self._pool = pool
        self._threads = threads
        self._held = 0
        self._budget = max(MAX_REQUEST_BYTES, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4)

    async def load(
        self, parts: Sequence[tuple[str, MediaPart]], blobs: Sequence[bytes], loading: Loading
    ) -> list[Medium]:
        """Decode the media of a request.

        Args:
            parts: (field name, part) in prompt order.
            blobs: the request's raw media.
            loading: kept up to date; give it to :meth:`release` when the media are no longer needed.

        Raises:
            TriptychError: of the first medium that fails, naming its field; the others are given up.
        """
        tasks: dict[MediaPart, asyncio.Task[Medium]] = {}
        for where, part in parts:
            if part not in tasks:
                blob = None if part.blob is None else blobs[part.blob]
                loading.pending.add(where)
                tasks[part] = asyncio.ensure_future(self._load(where, part, blob, loading))
        try:
            await asyncio.gather(*tasks.values())
        finally:
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)
        return [replace(tasks[part].result(), param=where) for where, part in parts]

    def release(self, loading: Loading) -> None:
        """The media of a request are no longer in memory."""
        self._held -= loading.held
        loading.held = 0

    def _hold(self, loading: Loading, size: int) -> None:
        """Count bytes against the request's and the stage's budget."""
        loading.held += size
        self._held += size
        if loading.held > MAX_REQUEST_BYTES:
            raise too_large(
                f"with it the media of the request take more than {MAX_REQUEST_BYTES} bytes once decoded, the limit of "
                "one request; send fewer or smaller ones"
            )
        if self._held > self._budget:
            raise TriptychError(
                ErrorKind.OVERLOADED,
                f"the media of all requests together take more than {self._budget} bytes right now; try again later",
            )

    async def _load(self, where: str, part: MediaPart, blob: bytes | None, loading: Loading) -> Medium:
        start = fetched = time.time()
        try:
            if blob is None:
                blob = await self._fetcher.fetch(
                    part.url or "", self._settings.mm_per_request_timeout, lambda size: self._hold(loading, size)
                )
                fetched = time.time()
            if not blob:
                raise unreadable(f"the {part.modality} has 0 bytes")
            if len(blob) > self._settings.max_media_bytes:
                raise too_large(
                    f"the {part.modality} has {len(blob)} bytes; at most {self._settings.max_media_bytes} are allowed"
                )
            data: Image | Video | Audio
            if part.modality == "image":
                data, content = await self._in_thread(lambda: self._image(blob))
            else:
                data = await (self._video(blob, part.options) if part.modality == "video" else self._audio(blob))
                content = await self._in_thread(lambda: digest(data, blob))
            self._hold(loading, _size(data))
        except TriptychError as error:
            if error.param is None:
                error = replace(error, message=f"{where}: {error.message}", param=where)
            raise error from None
        except MemoryError:
            raise TriptychError(
                ErrorKind.TOO_LARGE, f"{where}: decoding it needs more memory than there is", where
            ) from None
        self._telemetry.add("triptych_media_items_total", 1, modality=part.modality)
        self._telemetry.add("triptych_media_bytes_total", len(blob), modality=part.modality)
        times = MediumTimes(part.modality, len(blob), start, fetched, time.time())
        loading.times.append(times)
        if part.blob is None:
            self._telemetry.observe("triptych_media_fetch_seconds", fetched - start, modality=part.modality)
        self._telemetry.observe("triptych_media_decode_seconds", times.decoded - fetched, modality=part.modality)
        loading.pending.discard(where)
        return Medium(part.modality, data, content, where, part.options)

    def _image(self, blob: bytes) -> tuple[Image, str]:
        """In a thread: a picture and its digest."""
        image = decode_image(blob, self._settings.max_image_pixels)
        return image, digest(image, blob)

    async def _video(self, blob: bytes, options: MediaOptions) -> Video:
        sampling, limit = sampling_of(self._preprocessor.frame_sampling, options), self._settings.max_video_frames
        job = video_job(asdict(sampling), self._settings.max_image_pixels, limit)
        decoded = await decode(self._pool, job, blob, FIRST_DECODER_SHARE * self._settings.mm_per_request_timeout)
        info = VideoInfo(**decoded.about)
        indices = frame_indices(info, sampling, limit)
        return Video(
            frames=decoded.array(np.uint8),
            sampled_fps=len(indices) / info.duration_s,
            duration_s=info.duration_s,
            source_fps=info.source_fps,
            indices=tuple(indices),
            total_frames=info.total_frames,
        )

    async def _audio(self, blob: bytes) -> Audio:
        limit = self._settings.max_audio_s
        try:
            samples, rate = await self._in_thread(lambda: read_with_soundfile(blob, limit))
        except NotForSoundfileError:
            decoded = await decode(self._pool, audio_job(limit), blob)
            samples, rate = decoded.array(np.float32), int(decoded.about["rate"])
        return await self._in_thread(lambda: to_audio(samples, rate, self._preprocessor.sampling_rate))

    def _in_thread(self, work: Callable[[], _T]) -> Awaitable[_T]:
        return asyncio.get_running_loop().run_in_executor(self._threads, work)


def _size(data: Image | Video | Audio) -> int:
    """Bytes of the decoded content."""
    if isinstance(data, Image):
        return 3 * data.pixels.width * data.pixels.height
    return data.frames.nbytes if isinstance(data, Video) else data.samples.nbytes
