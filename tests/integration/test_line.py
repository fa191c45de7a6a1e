"""The line against the real Triton, Kafka and Redis: what goes in comes out once, in order, whatever happens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest
import redis
from line_process import LineProcess, children, received, stopped, wait_until

pytestmark = pytest.mark.stack
MODELS = Path(__file__).resolve().parents[2] / "models_repo"


def write_pictures(folder: Path, count: int, seed: int = 0) -> Path:
    """Write soft random pictures of 640 x 480 as PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        grain = rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"part-{number:04d}.png"), cv2.resize(grain, (640, 480)))
    return folder


def two_live_cameras(made, pictures: Path, product: str, *, rate: float):
    """Add two cameras that give up their oldest frame for a new one; gives the line file."""
    path = str(write_pictures(pictures, 10))
    for _ in range(2):
        about = {"loop": True, "overflow": "drop_oldest", "queue_frames": 4}
        made.camera(type="folder", path=path, product=product, rate=rate, **about)
    return made


def is_judged(event: dict) -> bool:
    return event["data"]["verdict"] != "UNINSPECTED"


def wait_until_judged_again(kafka: str, line: str) -> None:
    wait_until(lambda: is_judged(received(kafka, line).events[-1]), 60, "a part that is judged again")


def logicrd(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a user would."""
    command = [sys.executable, "-m", "pipeline.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_every_picture_of_two_folders_gets_one_verdict_in_order(stack, line_file, products, tmp_path):
    """Two products at once: as many verdicts as pictures, none twice, in sequence per key; and a log line each."""
    made = line_file(stack, monitoring={"log_parts": True})
    for number, product in enumerate(products[:2]):
        pictures = write_pictures(tmp_path / product, 20, number)
        made.camera(type="folder", path=str(pictures), product=product, station=product)
    with LineProcess(made.write()) as line:
        summary = line.wait()
    assert line.exit_code == 0
    assert (summary["triggered"], summary["acknowledged"], summary["undelivered"]) == (40, 40, 0)
    verdicts = received(stack.endpoints["kafka"], made.name, at_least=40)
    assert (len(verdicts.events), verdicts.duplicates) == (40, 0)
    assert verdicts.in_order()
    assert verdicts.causes == {}
    data = verdicts.events[0]["data"]
    assert data["model"]["name"] in products
    assert data["views"][0]["scores"]["fused"] is not None
    lines = [line for line in map(json.loads, line.log().splitlines()) if line["event"] == "part"]
    assert {line["inspectionId"]: line["verdict"] for line in lines} == {
        event["attributes"]["id"]: event["data"]["verdict"] for event in verdicts.events
    }
    assert len(lines) == 40


def test_a_new_threshold_holds_for_the_next_frames(stack, line_file, products, tmp_path):
    """`thresholds set` while the line runs: later verdicts carry the new version and follow the new limit."""
    made = line_file(stack)
    pictures = write_pictures(tmp_path / "pictures", 30)
    made.camera(type="folder", path=str(pictures), product=products[0], rate=6, loop=True)
    path = str(made.write())
    with LineProcess(Path(path)) as line:
        wait_until(lambda: received(stack.endpoints["kafka"], made.name).events, 30, "first verdict")
        answer = logicrd("thresholds", "set", products[0], "--ng", "1e9", "--reason", "a trial", "-c", path, "--json")
        assert answer.returncode == 0, answer.stderr
        version = int(json.loads(answer.stdout)["after"]["version"])
        time.sleep(2)
        line.stop()
    events = [event["data"] for event in received(stack.endpoints["kafka"], made.name).events]
    versions = [data["threshold"]["version"] for data in events]
    assert versions[-1] == version
    assert versions == sorted(versions)
    after = [data for data in events if data["threshold"]["version"] == version]
    assert {data["threshold"]["source"] for data in after} == {"redis"}
    assert {data["verdict"] for data in after} == {"OK"}
    history = logicrd("thresholds", "history", products[0], "-c", path, "--json")
    assert json.loads(history.stdout)[0]["reason"] == "a trial"
    redis.Redis.from_url(stack.endpoints["redis"]).delete(f"logicrd:threshold:{products[0]}")


def test_thresholds_are_compared_and_set_on_their_version(stack, line_file, products, tmp_path):
    """A second engineer who still looks at the old version is refused with exit code 5; nonsense with 3."""
    made = line_file(stack).camera(type="folder", path=str(tmp_path), product=products[0])
    path = str(made.write())
    first = logicrd("thresholds", "set", products[0], "--ng", "5", "-c", path, "--json")
    version = json.loads(first.stdout)["after"]["version"]
    stale = logicrd("thresholds", "set", products[0], "--ng", "6", "--version", str(int(version) - 1), "-c", path)
    assert (stale.returncode, "is at version" in stale.stderr) == (5, True)
    for limits in (["--ng", "nan"], ["--ng", "1", "--review", "2"]):
        assert logicrd("thresholds", "set", products[0], *limits, "-c", path).returncode == 3
    redis.Redis.from_url(stack.endpoints["redis"]).delete(f"logicrd:threshold:{products[0]}")


@pytest.mark.parametrize(
    "fields",
    [
        {"ng": "nan", "review": "1", "version": "3"},
        {"ng": "high", "review": "1", "version": "3"},
        {"ng": "1", "review": "2", "version": "3"},
        {"ng": "1", "review": "1", "version": "3", "model_sha256": "0" * 64},
    ],
    ids=["nan", "text", "review above ng", "another model"],
)
def test_a_threshold_that_cannot_be_used_is_not_used(fields, stack, line_file, products, tmp_path):
    """What somebody wrote into Redis by hand and makes no sense gives way to the manifest's suggestion."""
    server = redis.Redis.from_url(stack.endpoints["redis"])
    key = f"logicrd:threshold:{products[0]}"
    server.delete(key)
    server.hset(key, mapping=fields)
    made = line_file(stack)
    made.camera(type="folder", path=str(write_pictures(tmp_path / "p", 3)), product=products[0])
    try:
        with LineProcess(made.write()) as line:
            line.wait()
    finally:
        server.delete(key)
    verdicts = received(stack.endpoints["kafka"], made.name, at_least=3)
    assert {event["data"]["threshold"]["source"] for event in verdicts.events} == {"manifest"}


def test_a_hung_triton_fills_bounded_queues_and_ends_in_counted_verdicts(stack, line_file, products, tmp_path):
    """Triton stands still for 4 s: parts become UNINSPECTED in time, memory does not grow, and the line recovers."""
    made = two_live_cameras(line_file(stack, budget_ms=1000), tmp_path / "p", products[0], rate=10)
    with LineProcess(made.write()) as line:
        wait_until(lambda: len(received(stack.endpoints["kafka"], made.name).events) > 10, 30, "a running line")
        before = line.memory_mb()
        with stopped(stack.pid("triton")):
            time.sleep(4)
        grown = line.memory_mb() - before
        wait_until_judged_again(stack.endpoints["kafka"], made.name)
        summary = line.stop()
    verdicts = received(stack.endpoints["kafka"], made.name, at_least=summary["triggered"])
    assert (len(verdicts.events), verdicts.duplicates, verdicts.in_order()) == (summary["triggered"], 0, True)
    assert set(verdicts.causes) <= {"queue_full", "deadline", "triton_unavailable"}
    assert verdicts.causes["queue_full"] > 0
    assert max(event["data"]["timing"]["decidedMs"] for event in verdicts.events) < 1500
    assert grown < 40


@contextmanager
def slowed(pid: int, share: float) -> Iterator[None]:
    """Let a process and its children run for a share of the time only, as a machine that is too slow."""
    pids, done = (pid, *children(pid)), threading.Event()

    def hold() -> None:
        while not done.wait(0.1 * share):
            with stopped(*pids):
                time.sleep(0.1 * (1 - share))

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def test_a_triton_that_is_too_slow_judges_what_it_can(stack, line_file, products, tmp_path):
    """More frames come than it can judge in time: some are judged all the same, each late one has its verdict in time,
    and afterwards all are judged again."""
    kafka = stack.endpoints["kafka"]
    made = two_live_cameras(line_file(stack, budget_ms=1000), tmp_path / "p", products[0], rate=12)
    with LineProcess(made.write()) as line:
        wait_until(lambda: any(map(is_judged, received(kafka, made.name).events)), 30, "a part that is judged")
        with slowed(stack.pid("triton"), 0.15):
            time.sleep(4)  # until the calls of before are over
            before = len(received(kafka, made.name).events)
            time.sleep(10)
            during = received(kafka, made.name).events[before:]
        wait_until_judged_again(kafka, made.name)
        line.stop()
    assert len(during) > 80
    assert sum(map(is_judged, during)) >= 5
    assert max(event["data"]["timing"]["decidedMs"] for event in during) < 1500


def test_a_killed_python_backend_is_restarted_and_costs_named_verdicts(stack, line_file, products, tmp_path):
    """The stub of the Mahalanobis model dies: `triton_unavailable`, then a restarted server and scores again."""
    made = line_file(stack, budget_ms=2000)
    pictures = str(write_pictures(tmp_path / "p", 10))
    made.camera(type="folder", path=pictures, product=products[0], rate=5, loop=True, overflow="drop_oldest")
    with LineProcess(made.write()) as line:
        wait_until(lambda: len(received(stack.endpoints["kafka"], made.name).events) > 3, 30, "a running line")
        found = subprocess.run(
            ["pgrep", "-P", str(stack.pid("triton")), "-f", f"{products[0]}.mahalanobis"],
            capture_output=True,
            text=True,
            check=False,
        )
        old_server = stack.pid("triton")
        os.kill(int(found.stdout.split()[0]), signal.SIGKILL)
        wait_until(lambda: stack.pid("triton") != old_server, 60, "a restarted server")
        wait_until(lambda: stack.state()["components"]["triton"]["state"] == "ready", 60, "a ready server")
        wait_until_judged_again(stack.endpoints["kafka"], made.name)
        summary = line.stop()
    verdicts = received(stack.endpoints["kafka"], made.name, at_least=summary["triggered"])
    assert (len(verdicts.events), verdicts.duplicates, verdicts.in_order()) == (summary["triggered"], 0, True)
    assert verdicts.causes["triton_unavailable"] > 0


def test_verdicts_outlive_a_hung_broker(stack, line_file, products, tmp_path):
    """Kafka stands still for 5 s: the line goes on, and every verdict arrives, in order, once."""
    made = line_file(stack)
    pictures = str(write_pictures(tmp_path / "p", 10))
    made.camera(type="folder", path=pictures, product=products[0], rate=8, loop=True)
    with LineProcess(made.write(), "--seconds", "12") as line:
        wait_until(lambda: len(received(stack.endpoints["kafka"], made.name).events) > 3, 30, "a running line")
        with stopped(stack.pid("kafka")):
            time.sleep(5)
        summary = line.wait()
    assert (line.exit_code, summary["undelivered"]) == (0, 0)
    verdicts = received(stack.endpoints["kafka"], made.name, at_least=summary["triggered"])
    assert (len(verdicts.events), verdicts.duplicates, verdicts.in_order()) == (summary["triggered"], 0, True)


def test_thresholds_outlive_redis(make_stack, stack, line_file, products, tmp_path):
    """Redis goes away: the last known good limits hold and say so; with a snapshot the line even starts."""
    own = make_stack("--only", "redis")
    made = line_file(
        stack, redis={"url": own.endpoints["redis"], "snapshot": str(tmp_path / "limits.json"), "refresh_s": 1}
    )
    made.camera(type="folder", path=str(write_pictures(tmp_path / "p", 10)), product=products[0], rate=5, loop=True)
    path = made.write()

    def thresholds() -> list[dict]:
        return [event["data"]["threshold"] for event in received(stack.endpoints["kafka"], made.name).events]

    assert logicrd("thresholds", "set", products[0], "--ng", "77", "-c", str(path)).returncode == 0
    with LineProcess(path) as line:
        wait_until(lambda: received(stack.endpoints["kafka"], made.name).events, 30, "first verdict")
        with stopped(own.pid("redis")):
            wait_until(lambda: thresholds()[-1]["source"] == "cache", 60, "limits of before")
            line.stop()
            with LineProcess(path) as again:
                wait_until(lambda: thresholds()[-1]["source"] == "file", 60, "limits of the snapshot")
                again.stop()
    assert {threshold["ng"] for threshold in thresholds()} == {77.0}
    assert list(dict.fromkeys(threshold["source"] for threshold in thresholds())) == ["redis", "cache", "file"]


def test_bad_pictures_are_named_and_uninspected(stack, line_file, products, tmp_path):
    """A cut JPEG, a cut PNG, an empty file and a picture bomb among good ones: each its own verdict."""
    folder = write_pictures(tmp_path / "p", 3)
    good = (folder / "part-0000.png").read_bytes()
    encoded = cv2.imencode(".jpg", cv2.imread(str(folder / "part-0001.png")))[1].tobytes()
    (folder / "cut.jpg").write_bytes(encoded[: len(encoded) // 2])
    (folder / "cut.png").write_bytes(good[: len(good) // 2])
    (folder / "empty.png").write_bytes(b"")
    bomb = bytearray(good)
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    (folder / "bomb.png").write_bytes(bytes(bomb))
    made = line_file(stack).camera(type="folder", path=str(folder), product=products[0])
    with LineProcess(made.write()) as line:
        line.wait()
        said = line.log()
    verdicts = received(stack.endpoints["kafka"], made.name, at_least=7)
    uninspected = {event["data"]["partId"] for event in verdicts.events if event["data"]["verdict"] == "UNINSPECTED"}
    assert uninspected == {"cut.jpg", "cut.png", "empty.png", "bomb.png"}
    assert verdicts.causes == {"frame_corrupt": 4}
    assert all(name in said for name in ("cut.jpg", "cut.png", "empty.png", "bomb.png"))


def test_a_camera_that_cannot_be_reached_leaves_the_others_alone(stack, line_file, products, tmp_path):
    """One camera's address is dead: one line says so with what to do, and the other camera's parts are judged."""
    made = line_file(stack)
    made.camera(type="rtsp", url="rtsp://127.0.0.1:9/none", product=products[0], connect_timeout_s=1)
    made.camera(type="folder", path=str(write_pictures(tmp_path / "p", 6)), product=products[0])
    with LineProcess(made.write(), "--no-until-end") as line:
        wait_until(
            lambda: all(words in line.log() for words in ("camera lost", "camera ended")), 60, "both cameras' ends"
        )
        received(stack.endpoints["kafka"], made.name, at_least=6)
        summary = line.stop()
        said = line.log()
    states = {camera["camera_id"]: (camera["state"], camera["reason"]) for camera in summary["cameras"]}
    assert states == {"cam-1": ("lost", "unreachable"), "cam-2": ("ended", "")}
    assert summary["acknowledged"] == 6
    assert said.count("camera lost") == 1


@pytest.mark.parametrize(
    ("server", "code", "told"),
    [
        ({"triton": {"address": "127.0.0.1:9"}}, 4, "Triton at 127.0.0.1:9"),
        ({"kafka": {"bootstrap": ["127.0.0.1:9"]}}, 4, "Kafka at 127.0.0.1:9"),
        ({"redis": {"url": "redis://127.0.0.1:9/0"}}, 4, "Redis at redis://127.0.0.1:9/0"),
        ({"kafka": {"topic_prefix": "nowhere"}}, 4, "topic nowhere.verdict.v1"),
    ],
    ids=["triton", "kafka", "redis", "topic"],
)
def test_what_is_down_at_start_is_named_with_exit_code_4(server, code, told, stack, line_file, products, tmp_path):
    """The line does not start half: the message names the server and what to do."""
    if "bootstrap" in server.get("kafka", {}) or "triton" in server:  # nobody is there
        server = {key: {**value, "startup_timeout_s": 2} for key, value in server.items()}
    made = line_file(stack, **server).camera(type="folder", path=str(tmp_path), product=products[0])
    for command in ("run", "check"):
        answer = logicrd(command, "-c", str(made.write()))
        assert (answer.returncode, told in answer.stderr, "hint:" in answer.stderr) == (code, True, True), answer.stderr


def test_a_model_with_another_signature_is_refused_with_exit_code_5(stack, line_file, products, tmp_path):
    """The manifest says 128 x 128, Triton serves 256 x 256: refused by name before a camera is opened."""
    made = line_file(stack, triton={"models_repo": str(tmp_path)})
    manifest = json.loads((MODELS / products[0] / "manifest.json").read_text())
    manifest["input"]["height"] = 128
    (tmp_path / products[0]).mkdir()
    (tmp_path / products[0] / "manifest.json").write_text(json.dumps(manifest))
    made.camera(type="folder", path=str(tmp_path), product=products[0])
    answer = logicrd("run", "-c", str(made.write()))
    assert answer.returncode == 5
    assert "input image is UINT8 [256, 256, 3], not UINT8 [128, 256, 3]" in answer.stderr


def test_a_product_that_nobody_serves_is_refused(stack, line_file, products, tmp_path):
    """A name that the repository lacks is exit code 3 with the names it has."""
    made = line_file(stack).camera(type="folder", path=str(tmp_path), product="no-such-part")
    answer = logicrd("run", "-c", str(made.write()))
    assert (answer.returncode, products[0] in answer.stderr) == (3, True)


def test_tail_filters_by_station_and_verdict(stack, line_file, products, tmp_path):
    """`verdicts tail --json` prints one document a line, and only what was asked for."""
    made = line_file(stack)
    made.camera(type="folder", path=str(write_pictures(tmp_path / "a", 3)), product=products[0], station="here")
    made.camera(type="folder", path=str(write_pictures(tmp_path / "b", 3)), product=products[0], station="there")
    path = str(made.write())
    with LineProcess(Path(path)) as line:
        line.wait()
    tail = ("verdicts", "tail", "-c", path, "--from-start", "--idle", "1", "--json", "--station")
    shown = [json.loads(text) for text in logicrd(*tail, "there").stdout.splitlines()]
    assert [event["key"] for event in shown if event["key"].startswith(made.name)] == [f"{made.name}/there"] * 3
    assert logicrd(*tail, "there", "--verdict", "maybe").returncode == 2
