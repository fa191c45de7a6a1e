"""Workers that share the cameras of a pool, against the real broker: what is read is read by one of them, always."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from kafka import KafkaProducer
from line_process import LineProcess, received, wait_until
from simulated import simulation

from pipeline.errors import DependencyError
from pipeline.pool import SESSION_S
from pipeline.servers import Kafka
from pipeline.tail import VerdictReader

pytestmark = pytest.mark.stack
MODELS = Path(__file__).resolve().parents[2] / "models_repo"


@pytest.fixture
def pool(stack, line_file, products, tmp_path):
    """An empty pool named after the test, the files of two workers and of one in another pool, a folder of pictures."""
    made = Pool(stack.endpoints["kafka"], products[0], tmp_path, line_file)
    for worker, name in (("a", made.name), ("b", made.name), ("other", made.other)):
        (tmp_path / worker).mkdir()
        made.files[worker] = replace(line_file(stack, pool={"name": name, "capacity": 40}), folder=tmp_path / worker)
    yield made
    made.apply([], "--prune")


class Pool:
    """What a test does to the pool, and what the world sees of it."""

    def __init__(self, kafka, product, folder, line_file):
        self.kafka, self.product, self.folder = kafka, product, folder
        self.name = line_file(None).name
        self.other = f"{self.name[:50]}-other"
        self.files: dict[str, Any] = {}
        self.pictures = folder / "pictures"
        self.pictures.mkdir()
        grain = np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8)
        for number in range(3):
            cv2.imwrite(str(self.pictures / f"{number}.png"), cv2.resize(grain, (320, 240)))

    def camera(self, number, **keys):
        """A camera that gives a picture at once and then one every five seconds; each is a station of its own."""
        block = {
            "id": f"{self.name}.{number:02}",
            "type": "folder",
            "path": str(self.pictures),
            "loop": True,
            "rate": 0.2,
        }
        rest = {"product": self.product, "station": f"s{number}", "overflow": "drop_oldest", "pool": self.name}
        return block | rest | keys

    def apply(self, cameras, *options):
        """`logicrd cameras apply`; gives the changes."""
        path = self.folder / "cameras.yaml"
        path.write_text(yaml.safe_dump(cameras))
        return self._command("apply", str(path), *options)["changes"]

    def listed(self):
        """`logicrd cameras list`, as a worker of the first pool asks: by camera."""
        return {row["id"]: row for row in self._command("list")}

    def _command(self, *words):
        line = self.files["a"].write()
        command = [sys.executable, "-m", "pipeline.cli", "cameras", *words, "-c", str(line), "--json"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert answer.returncode == 0, answer.stderr
        return json.loads(answer.stdout)

    def worker(self, name):
        return LineProcess(self.files[name].write())

    def states(self):
        """The last status event of each camera of this pool: state, reason, worker and time."""
        last = {}
        with VerdictReader(Kafka(bootstrap=[self.kafka]), topic="status.v1", start="first") as reader:
            for event in reader.read_to_end():
                if (event["key"] or "").startswith(self.name):
                    data = event["data"]
                    at = datetime.fromisoformat(event["attributes"]["time"]).timestamp()
                    last[event["key"]] = (data["state"], data["reason"], data["worker"], at)
        return last

    def readers(self):
        """Which worker reads which camera, by the status events."""
        return {camera: state[2] for camera, state in self.states().items() if state[0] == "streaming"}

    def verdicts(self):
        return [event["data"] for event in received(self.kafka, self.name).events]

    def verdicts_if_any(self):
        """The same; none from a broker that has just come back and does not know itself yet."""
        try:
            return self.verdicts()
        except DependencyError:
            return []


def camera_of(data):
    return data["views"][0]["cameraId"]


def test_thirty_cameras_outlive_a_worker_that_is_killed(pool):
    """Two workers share 30 cameras; one is killed with -9, within 15 s the other reads all, under a higher epoch.

    Then all are removed while it runs, and each part that it took has its verdict.
    """
    cameras = [pool.camera(number) for number in range(30)]
    assert [change["change"] for change in pool.apply(cameras)] == ["added"] * 30
    with pool.worker("a") as first, pool.worker("b") as second:
        wait_until(lambda: len(pool.readers()) == 30, 60, "all cameras read")
        wait_until(lambda: _shares(pool) == [14, 16] or _shares(pool) == [15, 15], 60, "both workers share them")
        before = pool.readers()
        wait_until(lambda: before.items() <= _pairs(pool), 60, "verdicts of all, each by its present reader")
        os.kill(first.pid, signal.SIGKILL)
        killed_at = time.time()
        wait_until(lambda: len(set(pool.readers().values())) == 1, 40, "the other worker reads all")
        after = pool.states()
        (survivor,) = set(pool.readers().values())
        moved = [camera for camera, worker in before.items() if worker != survivor]
        assert len(moved) >= 14
        assert max(after[camera][3] for camera in moved) - killed_at < 15
        wait_until(lambda: _judged_by(pool, survivor) == set(before), 60, "its verdicts of all")
        assert [change["change"] for change in pool.apply([], "--prune")] == ["removed"] * 30
        wait_until(lambda: {state[:2] for state in pool.states().values()} == {("ended", "removed")}, 30, "none read")
        summary = second.stop()
        first.wait()
    assert second.exit_code == 0
    assert summary["cameras"] == []
    judged = [data for data in pool.verdicts() if data["worker"] == survivor]
    assert summary["triggered"] == summary["judged"] == summary["acknowledged"] == len(judged)
    for camera in moved:
        epochs = {data["worker"]: data["epoch"] for data in pool.verdicts() if camera_of(data) == camera}
        assert epochs.pop(survivor) > max(epochs.values())


def _shares(pool):
    workers = list(pool.readers().values())
    return sorted(workers.count(worker) for worker in set(workers))


def _are_shared(pool, cameras):
    shares = _shares(pool)
    return len(shares) == 2 and sum(shares) == cameras


def _judged_by(pool, worker):
    return {camera for camera, judge in _pairs(pool) if judge == worker}


def _pairs(pool):
    """Which camera was judged by which worker."""
    return {(camera_of(data), data["worker"]) for data in pool.verdicts()}


def test_a_worker_that_was_away_gives_way_and_takes_part_again(pool):
    """A worker hangs for longer than the group waits: the other reads all; it comes back, and each is read once."""
    pool.apply([pool.camera(number) for number in range(16)])
    with pool.worker("a") as first, pool.worker("b"):
        wait_until(lambda: _are_shared(pool, 16), 60, "both workers share them")
        os.kill(first.pid, signal.SIGSTOP)
        try:
            wait_until(lambda: _shares(pool) == [16], 40, "the other worker reads all")
        finally:
            os.kill(first.pid, signal.SIGCONT)
        wait_until(lambda: _are_shared(pool, 16), 40, "both workers share them again")
        assert "place in the group is lost" in first.log()


def test_what_a_worker_cannot_read_is_refused_by_name(pool, tmp_path):
    """Beyond capacity, of an unknown product, no JSON, a password from elsewhere, an address outside of the networks:
    each named, and the rest is read.

    A relative password file is one of the worker's own folder.
    """
    for folder in (tmp_path, tmp_path / "a"):
        (folder / "password").write_text("s3cret")
    cameras = [pool.camera(number) for number in range(4)]
    rtsp = {"type": "rtsp", "url": "rtsp://127.0.0.1:9/x", "product": pool.product, "user": "u", "pool": pool.name}
    near = {"id": f"{pool.name}.-near", "password_file": "password", "station": "near", **rtsp}
    away = {"id": f"{pool.name}.away", "password_file": "../password", "station": "away", **rtsp}
    strange = pool.camera(8, product="no-such-part")
    outside = {**rtsp, "id": f"{pool.name}.-outside", "station": "outside", "url": "rtsp://10.9.9.9/x"}
    pool.apply([*cameras, strange, near, away, outside])
    producer = KafkaProducer(bootstrap_servers=pool.kafka)
    producer.send("inspection.cameras.v1", key=f"{pool.name}.bad".encode(), value=b"\xff{", partition=0)
    producer.close()
    pool.files["a"].settings["pool"]["capacity"] = 5
    pool.files["a"].settings["camera_networks"] = ["127.0.0.0/8"]
    with pool.worker("a") as line:
        wait_until(lambda: len(pool.states()) == 9, 60, "a word on each")
        states = {camera.removeprefix(f"{pool.name}."): state[:2] for camera, state in pool.states().items()}
        assert states.pop("-near")[0] == "lost"
        assert states == {
            **{f"{number:02}": ("streaming", "") for number in range(3)},
            "-outside": ("failed", "address_refused"),
            "03": ("failed", "capacity"),
            "08": ("failed", "product_unknown"),
            "away": ("failed", "invalid"),
            "bad": ("failed", "invalid"),
        }
        pool.apply([near, *cameras[1:]], "--prune")
        wait_until(lambda: set(pool.readers()) == {camera["id"] for camera in cameras[1:]}, 30, "the place is taken")
        summary = line.stop()
        said = line.log()
    assert line.exit_code == 0
    assert summary["triggered"] == summary["acknowledged"]
    for name in ("03", "08", "away", "bad"):
        assert f'"{pool.name}.{name}"' in said
    assert "s3cret" not in said


def test_a_camera_that_is_set_anew_goes_on_under_new_names(pool, products):
    """`cameras apply` with another product: read anew at once, no frame number twice, nothing lost."""
    camera = pool.camera(1, rate=5.0)
    pool.apply([camera])
    with pool.worker("a") as line:
        wait_until(lambda: len(pool.verdicts()) > 3, 60, "verdicts")
        other = camera | {"product": products[1]}
        assert [change["change"] for change in pool.apply([other], "--dry-run")] == ["changed"]
        assert [change["change"] for change in pool.apply([other])] == ["changed"]
        assert pool.apply([other]) == []
        wait_until(lambda: pool.verdicts()[-1]["productId"] == products[1], 30, "verdicts of the other product")
        summary = line.stop()
    verdicts = pool.verdicts()
    assert len(verdicts) == summary["triggered"] == summary["acknowledged"]
    numbers = [data["views"][0]["frameId"] for data in verdicts]
    assert numbers == list(range(1, len(numbers) + 1))
    assert [data["sequence"] for data in verdicts] == numbers


def test_a_camera_that_is_moved_to_another_pool_is_read_there_alone(pool, tmp_path):
    """One `cameras apply`: the old worker ends it, the other pool's worker goes on, and no part has two verdicts.

    `cameras list` names its pool, worker and state before and after; the verdicts name the pool whose epoch they bear.
    """
    playlist = tmp_path / "list.json"
    playlist.write_text(json.dumps([{"path": f"pictures/{n}.png", "part_id": f"p{n}"} for n in range(3)]))
    with simulation({"c": playlist}, tmp_path, "--rate", "2", "--loop") as cameras:
        camera = {"id": f"{pool.name}.1", "type": "rtsp", "url": cameras.addresses["c"], "product": pool.product}
        here, there = ({**camera, "station": "s", "pool": name} for name in (pool.name, pool.other))
        pool.apply([here])
        with pool.worker("a") as first, pool.worker("other") as second:
            wait_until(lambda: '"camera streaming"' in first.log(), 60, "a camera that is read")
            row = pool.listed()[camera["id"]]
            before = row["worker"]
            assert (row["pool"], row["state"]) == (pool.name, "streaming")
            assert [change["change"] for change in pool.apply([there])] == ["changed"]
            wait_until(lambda: '"camera streaming"' in second.log(), 60, "a camera that is read by the other worker")
            row = pool.listed()[camera["id"]]
            assert (row["pool"], row["state"]) == (pool.other, "streaming")
            assert row["worker"] != before
            summaries = first.stop(), second.stop()
            assert '"reason": "removed"' in first.log()
    verdicts = pool.verdicts()
    assert len(verdicts) == sum(summary["triggered"] for summary in summaries)
    assert [len({data[key] for data in verdicts}) for key in ("partId", "inspectionId")] == [len(verdicts)] * 2
    by_pool = {data["pool"]: data["worker"] for data in verdicts}
    assert (by_pool[pool.name], by_pool[pool.other]) == (before, row["worker"])
    assert all(data["epoch"] > 0 for data in verdicts)


def test_a_product_that_comes_later_is_judged_without_a_restart(pool, tmp_path):
    """Its camera is refused as long as the repository lacks it, and read once it is there and Triton serves it."""
    models = tmp_path / "models"
    for manifest in MODELS.glob("*/manifest.json"):
        (models / manifest.parent.name).mkdir(parents=True)
    first, second = (tmp_path / "models" / path.parent.name for path in sorted(MODELS.glob("*/manifest.json"))[:2])
    shutil.copy(MODELS / second.name / "manifest.json", second)
    pool.files["a"].settings["triton"] = {"models_repo": str(models)}
    pool.apply([pool.camera(1, product=first.name, rate=1.0)])
    with pool.worker("a") as line:
        wait_until(lambda: '"product_unknown"' in line.log(), 60, "a camera that is refused")
        (first / "manifest.json").write_text("{")
        wait_until(lambda: '"new version not judged with"' in line.log(), 60, "a product that is no good")
        shutil.copy(MODELS / first.name / "manifest.json", first)
        wait_until(lambda: '"camera streaming"' in line.log(), 60, "the camera is read")
        summary = line.stop()
    assert summary["triggered"] == summary["acknowledged"] > 0
    data = pool.verdicts()[0]
    assert (data["productId"], data["model"]["name"]) == (first.name, first.name)
    assert data["threshold"] is not None


def test_a_worker_goes_on_reading_while_kafka_is_away(pool, stack):
    """Kafka stands still for longer than the group waits: no picture is missed, and each gets its verdict once."""
    pool.apply([pool.camera(1, rate=2.0)])
    with pool.worker("a") as line:
        wait_until(lambda: len(pool.verdicts()) > 3, 60, "verdicts")
        os.kill(stack.pid("kafka"), signal.SIGSTOP)
        time.sleep(SESSION_S + 2)
        os.kill(stack.pid("kafka"), signal.SIGCONT)
        wait_until(lambda: len(pool.verdicts_if_any()) > 20, 60, "verdicts of the time without Kafka")
        summary = line.stop()
    verdicts = pool.verdicts()
    assert len(verdicts) == summary["triggered"] == summary["acknowledged"]
    captured = [datetime.fromisoformat(data["views"][0]["capturedAt"]).timestamp() for data in verdicts]
    assert max(later - earlier for earlier, later in pairwise(captured)) < SESSION_S / 2
