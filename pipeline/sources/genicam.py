"""GigE Vision and USB3 Vision cameras, through Aravis (https://aravisproject.github.io), which speaks GenICam.

Aravis belongs to the distribution's own Python, so it is read there, in a process of the camera's own
(`genicam_child`); what comes over are the sensor's raw pixels, and here they become RGB.
"""

from __future__ import annotations

import cv2
import numpy as np

from pipeline.cameras import GenicamCamera
from pipeline.sources.child import ChildSource
from pipeline.types import Image

# GenICam names a Bayer pattern by its upper left pixels (PFNC 2.0), as OpenCV's four-letter names do.
_TO_RGB = {
    "Mono8": cv2.COLOR_GRAY2RGB,
    "BayerRG8": cv2.COLOR_BayerRGGB2RGB,
    "BayerGR8": cv2.COLOR_BayerGRBG2RGB,
    "BayerGB8": cv2.COLOR_BayerGBRG2RGB,
    "BayerBG8": cv2.COLOR_BayerBGGR2RGB,
}


def open_genicam(camera: GenicamCamera) -> ChildSource:
    """Make the source of a GenICam camera."""
    settings = camera.model_dump(mode="json", exclude={"id", "type", "product", "station"})
    timeouts_s = (camera.connect_timeout_s, camera.read_timeout_s)
    shown = camera.address or "the first GenICam camera"
    return ChildSource("genicam", settings, shown=shown, timeouts_s=timeouts_s, to_rgb=to_rgb)


def to_rgb(raw: Image, pixel_format: str) -> Image:
    """Make HWC uint8 RGB of a sensor's pixels: (h, w) for grey and Bayer, (h, w, 3) for RGB8."""
    if pixel_format == "RGB8":
        return raw
    return np.asarray(cv2.cvtColor(raw, _TO_RGB[pixel_format]), np.uint8)
