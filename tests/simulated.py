"""Simulated RTSP cameras for tests: the real server, on a free port, ended with the block."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

SIMULATE = Path(__file__).parents[1] / "deploy/local/simulate.py"
# A camera of any codec, 320 x 240 at 5 pictures a second: what follows its picture is the first argument.
PATTERN = """
import json, sys
import gi
gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer
Gst.init(None)
server, factory = GstRtspServer.RTSPServer(), GstRtspServer.RTSPMediaFactory()
server.set_address("127.0.0.1")
server.set_service("0")
size = "video/x-raw,format=I420,width=320,height=240,framerate=5/1"
factory.set_launch(f"( videotestsrc is-live=true ! {size} ! {sys.argv[1]} name=pay0 )")
server.get_mount_points().add_factory("/c1", factory)
server.attach(None)
print(json.dumps({"cameras": {"c1": f"rtsp://127.0.0.1:{server.get_bound_port()}/c1"}}), flush=True)
GLib.MainLoop().run()
"""


# Plays a list in three sizes, one after the other.
THREE_SIZES = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import simulate
playlist = Path(sys.argv[2])
arguments = simulate._parser().parse_args(["--camera", f"c1={playlist}", "--rate", "10"])
entries, sizes = simulate.read_playlist(playlist), [(320, 240), (640, 480), (160, 120)]
frames = [frame for size in sizes for frame in simulate.encode(entries, *size, arguments.rate)]
simulate.serve({"c1": frames}, arguments)
"""


def plain_playlist(folder: Path, colours: Iterable[int]) -> Path:
    """Write one plain picture a colour, which H.264 keeps bit for bit, and their list; the parts are p0, p1 ..."""
    entries = []
    for number, colour in enumerate(colours):
        cv2.imwrite(str(folder / f"{number}.png"), np.full((240, 320, 3), 40 + 8 * colour, np.uint8))
        entries.append({"path": f"{number}.png", "part_id": f"p{number}"})
    path = folder / "list.json"
    path.write_text(json.dumps(entries))
    return path


@dataclass(frozen=True)
class Cameras:
    """A running simulation."""

    process: subprocess.Popen[str]
    addresses: dict[str, str]
    report_path: Path

    def sent(self, name: str) -> list[str]:
        """The part ids that its report names, once it has ended."""
        self.process.wait(timeout=10)
        return json.loads(self.report_path.read_text())["cameras"][name]["sent"]


@contextmanager
def simulation(playlists: dict[str, Path], folder: Path, *options: str) -> Iterator[Cameras]:
    """Start the cameras, 320 x 240 unless `options` say otherwise; wait until they listen, end them."""
    report_path = folder / "report.json"
    command = [sys.executable, str(SIMULATE), "--size", "320x240", "--report", str(report_path), *options]
    for name, path in playlists.items():
        command += ["--camera", f"{name}={path}"]
    with serving(command) as (process, addresses):
        yield Cameras(process, addresses, report_path)


@contextmanager
def three_sizes(playlist: Path) -> Iterator[str]:
    """A camera that plays the list at 320 x 240, at 640 x 480 and at 160 x 120; gives its address."""
    with serving([sys.executable, "-c", THREE_SIZES, str(SIMULATE.parent), str(playlist)]) as (_, addresses):
        yield addresses["c1"]


@contextmanager
def pattern(encoder: str) -> Iterator[str]:
    """A camera that sends a test picture as GStreamer's `encoder` (elements, the payloader last) makes it; gives its
    address."""
    with serving(["/usr/bin/python3", "-c", PATTERN, encoder]) as (_, addresses):
        yield addresses["c1"]


@contextmanager
def serving(command: list[str]) -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    """Run a command that becomes the RTSP server; gives it and its addresses by camera."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process, json.loads(process.stdout.readline())["cameras"]
        finally:
            process.terminate()
            process.wait(timeout=10)
