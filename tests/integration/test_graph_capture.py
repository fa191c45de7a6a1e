"""RTSP cameras through the software twin of DeepStream's graph: a real server, a real GStreamer, its own process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from simulated import pattern

from pipeline.cameras import RtspCamera
from pipeline.errors import FrameError, SourceError
from pipeline.sources import Source, deepstream, open_source
from pipeline.sources.deepstream import GraphHost, GraphSource
from pipeline.types import IDLE, Picture

SIMULATE = Path(__file__).parents[2] / "deploy/local/simulate.py"
PICTURES = 20
SIZE = (322, 242)  # a row of 966 bytes: GStreamer pads it to 968
COLOUR_TOLERANCE = 2.0
"""Mean difference of a colour value, 0..255: GStreamer's quick conversion to RGB loses 1.0 in red, 2.4 in green and 0.7
in blue against FFmpeg's."""

pytestmark = pytest.mark.camera


@pytest.fixture(scope="module")
def playlist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Smooth pictures of many colours, each with a part id outside ASCII."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for number in range(PICTURES):
        coarse = generator.integers(30, 220, (4, 5, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{number}.png"), cv2.resize(coarse, SIZE, interpolation=cv2.INTER_CUBIC))
    entries = [{"path": f"{number}.png", "part_id": f"é-{number}"} for number in range(PICTURES)]
    (folder / "list.json").write_text(json.dumps(entries))
    return folder / "list.json"


@contextmanager
def cameras(playlist: Path, *names: str, options: tuple[str, ...] = ()) -> Iterator[dict[str, str]]:
    """Serve the playlist under each name; gives the addresses."""
    command = [sys.executable, str(SIMULATE), "--size", "x".join(map(str, SIZE)), "--rate", "10", *options]
    for name in names:
        command += ["--camera", f"{name}={playlist}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield json.loads(process.stdout.readline())["cameras"]
        finally:
            process.terminate()
            process.wait(timeout=10)


def camera(url: str, **settings: object) -> RtspCamera:
    return RtspCamera(id=url.rpartition("/")[2], type="rtsp", url=url, product="tray", decoder="gstreamer", **settings)


def read_all(source: GraphSource) -> list[Picture]:
    pictures = []
    while (picture := source.read()) is not None:
        pictures.append(picture)
    return pictures


def read_count(source: Source, count: int) -> Iterator[Picture]:
    while count:
        if (picture := source.read()) is not IDLE:
            assert picture is not None
            yield picture
            count -= 1


def test_every_frame_arrives_with_its_part_id_and_the_colours_of_the_other_decoder(playlist: Path) -> None:
    """Both ways of reading a camera give the same parts in the same order, and nearly the same picture."""
    found = {}
    for decoder in ("ffmpeg", "gstreamer"):
        with (
            cameras(playlist, "left") as addresses,
            open_source(camera(addresses["left"]).model_copy(update={"decoder": decoder})) as source,
        ):
            # Copied: a picture may lie in the source's own memory, which holds until its next `read`.
            found[decoder] = [replace(each, image=each.image.copy()) for each in read_count(source, PICTURES)]
    for theirs, ours in zip(found["ffmpeg"], found["gstreamer"], strict=True):
        assert (ours.part_id, ours.part_id_source) == (theirs.part_id, theirs.part_id_source)
        assert ours.image.shape == (SIZE[1], SIZE[0], 3)
        assert np.abs(ours.image.astype(int) - theirs.image).mean() < COLOUR_TOLERANCE
    assert [picture.part_id for picture in found["gstreamer"]] == [f"é-{number}" for number in range(PICTURES)]
    waits = np.diff([picture.captured_s for picture in found["gstreamer"]])
    assert 0.02 < np.median(waits) < 0.5  # the times are those of arrival, ten a second, not those of reading


def test_a_lost_camera_ends_alone(playlist: Path) -> None:
    """One process reads two cameras; one goes silent and is reported, the other gives every frame."""
    host = GraphHost()
    with (
        cameras(playlist, "silent", options=("--stall-after", "3")) as silent,
        cameras(playlist, "left") as good,
        GraphSource(camera(good["left"]), host) as left,
        ThreadPoolExecutor(1) as reader,
    ):
        pictures = reader.submit(read_all, left)
        with GraphSource(camera(silent["silent"], read_timeout_s=5.0), host) as lost:
            assert [lost.read().part_id for _ in range(3)] == ["é-0", "é-1", "é-2"]
            with pytest.raises(SourceError, match="timeout") as caught:
                lost.read()
        assert (caught.value.reason, caught.value.final) == ("timeout", False)
        assert len(pictures.result(timeout=30)) == PICTURES
        assert host.pid is not None
    assert host.pid is None


@pytest.mark.parametrize(
    ("path", "options", "reason"),
    [
        ("left", ("--user", "line", "--password", "4711"), "auth_failed"),
        ("nowhere", (), "not_found"),
    ],
)
def test_a_camera_that_refuses_says_why(playlist: Path, path: str, options: tuple[str, ...], reason: str) -> None:
    """A missing password and a wrong path are told apart by their reason codes."""
    with cameras(playlist, "left", options=options) as addresses:
        url = addresses["left"].replace("/left", f"/{path}")
        with open_source(camera(url)) as source, pytest.raises(SourceError, match=reason) as caught:
            source.read()
    assert caught.value.reason == reason


def test_a_camera_of_another_codec_is_told_which() -> None:
    """A camera that sends JPEG is `codec_unsupported`, by its codec's name; FFmpeg reads it."""
    with pattern("jpegenc ! rtpjpegpay") as address:
        settings = camera(address, connect_timeout_s=30)
        with open_source(settings) as source, pytest.raises(SourceError, match="sends JPEG") as caught:
            source.read()
        with open_source(settings.model_copy(update={"decoder": "ffmpeg"})) as source:
            assert next(read_count(source, 1)).image.shape == (240, 320, 3)
    assert caught.value.reason == "codec_unsupported"


def test_a_password_reaches_the_camera_and_no_process_list(playlist: Path, tmp_path: Path) -> None:
    """With its password the camera gives pictures, and no command line or environment holds it."""
    (tmp_path / "secret").write_text("4711-#?\n")
    host = GraphHost()
    with (
        cameras(playlist, "left", options=("--user", "line", "--password", "4711-#?")) as addresses,
        GraphSource(camera(addresses["left"], user="line", password_file=tmp_path / "secret"), host) as source,
    ):
        assert source.read().part_id == "é-0"
        for name in ("cmdline", "environ"):
            assert b"4711-#?" not in Path(f"/proc/{host.pid}/{name}").read_bytes()


def test_a_camera_that_is_off_is_unreachable() -> None:
    """Nobody listens: a reason code, soon."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"rtsp://127.0.0.1:{unused.getsockname()[1]}/left"
        with open_source(camera(url)) as source, pytest.raises(SourceError) as caught:
            source.read()
    assert caught.value.reason == "unreachable"


def test_a_camera_that_accepts_and_says_nothing_times_out() -> None:
    """A dead camera behind a living network: the reader is back after its own timeouts."""
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"rtsp://127.0.0.1:{mute.getsockname()[1]}/left"
        settings = camera(url, connect_timeout_s=0.5, read_timeout_s=0.5)
        with open_source(settings) as source, pytest.raises(SourceError) as caught:
            source.read()
    assert caught.value.reason == "timeout"


def test_a_graph_of_which_nothing_is_heard_is_replaced() -> None:
    """Two cameras are silent: when the first is given up, the process goes, for it may have stopped as a whole."""
    host = GraphHost()
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"rtsp://127.0.0.1:{mute.getsockname()[1]}"
        long = camera(f"{url}/long", connect_timeout_s=10, read_timeout_s=10)
        short = camera(f"{url}/short", connect_timeout_s=0.3, read_timeout_s=0.3)
        with GraphSource(long, host) as other:
            with GraphSource(short, host) as source, pytest.raises(SourceError, match="timeout"):
                source.read()
            assert host.pid is None
            with pytest.raises(SourceError) as caught:
                other.read()
        assert caught.value.reason == "capture_died"


@pytest.mark.parametrize(("signal_number", "reason"), [(signal.SIGKILL, "capture_died"), (signal.SIGSTOP, "timeout")])
def test_a_process_that_dies_or_hangs_is_replaced(playlist: Path, signal_number: int, reason: str) -> None:
    """Its cameras are lost with a reason, and opening one anew starts another process, which is told anew what to make;
    a hung one is killed."""
    told = []

    def start() -> dict:
        told.append("software")
        return {}

    host = GraphHost(start)
    with cameras(playlist, "left", options=("--loop",)) as addresses:
        settings = camera(addresses["left"], read_timeout_s=0.5)
        with GraphSource(settings, host) as source:
            assert source.read() is not None
            first = host.pid
            assert first is not None
            os.kill(first, signal_number)
            with pytest.raises(SourceError) as caught:
                read_all(source)
        assert caught.value.reason == reason
        assert not Path(f"/proc/{first}").exists()
        with GraphSource(settings, host) as source:
            assert source.read() is not None
            assert host.pid not in (None, first)
    assert len(told) == 2


def video(path: Path, *, without: int | None = None, damage: int | None = None) -> None:
    """Twelve frames at 10 a second, key frames at 0 and 8; one left out, or its first slice's header overwritten."""
    noise = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, width=64, height=48, pix_fmt="yuv420p")
        stream.codec_context.gop_size = 8
        stream.options = {"tune": "zerolatency", "preset": "veryfast", "crf": "18", "sc_threshold": "0"}
        for index in range(12):
            pixels = noise.integers(0, 255, (48, 64, 3), dtype=np.uint8)
            packets = stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24"))
            container.mux([] if index == without else packets)
        container.mux(stream.encode())
    if damage is not None:
        with av.open(str(path)) as container:
            start = [packet.pos for packet in container.demux(video=0) if packet.size][damage]
        data = bytearray(path.read_bytes())
        data[start + 5 : start + 40] = b"\xff" * 35
        path.write_bytes(data)


@pytest.mark.parametrize(
    ("fault", "expected"),
    [({"damage": 4}, "....!!!!...."), ({"without": 0}, "!!!!!!!....")],
    ids=["damaged", "begun-between-key-frames"],
)
def test_frames_built_upon_a_bad_one_do_not_count_until_a_key_frame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: dict[str, int], expected: str
) -> None:
    """What the decoder cannot use, and what is built upon it, are faults: none goes missing, none counts wrongly."""
    video(tmp_path / "x.mp4", **fault)
    from_file = deepstream.software_graph().replace("sync=false", "sync=true")
    from_file = from_file.replace(
        "rtspsrc name=camera protocols=tcp latency=0 ! rtph264depay", "filesrc name=camera ! qtdemux"
    )
    monkeypatch.setattr(deepstream, "software_graph", lambda: from_file)
    settings = camera("rtsp://nowhere/left").model_copy(update={"url": str(tmp_path / "x.mp4")})
    found = ""
    with GraphSource(settings, GraphHost()) as source:
        while True:
            try:
                if source.read() is None:
                    break
                found += "."
            except FrameError:
                found += "!"
    assert found == expected


def test_a_line_that_reads_too_slowly_loses_no_part_silently(playlist: Path) -> None:
    """Pictures that find no room become faults with their part ids: every part is accounted for, in order."""
    with cameras(playlist, "left") as addresses, open_source(camera(addresses["left"])) as source:
        found = [source.read().part_id]
        time.sleep(2 * PICTURES / 10)  # twice the time in which all are sent
        given_up = 0
        while len(found) < PICTURES:
            try:
                found.append(source.read().part_id)
            except FrameError as error:
                found.append(error.part_id)
                given_up += 1
    assert found == [f"é-{number}" for number in range(PICTURES)]
    assert given_up > 0
