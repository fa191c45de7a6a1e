"""USB cameras: what a device that is missing, or no camera, is called. No device is at hand; a video stands for one."""

import cv2
import numpy as np
import pytest

from pipeline.cameras import UsbCamera
from pipeline.errors import SourceError
from pipeline.sources import open_source
from pipeline.sources.usb import UsbSource


def test_a_device_that_is_not_there_is_not_found():
    """Through the camera's own process: `not_found`, with the device's name."""
    camera = UsbCamera(id="c1", type="usb", product="tray", device=99)
    with pytest.raises(SourceError, match="/dev/video99") as caught:
        open_source(camera).__enter__()
    assert (caught.value.reason, caught.value.final) == ("not_found", False)


def test_what_is_no_camera_cannot_be_opened():
    """A device that is no camera is `unreachable`, with a hint."""
    with pytest.raises(SourceError, match="/dev/null") as caught:
        UsbSource("/dev/null", size=None, rate=None).__enter__()
    assert caught.value.reason == "unreachable"
    assert "group" in caught.value.hint


def test_pictures_are_rgb_and_the_end_is_a_loss(tmp_path):
    """OpenCV's BGR becomes RGB; a device that gives no more is lost with `timeout`."""
    path = tmp_path / "a.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 5, (64, 48))
    writer.write(np.full((48, 64, 3), (20, 40, 220), np.uint8))
    writer.release()
    with UsbSource(str(path), size=[64, 48], rate=5, backend=cv2.CAP_ANY) as source:
        image = source.read().image
        with pytest.raises(SourceError) as caught:
            source.read()
    assert image.shape == (48, 64, 3)
    assert np.abs(image.reshape(-1, 3).mean(0) - (220, 40, 20)).max() < 10
    assert caught.value.reason == "timeout"
