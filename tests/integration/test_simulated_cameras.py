"""The simulated cameras as a client sees them: a real RTSP server, read with the line's own decoder library."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from simulated import SIMULATE, simulation

PART_ID = uuid.UUID("d4616770-2d24-58ba-ac16-6665a1d7737b")
PICTURES = 23
SIZE = (320, 240)  # of the simulated cameras, unless they are told otherwise
# Bytes that H.264 must escape, and a letter outside ASCII.
ODD_TEXT = "é\0\0\1\0\0\0x"

pytestmark = pytest.mark.camera


@pytest.fixture(scope="module")
def playlists(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two cameras' pictures: smooth colours, so that H.264 keeps them nearly as they are."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    playlists = {}
    for camera in ("left", "right"):
        entries = []
        for number in range(PICTURES):
            coarse = generator.integers(30, 220, (4, 5, 3), dtype=np.uint8)
            cv2.imwrite(str(folder / f"{camera}{number}.png"), cv2.resize(coarse, SIZE, interpolation=cv2.INTER_CUBIC))
            entries.append({"path": f"{camera}{number}.png", "part_id": f"{camera}-{number}-{ODD_TEXT}"})
        playlists[camera] = folder / f"{camera}.json"
        playlists[camera].write_text(json.dumps(entries))
    return playlists


def read(address: str, most: int | None = None) -> tuple[list[str], list[np.ndarray]]:
    """The part ids and pictures (HWC RGB) that a client sees until the end, or until it has seen so many frames."""
    part_ids, pictures = [], []
    options = {"rtsp_transport": "tcp", "fpsprobesize": "0", "analyzeduration": "1"}
    with av.open(address, options=options, timeout=(5.0, 2.0)) as container:
        for frame in container.decode(video=0):
            messages = [bytes(data) for data in frame.side_data if data.type.name == "SEI_UNREGISTERED"]
            part_ids += [text[16:].decode() for text in messages if text[:16] == PART_ID.bytes]
            pictures.append(frame.to_ndarray(format="rgb24"))
            if len(pictures) == most:
                break
    return part_ids, pictures


def test_every_frame_arrives_in_order_with_its_part_id(playlists: dict[str, Path], tmp_path: Path) -> None:
    """From the very first picture to the very last, and the picture is the one the playlist names."""
    with simulation(playlists, tmp_path, "--rate", "20") as cameras:
        for name, path in playlists.items():
            part_ids, pictures = read(cameras.addresses[name])
            assert part_ids == [f"{name}-{number}-{ODD_TEXT}" for number in range(PICTURES)]
            assert len(pictures) == PICTURES
            for number in (0, PICTURES - 1):
                original = cv2.imread(str(path.parent / f"{name}{number}.png"))[..., ::-1]
                assert np.abs(pictures[number].astype(int) - original).mean() < 4
            assert cameras.process.poll() is None or name == "right"
        assert cameras.sent("right") == part_ids
        assert cameras.process.returncode == 0


def test_frames_are_paced_in_real_time(playlists: dict[str, Path], tmp_path: Path) -> None:
    """23 frames at 20 a second take 1.1 s: neither a burst nor a stall."""
    with simulation({"left": playlists["left"]}, tmp_path, "--rate", "20") as cameras:
        start = time.monotonic()
        read(cameras.addresses["left"])
        assert 1.0 < time.monotonic() - start < 4.0


def test_laps_have_part_ids_of_their_own(playlists: dict[str, Path], tmp_path: Path) -> None:
    """2 s at 25 frames a second of a 23-picture playlist: 50 different parts, counted as sent."""
    with simulation({"left": playlists["left"]}, tmp_path, "--rate", "25", "--loop", "--seconds", "2") as cameras:
        part_ids, _ = read(cameras.addresses["left"])
        assert len(part_ids) == len(set(part_ids)) == 50
        assert part_ids[PICTURES] == f"left-0-{ODD_TEXT}~2"
        assert cameras.sent("left") == part_ids


def test_a_client_that_comes_back_goes_on_at_a_keyframe(playlists: dict[str, Path], tmp_path: Path) -> None:
    """A camera does not start over for a new connection: no part id is sent twice."""
    with simulation({"left": playlists["left"]}, tmp_path, "--rate", "10") as cameras:
        first, _ = read(cameras.addresses["left"], most=4)
        second, _ = read(cameras.addresses["left"])
    assert first == [f"left-{number}-{ODD_TEXT}" for number in range(4)]
    assert second[-1] == f"left-{PICTURES - 1}-{ODD_TEXT}"
    assert second[0] in (f"left-10-{ODD_TEXT}", f"left-20-{ODD_TEXT}")


def test_a_camera_with_a_password_refuses_others(playlists: dict[str, Path], tmp_path: Path) -> None:
    """Basic authentication: without it 401, with it pictures."""
    options = ("--rate", "20", "--user", "line", "--password", "4711")
    with simulation({"left": playlists["left"]}, tmp_path, *options) as cameras:
        address = cameras.addresses["left"]
        with pytest.raises(av.HTTPUnauthorizedError):
            read(address)
        part_ids, _ = read(address.replace("rtsp://", "rtsp://line:4711@"), most=3)
        assert len(part_ids) == 3


def test_a_stalled_camera_stays_connected_and_silent(playlists: dict[str, Path], tmp_path: Path) -> None:
    """The fault that only a timeout finds: the client gets six frames and then nothing, not even an end."""
    with simulation({"left": playlists["left"]}, tmp_path, "--rate", "20", "--stall-after", "6") as cameras:
        with pytest.raises(av.FFmpegError):
            read(cameras.addresses["left"])
        cameras.process.terminate()
        assert cameras.sent("left") == [f"left-{number}-{ODD_TEXT}" for number in range(6)]


def test_cameras_end_with_the_process_that_started_them(playlists: dict[str, Path]) -> None:
    """A killed demo or test leaves no server behind."""
    command = [sys.executable, str(SIMULATE), "--size", "320x240", "--camera", f"left={playlists['left']}"]
    starter = "import subprocess, sys, time; subprocess.Popen(sys.argv[1:]); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", starter, *command], stdout=subprocess.PIPE, text=True) as parent:
        pid = json.loads(parent.stdout.readline())["pid"]
        assert Path(f"/proc/{pid}").exists()
        parent.kill()
    deadline = time.monotonic() + 5
    while _is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_alive(pid)


def test_ctrl_c_ends_them(playlists: dict[str, Path], tmp_path: Path) -> None:
    """SIGINT: the report is written, and the exit is a clean one."""
    with simulation({"left": playlists["left"]}, tmp_path) as cameras:
        os.kill(cameras.process.pid, signal.SIGINT)
        assert cameras.sent("left") == []
        assert cameras.process.returncode == 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", "is empty"),
        ('{"path": "a.png"}', "must be a JSON list"),
        ('[{"path": "nowhere.png", "part_id": "1"}]', "nowhere.png' cannot be read"),
    ],
)
def test_a_bad_playlist_is_named(tmp_path: Path, content: str, words: str) -> None:
    """Exit code 3, one line, the file's name in it."""
    path = tmp_path / "list.json"
    path.write_text(content)
    done = subprocess.run(
        [sys.executable, str(SIMULATE), "--camera", f"c={path}"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 3
    assert str(tmp_path) in done.stderr
    assert words in done.stderr


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
