"""Simulated cameras: encodes pictures to H.264 and becomes the RTSP server that plays them, one address a camera.

Each playlist is a JSON list of {"path": picture, "part_id": text}, or a folder of pictures. Encodes everything first,
so that serving costs next to nothing, then replaces itself with `rtsp_server.py`, handing it the frames in memory: one
process, no file left.
Run by `logicrd cameras simulate`, the demo and the tests. It knows nothing of products or verdicts.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np

SERVER = Path(__file__).with_name("rtsp_server.py")
# The GObject bindings of GStreamer belong to the distribution's own Python.
SYSTEM_PYTHON = "/usr/bin/python3"
PICTURES = (".bmp", ".jpeg", ".jpg", ".png")
KEYFRAME_EVERY = 10
# No B frames and no lookahead: a frame in is an access unit out. Parameter sets before every keyframe, so that a client
# may join anywhere. Near lossless as inspection cameras are: crf 18 smooths away noise that models are calibrated on.
ENCODER = {
    "tune": "zerolatency",
    "preset": "veryfast",
    "crf": "10",
    "x264-params": f"keyint={KEYFRAME_EVERY}:min-keyint=1:scenecut=0:bframes=0:repeat-headers=1:threads=1",
}


class PlaylistError(Exception):
    """Which playlist or picture cannot be used, and why."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One encoded picture: an access unit in Annex B form, and where its first slice starts."""

    part_id: str
    unit: bytes
    slice_offset: int
    is_keyframe: bool


def read_playlist(path: Path) -> list[tuple[Path, str]]:
    """(picture, part id) of each entry; relative pictures are beside the playlist. Raises PlaylistError.

    A folder is the playlist of its pictures in the order of their names, which are the part ids.
    """
    if path.is_dir():
        pictures = sorted(each for each in path.iterdir() if each.suffix.lower() in PICTURES)
        if not pictures:
            raise PlaylistError(f"playlist '{path}': a folder without pictures ({', '.join(PICTURES)})")
        return [(each, each.stem) for each in pictures]
    try:
        entries = json.loads(path.read_text())
        playlist = [(path.parent / entry["path"], str(entry["part_id"])) for entry in entries]
    except (OSError, ValueError, TypeError, KeyError) as error:
        form = '[{"path": "...", "part_id": "..."}, ...]'
        raise PlaylistError(f"playlist '{path}': {error!r}; it must be a JSON list {form}") from error
    if not playlist:
        raise PlaylistError(f"playlist '{path}' is empty")
    return playlist


def encode(playlist: list[tuple[Path, str]], width: int, height: int, rate: Fraction) -> list[Frame]:
    """All frames of a playlist, in order; pictures of another size are stretched to it. Raises PlaylistError."""
    encoder = av.CodecContext.create("libx264", "w")
    encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuv420p"
    encoder.framerate, encoder.time_base = rate, 1 / rate
    encoder.options = ENCODER
    packets = []
    for number, (path, _) in enumerate(playlist):
        picture = av.VideoFrame.from_ndarray(_read_picture(path, width, height), format="bgr24")
        picture.pts = number
        packets += encoder.encode(picture)
    packets += encoder.encode(None)
    if len(packets) != len(playlist):
        raise PlaylistError(f"the encoder made {len(packets)} access units of {len(playlist)} pictures")
    return [_frame(part_id, packet) for (_, part_id), packet in zip(playlist, packets, strict=True)]


def _read_picture(path: Path, width: int, height: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """HWC uint8 BGR at this size."""
    picture = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if picture is None:
        raise PlaylistError(f"picture '{path}' cannot be read")
    if picture.shape[:2] != (height, width):
        picture = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
    return np.asarray(picture, np.uint8)


def _frame(part_id: str, packet: av.Packet[av.VideoStream]) -> Frame:
    """Without the SEI message in which x264 names itself: a reader finds one message a frame, the part id."""
    head = b"".join(b"\0\0\0\1" + unit for kind, unit in _nal_units(bytes(packet)) if kind in (7, 8))
    slices = b"".join(b"\0\0\0\1" + unit for kind, unit in _nal_units(bytes(packet)) if kind in (1, 5))
    return Frame(part_id, head + slices, len(head), bool(packet.is_keyframe))


def _nal_units(stream: bytes) -> Iterator[tuple[int, bytes]]:
    """(type, bytes without start code) of each NAL unit; types as in H.264 table 7-1."""
    for part in stream.split(b"\0\0\1")[1:]:
        unit = part.rstrip(b"\0")
        yield unit[0] & 0x1F, unit


def serve(cameras: dict[str, list[Frame]], arguments: argparse.Namespace) -> None:
    """Become the server. What it plays goes into an anonymous memory file: length of the index, index, access units."""
    index = {
        "host": arguments.host,
        "port": arguments.port,
        "rate": [arguments.rate.numerator, arguments.rate.denominator],
        "limit": math.ceil(arguments.seconds * arguments.rate) if arguments.seconds is not None else None,
        "loop": arguments.loop,
        "stall_after": arguments.stall_after,
        "user": arguments.user,
        "password": arguments.password,
        "report": str(arguments.report.resolve()) if arguments.report is not None else None,
        "cameras": {
            name: [[frame.part_id, len(frame.unit), frame.slice_offset, frame.is_keyframe] for frame in frames]
            for name, frames in cameras.items()
        },
    }
    text = json.dumps(index).encode()
    memory = os.memfd_create("cameras")
    with os.fdopen(memory, "wb", closefd=False) as file:
        file.write(len(text).to_bytes(8, "big") + text)
        file.writelines(frame.unit for frames in cameras.values() for frame in frames)
    os.lseek(memory, 0, os.SEEK_SET)
    os.set_inheritable(memory, True)
    sys.stdout.flush()
    os.execv(SYSTEM_PYTHON, [SYSTEM_PYTHON, str(SERVER), str(memory)])  # noqa: S606  no shell is wanted


def _camera(text: str) -> tuple[str, Path]:
    name, separator, path = text.partition("=")
    if not separator or not name.replace("-", "").replace("_", "").isalnum():
        raise argparse.ArgumentTypeError(
            f"'{text}': give NAME=PLAYLIST.json or NAME=FOLDER, the name of letters, digits, - and _"
        )
    return name, Path(path)


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (
        width.isdigit() and height.isdigit() and int(width) % 2 == int(height) % 2 == 0 and int(width) * int(height)
    ):
        raise argparse.ArgumentTypeError(f"'{text}': give WIDTHxHEIGHT, both even, as in 640x480")
    return int(width), int(height)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="logicrd cameras simulate", description="RTSP cameras that play pictures.")
    parser.add_argument("--camera", type=_camera, action="append", required=True, metavar="NAME=PLAYLIST.json")
    parser.add_argument("--rate", type=Fraction, default=Fraction(10), help="frames a second (default: 10)")
    parser.add_argument("--size", type=_size, default=(640, 480), help="WIDTHxHEIGHT (default: 640x480)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=0, help="RTSP port (default: any free one)")
    parser.add_argument("--loop", action="store_true", help="start over; part ids of lap 2 end in ~2, and so on")
    parser.add_argument("--seconds", type=float, help="end each camera after so many seconds of video")
    parser.add_argument("--report", type=Path, help="where to write, at the end, the part ids that were sent")
    parser.add_argument("--user", help="ask clients for this name and --password (basic authentication)")
    parser.add_argument("--password", help="see --user")
    parser.add_argument("--stall-after", type=int, metavar="N", help="fault: stay connected but silent after N frames")
    return parser


def _encode_all(arguments: argparse.Namespace) -> dict[str, list[Frame]]:
    """Every camera's frames by its name, encoded side by side."""
    playlists = {name: read_playlist(path) for name, path in arguments.camera}
    width, height = arguments.size
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        encoded = pool.map(lambda playlist: encode(playlist, width, height, arguments.rate), playlists.values())
        return dict(zip(playlists, encoded, strict=True))


def main(argv: list[str]) -> int:
    """Returns only when something is wrong: 2 usage, 3 a playlist, a picture or the server's Python."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if (arguments.user is None) != (arguments.password is None):
        parser.error("--user and --password go together")
    if arguments.rate <= 0:
        parser.error("--rate must be above 0")
    try:
        serve(_encode_all(arguments), arguments)
    except PlaylistError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"error: {SYSTEM_PYTHON} {SERVER.name}: {error}; run `make setup`", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    return 3


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
