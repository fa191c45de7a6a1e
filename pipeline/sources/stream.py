"""H.264, H.265 and whatever else FFmpeg decodes, from a camera's address or a file, through PyAV.

One packet is read, decoded and converted at a time, on the caller's thread; nothing is buffered beyond what the codec
needs. A camera's stream is read in a process of its own (`capture`), a file's in the worker (`files`). A camera that
stamps its frames with the part's serial number gives the part id; see `sei`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING, cast

import av
import av.error
from av.video.reformatter import VideoReformatter

from pipeline.errors import FrameError, SourceError
from pipeline.region import MAX_PIXELS
from pipeline.sources.sei import part_id_in, part_id_of
from pipeline.types import Image, Picture

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.sidedata.sidedata import SideDataContainer
    from av.video.codeccontext import VideoCodecContext
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream


_REASONS: tuple[tuple[type[Exception], str, str], ...] = (
    (av.error.HTTPUnauthorizedError, "auth_failed", "check `user` and `password_file`"),
    (av.error.HTTPForbiddenError, "auth_failed", "check `user` and `password_file`"),
    (av.error.HTTPNotFoundError, "not_found", "check the path in the camera's address"),
    (av.error.FileNotFoundError, "not_found", "check `path`"),
    (av.error.TimeoutError, "timeout", "check the network and the camera's power"),
    (av.error.ExitError, "timeout", "check the network and the camera's power"),
    (av.error.ConnectionRefusedError, "unreachable", "check the address, the port, and that the camera is on"),
    (av.error.InvalidDataError, "codec_unsupported", "the file is cut, empty or of an unknown format"),
)
_NO_STREAM = "check that the address is that of a stream, and that the camera still sends one"


class StreamSource:
    """One video stream; see `Source` for the contract."""

    def __init__(
        self, address: str, *, shown: str, timeouts_s: tuple[float, float], options: Mapping[str, str]
    ) -> None:
        self._address = address
        self._shown = shown
        self._timeouts_s = (timeouts_s[0], timeouts_s[1])
        self._options = dict(options)
        self._container: InputContainer | None = None
        self._decoder: VideoCodecContext | None = None
        self._packets: Iterator[Packet[VideoStream]] = iter(())
        self._ready: deque[tuple[VideoFrame, datetime, float]] = deque()
        # Frames after a damaged one are built upon it, and the decoder does not say so: none counts until a key frame.
        self._damaged = False
        self._empty = True
        self._has_key_frame = False
        # One for all frames: a converter made anew for each costs time, and memory that is slow to come back.
        self._converter = VideoReformatter()

    def __enter__(self) -> StreamSource:
        began_s = time.monotonic()
        try:
            container = av.open(self._address, timeout=self._timeouts_s, options=self._options)
        except (av.error.FFmpegError, OSError) as error:
            is_late = time.monotonic() - began_s >= self._timeouts_s[0]
            raise self._lost("cannot be opened", error, is_late=is_late) from None
        self._container = container
        self._damaged, self._empty, self._has_key_frame = False, True, False
        if not container.streams.video:
            container.close()
            raise SourceError(f"{self._shown} has no video stream", reason="codec_unsupported", final=True)
        stream = container.streams.video[0]
        if stream.codec_context is None:  # PyAV's word for a stream that no decoder of this FFmpeg reads
            container.close()
            raise SourceError(
                f"{self._shown}: no decoder for this stream",
                reason="codec_unsupported",
                hint="set the camera to H.264",
                final="://" not in self._address,
            )
        self._decoder = stream.codec_context
        # Frame threads would hold frames back and cost memory for every camera; one core decodes 640 x 480 in 1 ms.
        self._decoder.thread_count = 1
        self._packets = container.demux(stream)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ready.clear()
        self._packets = iter(())
        if self._container is not None:
            self._container.close()
            self._container = None

    def read(self) -> Picture | None:
        """Give the next picture; None at the end. `captured_at` is when the packet arrived, before decoding.

        A stream that is joined between two key frames begins with frames that show nothing: a FrameError each, with
        reason `no_key_frame`.
        """
        while not self._ready:
            packet = self._next_packet()
            if packet is None:
                self._refuse_empty()
                return None
            self._empty = self._empty and not packet.size
            self._decode(packet)
        frame, captured_at, captured_s = self._ready.popleft()
        part_id = part_id_of(_messages(frame))
        origin = "sei" if part_id is not None else None
        self._damaged = (self._damaged and not frame.key_frame) or frame.is_corrupt
        if self._damaged:
            raise FrameError(f"{self._shown}: a frame arrived damaged", part_id=part_id, part_id_source=origin)
        # One thread: to wake others for 0.3 ms of work costs more than it saves, and each takes memory.
        rgb = self._converter.reformat(frame, format="rgb24", threads=1).to_ndarray()
        return Picture(cast("Image", rgb), captured_at, captured_s, part_id, origin)

    def _next_packet(self) -> Packet[VideoStream] | None:
        try:
            return next(self._packets, None)
        except (av.error.FFmpegError, OSError) as error:
            raise self._lost("stopped", error, is_late=False) from None

    def _decode(self, packet: Packet[VideoStream]) -> None:
        assert self._decoder is not None  # noqa: S101 (set by __enter__)
        captured_at, captured_s = datetime.now(UTC), time.monotonic()
        if self._decoder.width * self._decoder.height > MAX_PIXELS:
            raise SourceError(f"{self._shown}: pictures over {MAX_PIXELS} pixels", reason="too_large", final=True)
        try:
            frames = self._decoder.decode(packet if packet.size else None)
        except av.error.EOFError:
            return
        except (av.error.FFmpegError, ValueError) as error:
            self._refuse_keyless(packet)
            self._damaged = True
            raise FrameError(f"{self._shown}: a frame cannot be decoded: {error}") from None
        if frames:
            self._has_key_frame = True
        else:
            self._refuse_keyless(packet)
        self._ready.extend((frame, captured_at, captured_s) for frame in frames)

    def _refuse_keyless(self, packet: Packet[VideoStream]) -> None:
        """Give up a frame that is built upon a key frame from before this stream was joined: no decoder shows it."""
        self._has_key_frame = self._has_key_frame or packet.is_keyframe
        if self._has_key_frame or not packet.size:
            return
        part_id = part_id_in(bytes(packet))
        origin = "sei" if part_id is not None else None
        text = f"{self._shown}: a frame came before the first key frame"
        raise FrameError(text, part_id=part_id, part_id_source=origin, reason="no_key_frame")

    def _refuse_empty(self) -> None:
        if self._empty and "://" not in self._address:
            raise SourceError(f"{self._shown} holds no picture", reason="no_frames", final=True)

    def _lost(self, what: str, error: Exception, *, is_late: bool) -> SourceError:
        """Map a fault of the library; the message never holds the address with its credentials."""
        final = "://" not in self._address  # a file does not come back, and from its start it would repeat parts
        if not final and isinstance(error, av.error.InvalidDataError):  # FFmpeg's word for no answer, or a strange one
            if is_late:
                error = av.error.TimeoutError(0, "")
            elif self._container is None:
                text = f"{self._shown} {what}: it answers with no stream"
                return SourceError(text, reason="no_frames", hint=_NO_STREAM)
            else:
                return SourceError(f"{self._shown} {what}: it sends no stream any more", reason="lost")
        for kind, reason, hint in _REASONS:
            if isinstance(error, kind):
                return SourceError(f"{self._shown} {what}: {reason}", reason=reason, hint=hint, final=final)
        return SourceError(f"{self._shown} {what}: {type(error).__name__}", reason="lost", final=final)


def _messages(frame: VideoFrame) -> Iterator[bytes]:
    """Give a frame's unregistered SEI messages."""
    found = cast("SideDataContainer", frame.side_data)
    for index in range(len(found)):  # by index: several messages share one type, and a mapping would hide them
        if found[index].type.name == "SEI_UNREGISTERED":
            yield bytes(found[index])
