"""Kinds of camera, one file each, behind one small protocol.

A source opens in `__enter__`, yields one picture at a time from `read`, and closes in `__exit__`; `ingest` owns it and
calls it from one thread. It knows nothing of products, queues or verdicts, and it never retries: that is ingest's.
Cameras are read in processes of their own (`child`), because their libraries hang; files in the worker.
"""

from __future__ import annotations

from types import TracebackType
from typing import Protocol

from pipeline.cameras import Camera, FolderCamera, GenicamCamera, RtspCamera, UsbCamera
from pipeline.networks import Networks, admitted
from pipeline.sources.deepstream import open_graph
from pipeline.sources.files import FolderSource, open_video
from pipeline.sources.genicam import open_genicam
from pipeline.sources.rtsp import open_rtsp
from pipeline.sources.usb import open_usb
from pipeline.types import Idle, Picture, Scored, Seen


class Source(Protocol):
    """What ingest needs of a camera."""

    def __enter__(self) -> Source:
        """Connect. Raises SourceError with a reason code when that is not possible."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Disconnect; never raises."""

    def read(self) -> Picture | Seen | Scored | Idle | None:
        """Wait for the next picture; IDLE when none came for a moment, None at the end of the stream.

        A graph that asks Triton itself says that it has seen a picture, and later on what Triton said of it. Blocks no
        longer than the source's read timeout. The picture's memory holds until the next call. Raises FrameError for one
        unusable picture (the source goes on), SourceError when the source as a whole is lost.
        """


def open_source(camera: Camera, networks: Networks = ()) -> Source:
    """Make the source for a camera's configuration; nothing is opened yet.

    Raises SourceError, also for an address outside of `networks`; blocks while a name is looked up for that.
    """
    camera = admitted(camera, networks)
    if isinstance(camera, RtspCamera):
        return open_rtsp(camera, networks) if camera.decoder == "ffmpeg" else open_graph(camera, camera.decoder)
    if isinstance(camera, GenicamCamera):
        return open_genicam(camera)
    if isinstance(camera, UsbCamera):
        return open_usb(camera)
    if isinstance(camera, FolderCamera):
        return FolderSource(camera.path)
    return open_video(camera.path)
