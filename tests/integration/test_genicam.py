"""GenICam cameras against Aravis's fake GigE Vision camera, over the loopback's real packets."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import cv2
import numpy as np
import pytest
from line_process import LineProcess, children, received, wait_until
from reading import reading

from pipeline.cameras import GenicamCamera
from pipeline.errors import FrameError, SourceError
from pipeline.sources import Source, child, open_source
from pipeline.types import IDLE, CameraState, Cause, Picture

pytestmark = pytest.mark.camera
# Reads the camera with Aravis alone and none of our code: its RGB8 pictures of 512 x 512, which repeat after 255, each
# to a file of raw bytes named by its place among them.
GRAB = """
import sys
import gi
gi.require_version("Aravis", "0.8")
from gi.repository import Aravis
camera = Aravis.Camera.new("127.0.0.1")
camera.set_pixel_format_from_string("RGB8")
camera.set_frame_rate(50)
stream = camera.create_stream(None, None)
for _ in range(20):
    stream.push_buffer(Aravis.Buffer.new_allocate(camera.get_payload()))
camera.start_acquisition()
missing = set(range(255))
while missing:
    buffer = stream.timeout_pop_buffer(3_000_000)
    if buffer is None:  # it sends nothing at some of its starts
        camera.stop_acquisition()
        camera.start_acquisition()
        continue
    place = buffer.get_frame_id() % 255
    if buffer.get_status() == Aravis.BufferStatus.SUCCESS and place in missing:
        with open(f"{sys.argv[1]}/{place}.raw", "wb") as file:
            file.write(buffer.get_image_data())
        missing.remove(place)
    stream.push_buffer(buffer)
camera.stop_acquisition()
"""


@contextmanager
def fake_camera(*options: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run the fake camera on 127.0.0.1; GigE Vision has one port, so one at a time."""
    command = ["arv-fake-gv-camera-0.8", "-i", "127.0.0.1", *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            time.sleep(0.3)  # it says nothing when it listens
            assert process.poll() is None
            yield process
        finally:
            process.kill()


@pytest.fixture
def camera() -> Iterator[None]:
    """A camera as it comes from the factory."""
    with fake_camera():
        yield


def genicam(**settings: object) -> GenicamCamera:
    block = {"id": "c1", "type": "genicam", "product": "tray", "address": "127.0.0.1", "retry_max_s": 1.0}
    block |= {"connect_timeout_s": 20, "read_timeout_s": 20}  # a busy machine is no fault
    return GenicamCamera(**block | settings)


@contextmanager
def opened_again(camera: GenicamCamera) -> Iterator[Source]:
    """Open a camera that was just read: where its reader had to be killed, it is held until its heartbeat is missed."""
    until_s = time.monotonic() + 15
    while True:
        try:
            source = open_source(camera).__enter__()
            break
        except SourceError:
            if time.monotonic() > until_s:
                raise
            time.sleep(0.5)
    try:
        yield source
    finally:
        source.__exit__(None, None, None)


def frame(source: Source) -> Picture | FrameError:
    """Give the next frame that came, whole or not: a busy machine loses packets."""
    while True:
        try:
            picture = source.read()
        except FrameError as error:
            return error
        if isinstance(picture, Picture):
            return picture


def picture(source: Source) -> Picture:
    """Give the next whole picture."""
    while not isinstance(found := frame(source), Picture):
        pass
    return found


@contextmanager
def sending(camera: GenicamCamera) -> Iterator[tuple[Source, Picture | FrameError]]:
    """Open a camera and give its first frame too. The fake one sends nothing at some of its starts: it is opened again,
    as the line's readers do."""
    for last in (False, False, True):
        with opened_again(camera) as source:
            try:
                first = frame(source)
            except SourceError as error:
                if last or error.reason != "no_frames":
                    raise
                continue
            yield source, first
            return


@pytest.mark.usefixtures("camera")
def test_pictures_come_in_the_camera_s_own_count() -> None:
    """Every frame once, in order; the count runs on where the camera's 16 bits wrap from 65535 to 1 (the fake one does
    so at its 136th frame); times are of capture, and the camera's clock is passed on."""
    with sending(genicam(rate=100, exposure_us=500, buffers=50, gain=2)) as (source, first):
        found = [first, *(frame(source) for _ in range(149))]
        last = picture(source)
    counts = [each.trigger_count for each in found]
    clocks = [each.device_timestamp_ns for each in found if isinstance(each, Picture)]
    assert counts == sorted(set(counts))
    assert counts[0] == 1
    assert counts[-1] < 65_000
    assert len(clocks) > 100
    assert clocks == sorted(clocks)
    assert 0 <= time.monotonic() - last.captured_s < 20


@pytest.mark.usefixtures("camera")
@pytest.mark.parametrize("pixel_format", ["Mono8", "BayerRG8", "BayerGR8", "BayerGB8", "BayerBG8", "RGB8"])
def test_every_pixel_format_becomes_rgb(pixel_format: str) -> None:
    """Grey, Bayer and colour cameras all give HWC RGB; the fake camera's picture is grey where it is told to be."""
    with sending(genicam(pixel_format=pixel_format, packet_size=1500, packet_delay_ns=0)) as (source, _):
        image = picture(source).image
    assert image.shape == (512, 512, 3)
    assert image.std() > 1
    if pixel_format == "Mono8":
        assert (image[..., 0] == image[..., 1]).all()


@pytest.mark.usefixtures("camera")
def test_a_software_trigger_makes_a_picture_each() -> None:
    """Four triggers a second are four pictures a second, without a gap; not the camera's own 25."""
    with sending(genicam(trigger="software", rate=4, packet_size="auto")) as (source, first):
        begun_s = time.monotonic()
        found = [first, *(frame(source) for _ in range(3))]
        took_s = time.monotonic() - begun_s
    assert [each.trigger_count for each in found] == [1, 2, 3, 4]
    assert took_s > 0.3


@pytest.mark.usefixtures("camera")
def test_a_camera_that_waits_for_its_line_is_well() -> None:
    """Without a pulse on its input there is no picture and no fault, beyond the read timeout: it streams."""
    with reading(genicam(trigger="Line0", read_timeout_s=0.2)) as done:
        done.wait_for(CameraState.STREAMING)
        time.sleep(2.0)
    assert done.states == [(CameraState.STREAMING, "")]
    with opened_again(genicam(trigger="Line0")) as source:
        assert source.read() is IDLE


@pytest.mark.usefixtures("camera")
def test_a_camera_has_one_reader() -> None:
    """A second reader is refused with `in_use`, and gets the camera as soon as the first lets go."""
    with reading(genicam()) as first:
        first.wait_for(CameraState.STREAMING)
        with reading(genicam()) as second:
            second.wait_for(CameraState.LOST, "in_use")
    with reading(genicam()) as third:
        third.wait_for(CameraState.STREAMING)
    *before, last = third.states  # a reader that had to be killed holds the camera until its heartbeat is missed
    assert last == (CameraState.STREAMING, "")
    assert set(before) <= {(CameraState.LOST, "in_use"), (CameraState.LOST, "no_frames")}


@pytest.mark.usefixtures("camera")
@pytest.mark.parametrize(
    ("settings", "feature"),
    [({"chunk_data": True}, "ChunkModeActive"), ({"trigger": "Line0", "activation": "AnyEdge"}, "AnyEdge")],
)
def test_a_setting_that_the_camera_has_not_is_told_once(settings: dict[str, object], feature: str) -> None:
    """The fake camera has no chunk data and one kind of edge: final, with the feature's name."""
    with pytest.raises(SourceError, match=feature) as caught, open_source(genicam(**settings)):
        pass
    assert (caught.value.reason, caught.value.final) == ("setting_refused", True)


def test_a_camera_that_is_not_there_is_not_found() -> None:
    """No camera at this address: LOST with `not_found`; it is looked for again."""
    with reading(genicam()) as done:
        done.wait_for(CameraState.LOST, "not_found")
        with fake_camera():
            done.wait_for(CameraState.STREAMING)


def test_lost_packets_are_a_damaged_frame() -> None:
    """Without resend a frame that misses a packet is `frame_corrupt` with its place in the count."""
    with fake_camera("-r", "3"), sending(genicam(resend=False, rate=50, exposure_us=500)) as (source, first):
        found = [first, *(frame(source) for _ in range(59))]
    damaged = sum(isinstance(each, FrameError) for each in found)
    counts = [each.trigger_count for each in found]
    assert 0 < damaged < 60
    assert counts == sorted(set(counts))


def test_a_camera_that_sends_nothing_has_no_frames() -> None:
    """It answers, and none of its packets arrives: `no_frames`, which is not the `timeout` of a cut cable."""
    with fake_camera("-r", "1000"), reading(genicam(resend=False, read_timeout_s=1.0)) as done:
        done.wait_for(CameraState.LOST, "no_frames")


def test_a_camera_that_loses_power_is_a_timeout_even_between_triggers() -> None:
    """A triggered camera is silent by right, but it answers its heartbeat: without that it is LOST, and back later."""
    with reading(genicam(trigger="Line0")) as done:
        with fake_camera():
            done.wait_for(CameraState.STREAMING)
        done.wait_for(CameraState.LOST, "timeout")
        with fake_camera():
            done.wait_for(CameraState.STREAMING)


@pytest.mark.usefixtures("camera")
def test_frames_that_no_buffer_took_are_counted() -> None:
    """While the line has no room, a camera's frames wait in the buffers; those beyond are counted as `missed`, and
    what was taken is handed over in order."""
    with reading(genicam(rate=50, exposure_us=500, buffers=2)) as done:
        done.wait_for_frames(3)
        done.hold(2.0)
        wait_until(lambda: done.metrics.snapshot().cameras[0].dropped.get("missed", 0) > 10, 60, "missed frames")
    assert all(frame.cause is None or frame.cause is Cause.FRAME_CORRUPT for frame in done.frames)
    counts = [frame.trigger_count for frame in done.frames if frame.trigger_count is not None]
    assert counts == sorted(counts)
    # A damaged frame's time is that of its arrival, which may lie after the capture of the next one.
    whole = [frame.captured_s for frame in done.frames if frame.cause is None]
    assert len(whole) >= 3
    assert whole == sorted(whole)


@pytest.mark.usefixtures("camera")
def test_a_hung_process_is_killed_and_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that reads the camera hangs: it is killed, and the camera streams again once it has let go."""
    monkeypatch.setattr(child, "GRACE_S", 0.5)
    with reading(genicam(read_timeout_s=1.0)) as done:
        done.wait_for(CameraState.STREAMING)
        server = child.FORK_SERVER._process.pid
        command = ["pgrep", "-P", str(server)]
        pid = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
        os.kill(pid, signal.SIGSTOP)
        done.wait_for(CameraState.LOST, "timeout")
        done.wait_for(CameraState.STREAMING)


@pytest.mark.stack
@pytest.mark.usefixtures("camera")
def test_a_gap_in_the_camera_s_counter_is_parts_that_were_missed(stack, line_file, products) -> None:
    """While the camera's process stands still, the network's packets are lost: the counts that are left out are parts,
    UNINSPECTED with `trigger_missed`, in their places; the others are judged, and each part has one verdict."""
    made = line_file(stack, budget_ms=5000)
    settings = {"address": "127.0.0.1", "rate": 10, "exposure_us": 500, "resend": False, "station": "here"}
    made.camera(type="genicam", product=products[0], connect_timeout_s=20, read_timeout_s=20, **settings)
    made.settings["stations"] = [{"name": "here", "trigger": "counter"}]
    with LineProcess(made.write()) as line:
        wait_until(lambda: '"camera streaming"' in line.log(), 60, "pictures")
        (camera_process,) = (pid for server in children(line.pid) for pid in children(server))
        os.kill(camera_process, signal.SIGSTOP)
        time.sleep(2.0)
        os.kill(camera_process, signal.SIGCONT)
        wait_until(lambda: '"frames missed"' in line.log(), 60, "a gap")
        summary = line.stop()
    verdicts = received(stack.endpoints["kafka"], made.name, at_least=summary["triggered"])
    numbers = [int(part_id.rpartition("-")[2]) for part_id in verdicts.parts]
    assert numbers == list(range(1, summary["triggered"] + 1))
    assert (verdicts.duplicates, verdicts.in_order()) == (0, True)
    data = [event["data"] for event in verdicts.events]
    missed = [each for each in data if each["reasonCodes"] == ["trigger_missed"]]
    assert {(each["verdict"], each["partIdSource"]) for each in missed} == {("UNINSPECTED", "counter")}
    assert missed[0]["missingViews"] == [{"cameraId": "cam-1", "required": True, "cause": "trigger_missed"}]
    assert data[0]["views"][0]["triggerCount"] == 1
    assert data[-1]["views"][0]["triggerCount"] == len(data)
    (station,) = summary["stations"]
    assert station["triggered"] == sum(station["judgements"].values()) == len(data)


@pytest.mark.stack
def test_a_picture_scores_as_its_file_does(stack, line_file, products, tmp_path) -> None:
    """The fake camera's ramp of all colours moves from frame to frame; each scores as the same pixels from a PNG file.

    Nothing differs but the batch that a picture was in: less than 1e-5 of the score. The first picture that the line
    gets may be any of the camera's (where it sends nothing it is opened again), and the others follow it.
    """
    with fake_camera():
        subprocess.run(["/usr/bin/python3", "-c", GRAB, str(tmp_path)], check=True, timeout=90)
    for path in tmp_path.glob("*.raw"):
        pixels = np.frombuffer(path.read_bytes(), np.uint8).reshape(512, 512, 3)
        cv2.imwrite(str(path.with_suffix(".png")), cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
    made = line_file(stack)
    about = {"product": products[0], "address": "127.0.0.1", "pixel_format": "RGB8", "rate": 4}
    made.camera(type="genicam", station="camera", **about)
    made.camera(type="folder", station="file", path=str(tmp_path), product=products[0])

    def scores(station: str) -> dict[int, float]:
        found: dict[int, float] = {}
        for event in received(stack.endpoints["kafka"], made.name).events:
            data, view = event["data"], event["data"]["views"][0]
            if data["station"] != station or view["scores"] is None:
                continue
            number = view["triggerCount"] or int(data["partId"].split(".")[0])
            if station == "camera" and number <= max(found, default=0):
                found.clear()  # opened anew, it counts anew
            found[number] = view["scores"]["fused"]
        return found

    with fake_camera(), LineProcess(made.write()) as line:
        wait_until(lambda: len(scores("file")) >= 255 and len(scores("camera")) >= 6, 120, "pictures each way")
        line.stop()
    files, camera = scores("file"), scores("camera")
    assert len({round(score, 3) for score in files.values()}) > 200  # they are told apart: agreement says something

    def is_first(place: int) -> bool:
        return [files[(place + count) % 255] for count in camera] == pytest.approx(list(camera.values()), rel=1e-5)

    assert len([place for place in range(255) if is_first(place)]) == 1, (camera, files)
