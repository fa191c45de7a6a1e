"""Two real Triton servers behind one line: one is killed, hung, added, removed, or serves another version.

One is the stack's that all tests share; the other one is this module's own, with a supervisor that starts it again.
What a name stands for is a list here, as a name server would give it: one address with two ports.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from line_process import LineProcess, received, stopped, wait_until

from pipeline.health import Health
from pipeline.inference import InferenceClient
from pipeline.manifest import read_manifest
from pipeline.metrics import Metrics
from pipeline.servers import Triton as TritonSettings
from pipeline.types import Batch, Cause, Frame, Inference

pytestmark = pytest.mark.stack

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "models_repo"
STACK = ROOT / "deploy/local/stack.py"
PRODUCT = "fastener-tray"
OTHER = "cable-set"
IN_FLIGHT = 2


class Server:
    """A Triton of this module's own, serving one product."""

    def __init__(self, folder: Path, version: int | None = None) -> None:
        """`version`: what the ensemble calls itself, instead of what the manifest says."""
        self._folder = folder
        models = folder / "models"
        for source in (*MODELS.glob(f"{PRODUCT}*"), *MODELS.glob("teacher.*")):
            shutil.copytree(source, models / source.name)
        if version is not None:
            (path,) = (path for path in (models / PRODUCT).iterdir() if path.is_dir())
            path.rename(path.with_name(str(version)))
        self._run("up", "--models", str(models), "--only", "triton", "--free-ports", "--json")
        self.address: str = self.state()["endpoints"]["triton"]

    def state(self) -> dict[str, Any]:
        return json.loads((self._folder / "state.json").read_text())

    @property
    def pid(self) -> int:
        return self.state()["components"]["triton"]["pid"]

    def down(self) -> None:
        self._run("down")

    def _run(self, verb: str, *options: str) -> None:
        command = [sys.executable, str(STACK), verb, "--state-dir", str(self._folder), *options]
        subprocess.run(command, check=True, timeout=120, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of the product; killed, it is started again."""
    server = Server(tmp_path_factory.mktemp("own"))
    yield server
    server.down()


@pytest.fixture
def second(own_server: Server) -> Server:
    """The module's server, up, whatever the test before did to it."""
    wait_until(lambda: own_server.state()["components"]["triton"]["state"] == "ready", 90, "the second server")
    return own_server


@pytest.fixture
def stranger(tmp_path: Path) -> Iterator[Server]:
    """A server of another version of the product."""
    server = Server(tmp_path / "stranger", version=77)
    yield server
    server.down()


class Load:
    """Batches of one picture each, two under way, for as long as the block lasts; keeps what came back."""

    def __init__(self, client: InferenceClient, budget_s: float = 60.0, product: str = PRODUCT) -> None:
        self.sent = 0
        self._product = product
        self.answers: list[Inference] = []
        self._client = client
        self._budget_s = budget_s
        self._slots = threading.BoundedSemaphore(IN_FLIGHT)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._image = np.random.default_rng(0).integers(0, 255, (256, 256, 3), dtype=np.uint8)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(self._budget_s)
        wait_until(lambda: len(self.answers) >= self.sent, self._budget_s, "an answer for each batch")

    def wait_for(self, count: int, timeout_s: float = 60.0) -> None:
        """Wait for so many more answers."""
        wanted = len(self.answers) + count
        wait_until(lambda: len(self.answers) >= wanted, timeout_s, f"{count} more answers")

    def _run(self) -> None:
        while not self._stop.is_set():
            if self._slots.acquire(timeout=0.2):
                self.sent += 1
                self._client.submit(Batch(self._product, (self._frame(),)), self._take)

    def _take(self, inferences: list[Inference]) -> None:
        self.answers += inferences
        self._slots.release()

    def _frame(self) -> Frame:
        now_s = time.monotonic()
        deadline_s = now_s + self._budget_s
        name = f"part-{self.sent}"
        return Frame(
            "c", "s", self._product, self.sent, name, "file", datetime.now(UTC), now_s, deadline_s, image=self._image
        )


class Service:
    """A client of the addresses that a name stands for at the moment."""

    def __init__(self, *addresses: str, optional: tuple[str, ...] = ()) -> None:
        self.optional = optional
        self.addresses = list(addresses)
        self.metrics = Metrics()
        settings = TritonSettings(address="triton:8001", resolve_interval_s=0.5, startup_timeout_s=60)
        manifests = {product: read_manifest(MODELS, product) for product in (PRODUCT, *optional)}
        self.client = InferenceClient(
            settings, manifests, metrics=self.metrics, health=Health(), resolve=lambda _: list(self.addresses)
        )

    def count(self, what: str, address: str) -> float:
        return self.metrics.registry.get_sample_value(f"inspection_triton_{what}_total", {"replica": address}) or 0.0

    def up(self) -> float | None:
        return self.metrics.registry.get_sample_value("inspection_triton_replicas_up")


@pytest.fixture
def service() -> Iterator[Callable[..., Service]]:
    """Start a client of these addresses; closed at the end."""
    started: list[Service] = []

    def start(*addresses: str, optional: tuple[str, ...] = ()) -> Service:
        made = Service(*addresses, optional=optional)
        started.append(made)
        assert made.client.start(optional=optional) == []
        return made

    yield start
    for made in started:
        made.client.close()


def test_a_killed_replica_costs_no_batch_and_is_used_again(stack, second, service):
    """SIGKILL under load: every batch has its scores, from the other replica; started again, it gets its share."""
    first = stack.endpoints["triton"]
    made = service(first, second.address)
    with Load(made.client) as load:
        load.wait_for(8)
        assert made.count("requests", second.address) > 0
        os.kill(second.pid, signal.SIGKILL)
        wait_until(lambda: made.up() == 1, 30, "the dead replica set aside")
        load.wait_for(8)
        wait_until(lambda: made.up() == 2, 90, "the replica in use again")
        before = made.count("requests", second.address)
        load.wait_for(16)
        assert made.count("requests", second.address) - before >= 4
    assert len(load.answers) == load.sent
    assert [answer.cause for answer in load.answers if answer.cause is not None] == []
    assert made.count("failures", second.address) > 0
    assert made.count("failures", first) == 0


def test_a_new_replica_gets_its_share_and_a_removed_one_is_left(stack, second, service):
    """The name gets a second address, then loses the first: with no restart, and with scores for every batch."""
    first = stack.endpoints["triton"]
    made = service(first)
    with Load(made.client) as load:
        load.wait_for(4)
        made.addresses.append(second.address)
        wait_until(lambda: made.count("requests", second.address) > 0, 60, "a batch for the new replica")
        before = made.count("requests", second.address)
        load.wait_for(16)
        assert made.count("requests", second.address) - before >= 4
        made.addresses.remove(first)
        wait_until(lambda: made.count("requests", first) == 0, 60, "the removed one's channel closed")
        load.wait_for(8)
        assert made.count("requests", first) == 0
    assert [answer.cause for answer in load.answers if answer.cause is not None] == []


@pytest.mark.parametrize("order", [1, -1], ids=["last", "first"])
def test_a_replica_that_lacks_what_another_serves_is_not_used(stack, second, service, order):
    """A pool's worker takes every product that one replica serves: one without it is left, whoever was asked first.

    The product is judged; no batch of it is lost to the replica that lacks it.
    """
    addresses = [stack.endpoints["triton"], second.address][::order]
    made = service(*addresses, optional=(OTHER,))
    with Load(made.client, product=OTHER) as load:
        load.wait_for(4)
        wait_until(lambda: made.up() == 1, 60, "the replica that lacks it set aside")
        before = made.count("requests", second.address)
        load.wait_for(4)
        assert made.count("requests", second.address) == before
    assert [answer.cause for answer in load.answers if answer.cause is not None] == []


def test_a_hung_replica_costs_what_it_holds(stack, second, service):
    """SIGSTOP under load: what it holds ends at its deadline, the rest goes to the other one, and it comes back."""
    made = service(stack.endpoints["triton"], second.address)
    with Load(made.client, budget_s=6.0) as load:
        load.wait_for(6)
        with stopped(second.pid):
            wait_until(lambda: made.up() == 1, 60, "the hung replica set aside")
            load.wait_for(4)
        wait_until(lambda: made.up() == 2, 60, "the replica in use again")
    causes = [answer.cause for answer in load.answers if answer.cause is not None]
    assert set(causes) == {Cause.DEADLINE}
    assert len(causes) <= IN_FLIGHT


def test_a_batch_under_way_at_the_end_comes_back(stack, second, service):
    """`close` under load: every batch has an answer, scores or `triton_unavailable`."""
    made = service(stack.endpoints["triton"], second.address)
    with Load(made.client) as load:
        load.wait_for(4)
        made.client.close()
        load.wait_for(4)
    assert len(load.answers) == load.sent
    assert {answer.cause for answer in load.answers} == {None, Cause.TRITON_UNAVAILABLE}


def write_line(line_file: Callable[..., Any], stack: Any, pictures: Path, addresses: list[str]) -> Path:
    made = line_file(stack, triton={"address": addresses}, budget_ms=30_000)
    for name in ("c1", "c2"):
        made.camera(id=name, type="folder", path=str(pictures), product=PRODUCT, station=name, rate=4, loop=True)
    return made.write()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """The product's own pictures, as the demo has them."""
    folder = tmp_path / "pictures"
    shutil.copytree(ROOT / "deploy/local/parts" / PRODUCT, folder)
    return folder


def test_the_line_loses_no_part_to_a_killed_replica(stack, second, line_file, pictures):
    """Two cameras, a static list of two servers, SIGKILL on one: as many verdicts as parts, none UNINSPECTED."""
    path = write_line(line_file, stack, pictures, [stack.endpoints["triton"], second.address])
    name = path.read_text().split("line: ")[1].split()[0]
    with LineProcess(path) as line:
        wait_until(lambda: len(received(stack.endpoints["kafka"], name).events) > 8, 60, "a running line")
        os.kill(second.pid, signal.SIGKILL)
        wait_until(lambda: "Triton replica is not used" in line.log(), 30, "the dead replica named")
        time.sleep(3)
        summary = line.stop()
    assert line.exit_code == 0
    assert second.address in next(text for text in line.log().splitlines() if "is not used" in text)
    verdicts = received(stack.endpoints["kafka"], name, at_least=summary["triggered"])
    assert (len(verdicts.events), verdicts.duplicates, verdicts.in_order()) == (summary["triggered"], 0, True)
    assert verdicts.causes == {}


def test_a_replica_of_another_version_is_named_and_not_used(stack, stranger, line_file, pictures):
    """`check` fails and names it; the line runs on the good one, says why, and gives no verdict of the other model."""
    good = stack.endpoints["triton"]
    path = write_line(line_file, stack, pictures, [good, stranger.address])
    name = path.read_text().split("line: ")[1].split()[0]
    check = [sys.executable, "-m", "pipeline.cli", "check", "-c", str(path)]
    refused = subprocess.run(check, capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode == 5
    assert f"Triton at {stranger.address}: product '{PRODUCT}'" in refused.stderr
    assert "version 77 is loaded" in refused.stderr
    assert good not in refused.stderr
    with LineProcess(path) as line:
        wait_until(lambda: len(received(stack.endpoints["kafka"], name).events) > 8, 60, "a running line")
        line.stop()
    assert "version 77 is loaded" in line.log()
    assert received(stack.endpoints["kafka"], name).causes == {}


def test_check_names_each_replica_and_what_it_serves(stack, second, line_file, pictures):
    """One line a replica, with the product's version; and each camera that may not be where it is."""
    addresses = [stack.endpoints["triton"], second.address]
    made = line_file(stack, triton={"address": addresses}, camera_networks=["10.20.0.0/16"])
    made.camera(type="folder", path=str(pictures), product=PRODUCT)
    for host in ("10.20.0.7", "10.21.0.7", "localhost"):
        made.camera(id=host, type="rtsp", url=f"rtsp://{host}/a", product=PRODUCT)
    path = made.write()
    check = [sys.executable, "-m", "pipeline.cli", "check", "-c", str(path)]
    done = subprocess.run(check, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    version = read_manifest(MODELS, PRODUCT).version
    for address in addresses:
        assert f"good  Triton at {address}, signatures of {PRODUCT} version {version}\n" in done.stdout
    looks = [text for text in done.stdout.splitlines() if "camera_networks" in text]
    assert [text.split()[2] for text in looks] == ["'10.21.0.7'", "'localhost'"]


def test_a_replica_whose_backend_died_costs_no_batch(stack, second, service):
    """Its server still calls itself ready and errs: every batch gets its scores from the other one, and it is left."""
    made = service(stack.endpoints["triton"], second.address)
    pattern = ["pgrep", "-P", str(second.pid), "-f", f"{PRODUCT}.mahalanobis"]
    with Load(made.client) as load:
        load.wait_for(6)
        stub = subprocess.run(pattern, capture_output=True, text=True, check=True).stdout.split()[0]
        os.kill(int(stub), signal.SIGKILL)
        wait_until(lambda: made.up() == 1, 30, "the broken replica set aside")
        load.wait_for(6)
    assert [answer.cause for answer in load.answers if answer.cause is not None] == []
    assert made.count("failures", second.address) > 0
