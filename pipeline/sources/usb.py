"""USB cameras, and whatever else Video4Linux2 knows, through OpenCV.

Its reads have no timeout that holds, so they happen in a process of the camera's own: `open_usb` makes the source that
the worker reads, `UsbSource` is what that process runs (`capture`).
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

import cv2
import numpy as np

from pipeline.cameras import UsbCamera
from pipeline.errors import SourceError
from pipeline.sources.child import ChildSource
from pipeline.types import Image, Picture


def open_usb(camera: UsbCamera) -> ChildSource:
    """Make the source of a USB camera."""
    settings = {"device": camera.device, "size": camera.picture_size, "rate": camera.rate}
    timeouts_s = (camera.connect_timeout_s, camera.read_timeout_s)
    return ChildSource("usb", settings, shown=camera.device, timeouts_s=timeouts_s)


class UsbSource:
    """One device; `size` (width, height) and `rate` are asked of it, None takes what it gives."""

    def __init__(self, device: str, *, size: list[int] | None, rate: float | None, backend: int = cv2.CAP_V4L2) -> None:
        self._device = device
        self._backend = backend
        wishes = {cv2.CAP_PROP_FPS: rate}
        if size is not None:
            wishes |= {cv2.CAP_PROP_FRAME_WIDTH: size[0], cv2.CAP_PROP_FRAME_HEIGHT: size[1]}
        self._wishes = {key: value for key, value in wishes.items() if value is not None}
        self._capture: cv2.VideoCapture | None = None

    def __enter__(self) -> UsbSource:
        if not Path(self._device).exists():
            text = f"{self._device} does not exist"
            raise SourceError(text, reason="not_found", hint="plug the camera in; `ls /dev/video*`")
        capture = cv2.VideoCapture(self._device, self._backend)
        if not capture.isOpened():
            hint = "another program may hold it; this user must be in the group `video`"
            raise SourceError(f"{self._device} cannot be opened", reason="unreachable", hint=hint)
        for key, value in self._wishes.items():
            capture.set(key, value)  # a device that cannot gives another size, which `picture_size` then refuses
        self._capture = capture
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._capture is not None:
            self._capture.release()
            self._capture = None

    def read(self) -> Picture | None:
        """Wait for the next picture. Raises SourceError when the device gives none."""
        if self._capture is None or not self._capture.grab():
            hint = "check the cable and the hub's power"
            raise SourceError(f"{self._device} gives no picture", reason="timeout", hint=hint)
        captured_at, captured_s = datetime.now(UTC), time.monotonic()
        decoded, bgr = self._capture.retrieve()
        if not decoded:
            raise SourceError(f"{self._device}: the picture cannot be decoded", reason="codec_unsupported")
        rgb: Image = np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), np.uint8)
        return Picture(rgb, captured_at, captured_s)
