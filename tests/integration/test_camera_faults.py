"""Cameras as they fail, against real RTSP servers: each fault has its reason, and the camera comes back by itself."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from ipaddress import ip_network
from pathlib import Path

import pytest
from line_process import children, wait_until
from reading import reading
from simulated import SIMULATE, pattern, plain_playlist, serving, simulation, three_sizes

from pipeline.cameras import RtspCamera
from pipeline.sources import child
from pipeline.types import CameraState, Cause

pytestmark = pytest.mark.camera
PASSWORD = "pass-4711-word"  # noqa: S105


def rtsp(url: str, **settings: object) -> RtspCamera:
    """Give a camera that is tried again soon."""
    return RtspCamera(**{"id": "c1", "type": "rtsp", "product": "tray", "url": url, "retry_max_s": 1.0, **settings})


@pytest.fixture(scope="module")
def playlist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty different pictures."""
    return plain_playlist(tmp_path_factory.mktemp("pictures"), range(20))


def camera_processes() -> list[int]:
    """The processes of this process's cameras."""
    server = child.FORK_SERVER._process
    return children(server.pid) if server is not None else []


def test_a_silent_server_is_a_timeout(playlist: Path) -> None:
    """A camera that accepts the connection and sends nothing is LOST with `timeout` and tried again."""
    del playlist
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"rtsp://127.0.0.1:{server.getsockname()[1]}/c1"
        with reading(rtsp(url, connect_timeout_s=0.5)) as done:
            done.wait_for(CameraState.LOST, "timeout")
    assert done.frames == []
    assert done.metrics.registry.get_sample_value(
        "inspection_camera_losses_total", {"camera": "c1", "reason": "timeout"}
    )


def test_passwords_are_asked_for_and_not_shown(playlist: Path, tmp_path: Path) -> None:
    """A wrong password is `auth_failed`; the right one streams, and no command line or environment holds it."""
    wrong, right = tmp_path / "wrong", tmp_path / "right"
    wrong.write_text("4712\n")
    right.write_text(PASSWORD + "\n")
    options = ("--rate", "10", "--loop", "--user", "line", "--password", PASSWORD)
    with simulation({"c1": playlist}, tmp_path, *options) as cameras:
        url = cameras.addresses["c1"]
        with reading(rtsp(url, user="line", password_file=wrong)) as done:
            done.wait_for(CameraState.LOST, "auth_failed")
        with reading(rtsp(url, user="line", password_file=tmp_path / "absent")) as done:
            done.wait_for(CameraState.LOST, "auth_failed")
        with reading(rtsp(url, user="line", password_file=right)) as done:
            done.wait_for_frames(3)
            assert camera_processes()
            assert shown_by(PASSWORD) == []


def shown_by(word: str) -> list[str]:
    """The files of /proc that show a word to whoever lists processes."""
    found = []
    for name in ("cmdline", "environ"):
        for path in Path("/proc").glob(f"[0-9]*/{name}"):
            try:
                if word.encode() in path.read_bytes():
                    found.append(str(path))
            except OSError:
                continue
    return found


def test_a_camera_that_is_off_at_the_start_is_read_once_it_is_on(playlist: Path, tmp_path: Path) -> None:
    """`unreachable` until the camera is there; then its parts, from the first, without anyone's help."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with reading(rtsp(f"rtsp://127.0.0.1:{port}/c1")) as done:
        done.wait_for(CameraState.LOST, "unreachable")
        with simulation({"c1": playlist}, tmp_path, "--rate", "10", "--port", str(port)):
            done.wait_for_frames(3)
    assert done.states[:2] == [(CameraState.LOST, "unreachable"), (CameraState.STREAMING, "")]
    assert [frame.part_id for frame in done.frames[:3]] == ["p0", "p1", "p2"]


def test_a_path_that_is_not_there_is_not_found(playlist: Path, tmp_path: Path) -> None:
    """The right camera with the wrong path says so."""
    with simulation({"c1": playlist}, tmp_path) as cameras, reading(rtsp(cameras.addresses["c1"] + "-2")) as done:
        done.wait_for(CameraState.LOST, "not_found")


def test_a_camera_that_falls_silent_is_a_timeout(playlist: Path, tmp_path: Path) -> None:
    """Six frames, then nothing on an open connection: LOST with `timeout`, the six are there."""
    with (
        simulation({"c1": playlist}, tmp_path, "--rate", "10", "--stall-after", "6") as cameras,
        reading(rtsp(cameras.addresses["c1"], read_timeout_s=5.0)) as done,
    ):
        done.wait_for(CameraState.LOST, "timeout")
    assert [frame.part_id for frame in done.frames] == [f"p{number}" for number in range(6)]


def test_a_frozen_camera_is_lost_and_its_part_not_judged(tmp_path: Path) -> None:
    """The same picture for `frozen_after_s` is `frozen_picture`: the part goes on as `camera_lost`, without a picture,
    and opening the camera anew does not call it well while it still repeats itself."""
    playlist = plain_playlist(tmp_path, [1, 2, 3, *[4] * 57])
    with (
        simulation({"c1": playlist}, tmp_path, "--rate", "10", "--loop") as cameras,
        reading(rtsp(cameras.addresses["c1"], frozen_after_s=0.6)) as done,
    ):
        done.wait_for(CameraState.LOST, "frozen_picture")
        count = len(done.frames)
        # A new client starts at the next keyframe, the tenth picture: the same one again.
        done.wait_for_frames(count + 1)
        again = done.frames[count]
    first = done.frames[count - 1]
    assert [(frame.cause, frame.image) for frame in (first, again)] == [(Cause.CAMERA_LOST, None)] * 2
    assert done.states[:2] == [(CameraState.STREAMING, ""), (CameraState.LOST, "frozen_picture")]
    assert all(frame.cause is None for frame in done.frames[: count - 1])


@pytest.mark.parametrize("reply", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"], ids=["nothing", "http"])
def test_what_is_no_camera_has_no_frames(reply: bytes) -> None:
    """Something that closes the connection, or speaks HTTP, is `no_frames`: no codec is to blame."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        with reading(rtsp(f"rtsp://127.0.0.1:{server.getsockname()[1]}/c1")) as done:
            while not done.states:
                with suppress(TimeoutError):
                    connection, _ = server.accept()
                    with connection:
                        connection.recv(4096)
                        connection.sendall(reply)
    assert done.states[0] == (CameraState.LOST, "no_frames")


def test_a_codec_that_no_decoder_reads_is_unsupported() -> None:
    """A camera that sends JPEG 2000 is `codec_unsupported`, and is asked again, for somebody may set it to another."""
    with pattern("avenc_jpeg2000 ! jpeg2000parse ! rtpj2kpay") as address, reading(rtsp(address)) as done:
        done.wait_for(CameraState.LOST, "codec_unsupported")
    assert done.frames == []


def test_a_stream_that_is_joined_between_two_key_frames_loses_no_part_in_silence(tmp_path: Path) -> None:
    """The camera starts to send at its fourth picture, the next key frame is its eleventh: seven parts are told."""
    playlist = plain_playlist(tmp_path, range(20))
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import simulate; from pathlib import Path;"
        "arguments = simulate._parser().parse_args(['--camera', f'c1={sys.argv[2]}', '--rate', '10']);"
        "frames = simulate.encode(simulate.read_playlist(Path(sys.argv[2])), 320, 240, arguments.rate);"
        "head = frames[0].unit[:frames[0].slice_offset];"
        "fourth = simulate.Frame(frames[3].part_id, head + frames[3].unit, len(head), True);"
        "simulate.serve({'c1': [fourth, *frames[4:]]}, arguments)"
    )
    command = [sys.executable, "-c", program, str(SIMULATE.parent), str(playlist)]
    with serving(command) as (_, addresses), reading(rtsp(addresses["c1"])) as done:
        done.wait_for(CameraState.LOST, "stream_ended")
    assert [frame.part_id for frame in done.frames] == [f"p{number}" for number in range(3, 20)]
    assert [frame.cause for frame in done.frames] == [Cause.FRAME_CORRUPT] * 7 + [None] * 10


def test_a_new_resolution_is_a_frame_like_any_other_unless_its_size_is_set(tmp_path: Path) -> None:
    """A camera may change its picture's size in mid-stream; with `picture_size` the others are `frame_corrupt`."""
    playlist = plain_playlist(tmp_path, range(10))
    with three_sizes(playlist) as address, reading(rtsp(address)) as done:
        done.wait_for(CameraState.LOST, "stream_ended")
    assert [frame.cause for frame in done.frames] == [None] * 30
    with three_sizes(playlist) as address, reading(rtsp(address, picture_size=[320, 240])) as done:
        done.wait_for(CameraState.LOST, "stream_ended")
    assert [frame.cause for frame in done.frames] == [None] * 10 + [Cause.FRAME_CORRUPT] * 20
    assert done.states == [(CameraState.STREAMING, ""), (CameraState.LOST, "stream_ended")]


def test_a_hung_read_is_killed_and_replaced(playlist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that hangs in its read is killed within its timeout, and the camera streams again from a new one."""
    monkeypatch.setattr(child, "GRACE_S", 0.5)
    with (
        simulation({"c1": playlist}, tmp_path, "--rate", "10", "--loop") as cameras,
        reading(rtsp(cameras.addresses["c1"], read_timeout_s=5.0)) as done,
    ):
        done.wait_for(CameraState.STREAMING)
        (hung,) = camera_processes()
        os.kill(hung, signal.SIGSTOP)
        done.wait_for(CameraState.LOST, "timeout")
        done.wait_for(CameraState.STREAMING)
        wait_until(lambda: hung not in camera_processes(), 30, "the hung process is gone")
        assert len(camera_processes()) == 1


@pytest.mark.parametrize("which", [camera_processes, lambda: [child.FORK_SERVER._process.pid]])
def test_a_killed_process_costs_the_camera_a_moment(
    playlist: Path, tmp_path: Path, which: Callable[[], list[int]]
) -> None:
    """The camera's process, or the one from which they are forked, ends by -9: LOST, then streaming again."""
    with (
        simulation({"c1": playlist}, tmp_path, "--rate", "10", "--loop") as cameras,
        reading(rtsp(cameras.addresses["c1"])) as done,
    ):
        done.wait_for(CameraState.STREAMING)
        before = camera_processes()
        os.kill(which()[0], signal.SIGKILL)
        done.wait_for(CameraState.LOST, "lost")
        done.wait_for(CameraState.STREAMING)
        assert not set(before) & set(camera_processes())


def test_camera_processes_end_with_the_worker(playlist: Path, tmp_path: Path) -> None:
    """A worker killed by -9 leaves no process behind, not even a stopped one."""
    program = (
        "import sys, time; from pipeline.cameras import RtspCamera; from pipeline.sources import open_source\n"
        "source = open_source(RtspCamera(id='c1', type='rtsp', product='tray', url=sys.argv[1])).__enter__()\n"
        "print('open', flush=True); time.sleep(600)"
    )
    with simulation({"c1": playlist}, tmp_path, "--rate", "10", "--loop") as cameras:
        command = [sys.executable, "-c", program, cameras.addresses["c1"]]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
            assert worker.stdout.readline() == "open\n"
            (server,) = children(worker.pid)
            (camera,) = children(server)
            os.kill(camera, signal.SIGSTOP)
            worker.kill()
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in (server, camera)), 30, "all have ended")


def test_no_camera_is_read_outside_of_its_networks(playlist: Path, tmp_path: Path) -> None:
    """An address outside is FAILED at once, a name that leads outside LOST; within, the same camera is read."""
    away, here = [ip_network("10.20.0.0/16")], [ip_network("127.0.0.0/8"), ip_network("::1/128")]
    with simulation({"c1": playlist}, tmp_path, "--rate", "10", "--loop") as cameras:
        url = cameras.addresses["c1"]
        with reading(rtsp(url), away) as done:
            done.wait_for(CameraState.FAILED, "address_refused")
        with reading(rtsp(url.replace("127.0.0.1", "localhost")), away) as done:
            done.wait_for(CameraState.LOST, "address_refused")
            assert done.frames == []
        with reading(rtsp(url), here) as done:
            done.wait_for_frames(3)


def test_no_picture_is_taken_from_where_a_camera_redirects_to(playlist: Path, tmp_path: Path) -> None:
    """A camera within the networks answers `302`; FFmpeg follows to one outside, and it is given up as refused."""
    with (
        simulation({"c1": playlist}, tmp_path, "--rate", "10", "--loop") as cameras,
        redirection("127.0.0.2", cameras.addresses["c1"]) as url,
    ):
        with reading(rtsp(url)) as done:
            done.wait_for_frames(1)
        with reading(rtsp(url), [ip_network("127.0.0.2/32")]) as done:
            done.wait_for(CameraState.LOST, "address_refused")
            assert done.frames == []


@contextmanager
def redirection(host: str, to: str) -> Iterator[str]:
    """A server that sends every RTSP client elsewhere; gives its address."""

    def answer(server: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client, _ = server.accept()
                with client:
                    sequence = re.search(rb"CSeq: *(\d+)", client.recv(4096))
                    number = sequence[1] if sequence else b"1"
                    client.sendall(
                        b"RTSP/1.0 302 Found\r\nCSeq: " + number + b"\r\nLocation: " + to.encode() + b"\r\n\r\n"
                    )

    with socket.create_server((host, 0)) as server:
        thread = threading.Thread(target=answer, args=(server,))
        thread.start()
        try:
            yield f"rtsp://{host}:{server.getsockname()[1]}/c1"
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join(10)
