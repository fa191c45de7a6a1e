"""`logicrd` with a video in place of each USB device, played once and read in the worker; for tests."""

from __future__ import annotations

import cv2

from pipeline import cli, sources
from pipeline.cameras import UsbCamera
from pipeline.errors import SourceError
from pipeline.sources.usb import UsbSource
from pipeline.types import Picture


class Video(UsbSource):
    """The USB camera's own code on OpenCV's reader of files; its end is final."""

    def read(self) -> Picture | None:
        try:
            return super().read()
        except SourceError as error:
            error.final = True
            raise


def open_video(camera: UsbCamera) -> Video:
    return Video(camera.device, size=camera.picture_size, rate=camera.rate, backend=cv2.CAP_ANY)


sources.open_usb = open_video
cli.main()
