"""Cameras as they fail, up to the verdict: what a MES reads of the parts of that time, and ops of the camera."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from integration.faults.proxy import Proxy
from line_process import LineProcess, received, wait_until
from simulated import pattern, plain_playlist, simulation, three_sizes

from pipeline.servers import Kafka
from pipeline.tail import VerdictReader

pytestmark = [pytest.mark.stack, pytest.mark.camera]
STATION = "here"


@pytest.fixture
def cable() -> Iterator[tuple[str, str, Proxy]]:
    """A camera without part ids: its own address, the one at the far end of its cable, and the cable."""
    with pattern("x264enc tune=zerolatency key-int-max=5 ! rtph264pay") as address:
        port = urlsplit(address).port
        assert port is not None
        proxy = Proxy(port)
        proxy.start()
        try:
            yield address, address.replace(f":{port}/", f":{proxy.port}/"), proxy
        finally:
            proxy.close()


def states(kafka: str, line: str) -> dict[str, list[tuple[str, str]]]:
    """The states of each camera of a line and their reasons, in order."""
    found: dict[str, list[tuple[str, str]]] = {}
    with VerdictReader(Kafka(bootstrap=[kafka]), topic="status.v1", start="first") as reader:
        events = [event for event in reader.read_to_end() if event["attributes"]["source"].endswith(f"/{line}")]
    for data in (event["data"] for event in events if "cameraId" in event["data"]):
        found.setdefault(data["cameraId"], []).append((data["state"], data["reason"]))
    return found


def first_losses(changes: list[tuple[str, str]]) -> list[str]:
    """The reason of each loss of a camera that streamed, without those of the attempts that follow."""
    return [after[1] for before, after in pairwise(changes) if (before[0], after[0]) == ("streaming", "lost")]


@pytest.mark.usefixtures("lenient")
def test_a_cut_cable_costs_the_parts_of_its_time_and_heals_by_itself(stack, line_file, products, send, cable):
    """Three cameras look at each part, two over a cable, one a decoder. It is cut in silence, then it resets.

    Silence is a `timeout`; of a reset FFmpeg says no more than that the stream has ended. A part that is triggered
    meanwhile is UNINSPECTED on time with the lost cameras' names, and has the view of the third, which never leaves;
    before, between and after it is OK.
    """
    kafka, (near, far, proxy) = stack.endpoints["kafka"], cable
    made = line_file(stack, budget_ms=3000)
    about = {"type": "rtsp", "product": products[0], "station": STATION, "retry_max_s": 1, "connect_timeout_s": 10}
    for url, decoder, silence_s in ((far, "ffmpeg", 4), (far, "gstreamer", 4), (near, "ffmpeg", 20)):
        made.camera(url=url, decoder=decoder, read_timeout_s=silence_s, **about)
    made.settings["stations"] = [{"name": STATION, "trigger": "message", "window_ms": 1000}]
    cut = ("cam-1", "cam-2")

    def wait_for(state: str) -> None:
        def reached() -> bool:
            found = states(kafka, made.name)
            cameras = (*cut, "cam-3") if state == "streaming" else cut
            return all(found.get(camera, [("", "")])[-1][0] == state for camera in cameras)

        wait_until(reached, 60, f"cameras {state}")

    with LineProcess(made.write()) as line:
        for number, fault in enumerate((proxy.half_open, proxy.reset)):
            wait_for("streaming")
            send(made.name, f"whole-{number}")
            received(kafka, made.name, at_least=2 * number + 1, timeout_s=30)
            fault()
            wait_for("lost")
            time.sleep(1.2)  # their last pictures are now of no later trigger
            send(made.name, f"cut-{number}")
            received(kafka, made.name, at_least=2 * number + 2, timeout_s=30)
            proxy.heal()
        wait_for("streaming")
        send(made.name, "whole-2")
        received(kafka, made.name, at_least=5, timeout_s=30)
        line.stop()
    verdicts = received(kafka, made.name)
    found = states(kafka, made.name)
    assert [first_losses(found[camera]) for camera in cut] == [["timeout", "stream_ended"], ["timeout", "lost"]]
    assert found["cam-3"] == [("streaming", "")]
    assert (verdicts.parts, verdicts.duplicates) == (["whole-0", "cut-0", "whole-1", "cut-1", "whole-2"], 0)
    for data in (event["data"] for event in verdicts.events):
        part_id = data["partId"]
        lost = cut if part_id.startswith("cut") else ()
        said = ("UNINSPECTED", ["camera_lost"]) if lost else ("OK", [])
        assert (data["verdict"], data["reasonCodes"]) == said, part_id
        assert data["missingViews"] == [{"cameraId": name, "required": True, "cause": "camera_lost"} for name in lost]
        assert [view["verdict"] for view in data["views"]] == ["OK"] * (3 - len(lost))
        assert data["timing"]["decidedMs"] < 8000


@dataclass(frozen=True)
class Failing:
    """Cameras that fail, by their settings; and one that is off: what it is to play, and its port."""

    cameras: dict[str, dict[str, Any]]
    playlist: Path
    port: int


@pytest.fixture
def failing(tmp_path: Path) -> Iterator[Failing]:
    """Servers and addresses of six cameras, each of which fails in its own way."""
    for name, colours in (("some", range(5)), ("frozen", [1, 2, *[3] * 58])):
        (tmp_path / name).mkdir()
        plain_playlist(tmp_path / name, colours)
    some, frozen = tmp_path / "some/list.json", tmp_path / "frozen/list.json"
    (tmp_path / "word").write_text("4712\n")
    with socket.create_server(("127.0.0.1", 0)) as off:
        port = off.getsockname()[1]
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        simulation({"c1": some}, tmp_path / "some", "--user", "line", "--password", "4711") as refusing,
        simulation({"c1": frozen}, tmp_path / "frozen", "--rate", "5", "--loop") as freezing,
        three_sizes(some) as changing,
    ):
        login = {"user": "line", "password_file": str(tmp_path / "word")}
        mute = f"rtsp://127.0.0.1:{silent.getsockname()[1]}/c1"
        cameras = {
            "silent": {"url": mute, "connect_timeout_s": 1, "station": STATION},
            "refused": {"url": refusing.addresses["c1"], **login, "station": STATION},
            "none": {"url": "rtsp://127.0.0.1:9/c1", "station": STATION},
            "frozen": {"url": freezing.addresses["c1"], "frozen_after_s": 0.8},
            "sized": {"url": changing, "picture_size": [320, 240]},
            "off": {"url": f"rtsp://127.0.0.1:{port}/c1"},
        }
        yield Failing(cameras, some, port)


def test_each_way_to_fail_has_its_reason_and_its_verdict(stack, line_file, products, send, failing, tmp_path):
    """One camera accepts the connection and is silent, one refuses the password, one is nowhere: the part that triggers
    them is UNINSPECTED at its deadline with their names. One freezes: its part is `camera_lost`. One changes its
    picture's size: those parts are `frame_corrupt`. One is off at the start: once it is on its parts are judged,
    from the first.
    """
    kafka, made = stack.endpoints["kafka"], line_file(stack, budget_ms=6000)
    for name, settings in failing.cameras.items():
        about = {"type": "rtsp", "product": products[0], "station": name, "overflow": "wait", "retry_max_s": 1}
        made.camera(id=name, **about | settings)
    made.settings["stations"] = [{"name": STATION, "trigger": "message"}]

    def lost(camera: str) -> set[str]:
        return {reason for state, reason in states(kafka, made.name).get(camera, []) if state == "lost"}

    with LineProcess(made.write()) as line:
        wait_until(lambda: all(map(lost, ("off", "silent", "refused", "none"))), 60, "four lost cameras")
        send(made.name, "part-1")
        with simulation({"c1": failing.playlist}, tmp_path, "--rate", "5", "--port", str(failing.port)):
            wait_until(lambda: lost("frozen") and lost("sized") and len(lost("off")) > 1, 60, "the others lost")
            wait_until(lambda: verdicts_of(kafka, made.name).keys() >= {STATION, "off"}, 60, "the triggered part")
        line.stop()
    found, told = states(kafka, made.name), verdicts_of(kafka, made.name)
    away = {"silent": "timeout", "refused": "auth_failed", "none": "unreachable"}
    assert {name: found[name][0] for name in away} == {name: ("lost", reason) for name, reason in away.items()}
    (part,) = told[STATION]
    assert (part["partId"], part["verdict"], part["reasonCodes"]) == ("part-1", "UNINSPECTED", ["camera_lost"])
    assert part["missingViews"] == [{"cameraId": name, "required": True, "cause": "camera_lost"} for name in away]
    assert 6000 <= part["timing"]["decidedMs"] < 11_000
    assert found["frozen"][:2] == [("streaming", ""), ("lost", "frozen_picture")]
    judged = list(takewhile(is_judged, told["frozen"]))
    assert [part["partId"] for part in judged] == [f"p{number}" for number in range(len(judged))]
    assert len(judged) > 2
    assert told["frozen"][len(judged)]["reasonCodes"] == ["camera_lost"]
    assert [part["partId"] for part in told["sized"]] == [f"p{number}" for number in range(5)] * 3
    assert [is_judged(part) for part in told["sized"]] == [True] * 5 + [False] * 10
    assert {part["reasonCodes"][0] for part in told["sized"][5:]} == {"frame_corrupt"}
    assert found["off"][:2] == [("lost", "unreachable"), ("streaming", "")]
    assert [(part["partId"], is_judged(part)) for part in told["off"]] == [(f"p{number}", True) for number in range(5)]


def is_judged(part: dict[str, Any]) -> bool:
    return part["verdict"] != "UNINSPECTED"


def verdicts_of(kafka: str, line: str) -> dict[str, list[dict[str, Any]]]:
    """What was told of each part, by station, in order."""
    told: dict[str, list[dict[str, Any]]] = {}
    for data in (event["data"] for event in received(kafka, line).events):
        told.setdefault(data["station"], []).append(data)
    return told
