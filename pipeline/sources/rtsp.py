"""RTSP cameras, over TCP: a frame is whole or it is not there, and firewalls let it through."""

from __future__ import annotations

from pipeline.cameras import RtspCamera
from pipeline.errors import ConfigError, SourceError
from pipeline.networks import Networks
from pipeline.sources.child import ChildSource

# A short probe: cameras send their parameter sets in the SDP, and every probed packet is latency at start. Never
# `nobuffer`: it throws the probed packets away, and with them the first parts.
_OPTIONS = {
    "rtsp_transport": "tcp",
    "flags": "low_delay",
    "probesize": "65536",
    "analyzeduration": "500000",
}


def open_rtsp(camera: RtspCamera, networks: Networks = ()) -> ChildSource:
    """Make the source of an RTSP camera, which may not lead out of `networks`. Raises SourceError without its password.

    The timeouts go into FFmpeg's constructor, later it ignores them; `ChildSource` holds them besides.
    """
    try:
        address = camera.address()
    except ConfigError as error:
        raise SourceError(str(error), reason="auth_failed", hint=error.hint) from None
    timeouts_s = (camera.connect_timeout_s, camera.read_timeout_s)
    settings = {
        "address": address,
        "shown": camera.url,
        "timeouts_s": timeouts_s,
        "options": _OPTIONS,
        "networks": [str(network) for network in networks],
    }
    return ChildSource("rtsp", settings, shown=camera.url, timeouts_s=timeouts_s)
