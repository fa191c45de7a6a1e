"""What runs in a camera's own process: opens the camera and forwards what its source gives, until told to end.

Decides nothing and retries nothing: a loss is one message, and the process ends. Started by `forkserver`.
"""

from __future__ import annotations

import gc
import signal
import sys
from ipaddress import ip_network
from typing import TYPE_CHECKING, Any

from pipeline.errors import FrameError, SourceError
from pipeline.networks import Networks, refuse_strangers
from pipeline.sources.link import Link
from pipeline.sources.stream import StreamSource
from pipeline.types import Picture

if TYPE_CHECKING:
    from pipeline.sources.usb import UsbSource


def run(link: Link) -> None:
    """Read one camera to its end. Never raises but for SystemExit, which SIGTERM asks for."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        settings = link.settings()
        networks = [ip_network(network) for network in settings.pop("networks", [])]
        _forward(_source(settings), link, networks)
    except SourceError as error:
        link.say({"kind": "lost", "text": str(error), "reason": error.reason, "hint": error.hint, "final": error.final})
    except OSError:  # the reader is gone
        return
    except Exception as error:  # noqa: BLE001 (top frame; its text might hold an address)
        text = f"the reading process failed: {type(error).__name__}"
        link.say({"kind": "lost", "text": text, "reason": "internal"})


def _source(settings: dict[str, Any]) -> StreamSource | UsbSource:
    kind = settings.pop("type")
    if kind == "rtsp":
        return StreamSource(**settings)
    from pipeline.sources.usb import UsbSource  # here, so that only a USB camera's process carries OpenCV

    return UsbSource(**settings)


def _forward(source: StreamSource | UsbSource, link: Link, networks: Networks) -> None:
    has_pictures = False
    with source:
        refuse_strangers(networks)
        link.say({"kind": "opened"})
        while True:
            try:
                picture = source.read()
            except FrameError as error:
                part = [error.part_id, error.part_id_source]
                link.say({"kind": "damaged", "text": str(error), "reason": error.reason, "part": part})
                continue
            except SourceError as error:
                if error.reason == "timeout" and not has_pictures:
                    error.reason = "no_frames"
                raise
            if picture is None:
                link.say({"kind": "end"})
                return
            has_pictures = True
            link.picture(picture.image, _head(picture))
            # PyAV's frames lie in reference cycles, a megabyte each; with all else frozen, this takes 0.05 ms.
            del picture
            gc.collect()


def _head(picture: Picture) -> dict[str, Any]:
    return {
        "at": picture.captured_at.timestamp(),
        "s": picture.captured_s,
        "part": [picture.part_id, picture.part_id_source],
    }
