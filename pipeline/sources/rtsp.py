"""RTSP cameras, over TCP: a frame is whole or it is not there, and firewalls let it through."""

from __future__ import annotations

from pipeline.cameras import RtspCamera
from pipeline.sources.stream import StreamSource

# A short probe: cameras send their parameter sets in the SDP, and every probed packet is latency at start. Never
# `nobuffer`: it throws the probed packets away, and with them the first parts.
_OPTIONS = {
    "rtsp_transport": "tcp",
    "flags": "low_delay",
    "probesize": "65536",
    "analyzeduration": "500000",
}


def open_rtsp(camera: RtspCamera) -> StreamSource:
    """Make the source of an RTSP camera; the timeouts go into the constructor, later FFmpeg ignores them."""
    timeouts_s = (camera.connect_timeout_s, camera.read_timeout_s)
    return StreamSource(camera.address(), shown=camera.url, timeouts_s=timeouts_s, options=dict(_OPTIONS))
