"""What the chart starts, started here: its containers' commands and mounted files as plain processes.

Triton, the jobs, a worker and the pod of `helm test`, each with the very arguments and files that are rendered, against
the embedded Kafka and Redis. A mount is a folder: the paths of mounts, in arguments and files, are made this machine's.
Triton's name is given by a variable, as no name server of a cluster is here; its certificate is for the real name too.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from chart import ROOT, one, pods, render
from line_process import received
from processes import free_ports
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from pipeline.errors import DependencyError
from pipeline.health import Health
from pipeline.inference import InferenceClient
from pipeline.manifest import read_manifest
from pipeline.metrics import Metrics
from pipeline.servers import Tls, Triton

pytestmark = [pytest.mark.stack, pytest.mark.timeout(600)]

MODELS = ROOT / "models_repo"
PARTS = ROOT / "deploy/local/parts"
PRODUCT = "fastener-tray"
NAME = "t-logicrd-triton-headless"
PREFIX = "chart"


@dataclass
class Machine:
    """Where the mounts lie, and how a container's command becomes a process."""

    folder: Path
    manifests: list[dict[str, Any]]
    ports: dict[str, int]
    certificates: Path

    def place(self, pod: str, text: str) -> str:
        """Give a text with the paths of a pod's mounts as they are here."""
        text = re.sub(r"(?<![\w.-])/models\b", str(MODELS), text)
        return re.sub(r"(?<![\w.-])(/etc/logicrd|/etc/triton|/var/lib/logicrd)\b", rf"{self.folder}/{pod}\1", text)

    def spec(self, kind: str, name: str) -> tuple[str, dict[str, Any]]:
        """Give the one pod of a kind whose container has the name."""
        found = [(key, spec) for key, spec in pods(self.manifests).items() if key.startswith(f"{kind}/")]
        return next((key.replace("/", "-"), spec) for key, spec in found if spec["containers"][0]["name"] == name)

    def mount(self, pod: str, spec: dict[str, Any]) -> None:
        """Lay the files of a pod's volumes where its container looks for them."""
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        for mount in spec["containers"][0]["volumeMounts"]:
            volume = volumes.get(mount["name"], {})
            at = Path(self.place(pod, mount["mountPath"]))
            if "configMap" in volume:
                data = one(self.manifests, "ConfigMap", volume["configMap"]["name"])["data"]
                files = {mount["subPath"]: at} if "subPath" in mount else {key: at / key for key in data}
                for key, path in files.items():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(self.place(pod, data[key]))
            elif "secret" in volume:
                at.mkdir(parents=True, exist_ok=True)
                for item in volume["secret"]["items"]:
                    (at / item["path"]).write_bytes((self.certificates / item["key"]).read_bytes())
            elif mount["mountPath"].startswith("/var"):
                at.mkdir(parents=True, exist_ok=True)

    def start(self, kind: str, name: str, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
        """Run the command of a pod's container."""
        pod, spec = self.spec(kind, name)
        self.mount(pod, spec)
        container = spec["containers"][0]
        command = [self.place(pod, word) for word in (*container["command"], *container["args"])]
        if environment is None:
            ours = dict(os.environ)  # noqa: TID251 (what a process of ours is started with)
            path = f"{Path(sys.executable).parent}:{ours['PATH']}"
            environment = {**ours, "PATH": path, "LOGICRD_TRITON__ADDRESS": f"127.0.0.1:{self.ports['grpc']}"}
        with (self.folder / f"{name}.log").open("w") as log, (self.folder / f"{name}.out").open("w") as out:
            return subprocess.Popen(command, env=environment, stdout=out, stderr=log, text=True)

    def run(self, kind: str, name: str) -> str:
        """Run a command to its good end; gives its answer."""
        process = self.start(kind, name)
        try:
            process.wait(180)
        finally:
            process.kill()
        assert process.returncode == 0, (self.folder / f"{name}.log").read_text()
        return (self.folder / f"{name}.out").read_text()

    def url(self, port: str, path: str) -> str:
        return f"http://127.0.0.1:{self.ports[port]}{path}"


def status_of(url: str, data: bytes | None = None) -> int:
    """Ask; 0 when nobody answers."""
    try:
        with urllib.request.urlopen(url, data, timeout=5) as answer:  # noqa: S310 (this machine's own)
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def wait_for(url: str, process: subprocess.Popen[str], timeout_s: float = 300) -> None:
    """Ask as Kubernetes' probes do, until the answer is good."""
    until = time.monotonic() + timeout_s
    while status_of(url) != 200:
        assert process.poll() is None, "the process has ended"
        assert time.monotonic() < until, f"{url}: not in {timeout_s} s"
        time.sleep(0.3)


def certificates(folder: Path) -> Path:
    """Make a throw-away authority and a certificate for the headless service's name."""
    folder.mkdir()
    names = f"subjectAltName=DNS:{NAME},IP:127.0.0.1"
    (folder / "names").write_text(names)
    for command in (
        "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=authority -keyout ca.key -out ca.crt",
        f"req -newkey rsa:2048 -nodes -subj /CN={NAME} -keyout tls.key -out tls.csr",
        "x509 -req -in tls.csr -CA ca.crt -CAkey ca.key -days 2 -extfile names -out tls.crt",
    ):
        subprocess.run(["openssl", *command.split()], cwd=folder, check=True, capture_output=True, timeout=60)
    return folder


def values(stack: Any, backends: Path, ports: dict[str, int], pictures: Path) -> dict[str, Any]:
    """Give what a cluster would not need: addresses on this machine, and the embedded server's own arguments."""
    arguments = [f"--{kind}-port={port}" for kind, port in ports.items() if kind != "worker"]
    arguments += [f"--{kind}-address=127.0.0.1" for kind in ("grpc", "http", "metrics")]
    arguments += [f"--backend-directory={backends}", "--allow-gpu-metrics=false", "--pinned-memory-pool-byte-size=0"]
    camera = {"id": "cam-1", "type": "folder", "path": str(pictures), "product": PRODUCT, "loop": True, "rate": 1}
    return {
        "config": {"budget_ms": 60_000, "kafka": {"topic_prefix": PREFIX}, "triton": {"startup_timeout_s": 60}},
        "worker": {"monitoringPort": ports["worker"]},
        "triton": {"models": [PRODUCT], "extraArgs": arguments},
        "kafka": {
            "bootstrap": [stack.endpoints["kafka"]],
            "tls": {"enabled": False},
            "topics": {"copies": 1, "partitions": 2},
        },
        "redis": {"url": stack.endpoints["redis"], "tls": {"enabled": False}},
        "thresholds": {PRODUCT: {"ng": 4.25, "review": 4.0}},
        "pools": [{"name": "trays", "shared": False, "cameras": [camera]}],
    }


@pytest.fixture(scope="module")
def machine(stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Render the chart, and start Triton as it says."""
    folder = tmp_path_factory.mktemp("chart")
    ports = dict(zip(("grpc", "http", "metrics", "worker"), free_ports(4), strict=True))
    overrides = values(stack, stack.state_dir / "triton/backends", ports, PARTS / PRODUCT)
    made = Machine(folder, render(overrides=overrides), ports, certificates(folder / "certificates"))
    # The environment of the embedded server, whose program is a wheel's and not on the path.
    server = Path(f"/proc/{stack.pid('triton')}")
    environment = dict(each.split("=", 1) for each in (server / "environ").read_text().split("\0") if "=" in each)
    environment["PATH"] = f"{environment['PATH']}:{(server / 'exe').resolve().parent}"
    triton = made.start("Deployment", "triton", environment)
    try:
        probe = made.spec("Deployment", "triton")[1]["containers"][0]["startupProbe"]["httpGet"]
        wait_for(made.url(probe["port"], probe["path"]), triton)
        yield made
    finally:
        triton.send_signal(signal.SIGTERM)
        triton.wait(60)


def test_the_first_verdict(machine, stack):
    """Topics, limits, a worker: ready, first verdict with those limits, a good end on SIGTERM; then `helm test`."""
    assert f"{PREFIX}.verdict.v1" in machine.run("Job", "topics")
    assert PRODUCT in machine.run("Job", "thresholds")
    assert "nothing differs" in machine.run("Job", "thresholds"), "a second run, as after an upgrade, changes something"
    worker = machine.start("StatefulSet", "worker")
    try:
        container = machine.spec("StatefulSet", "worker")[1]["containers"][0]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            wait_for(machine.url("worker", container[probe]["httpGet"]["path"]), worker)
        kafka = stack.endpoints["kafka"]
        first = received(kafka, "line-1", at_least=1, timeout_s=120, prefix=PREFIX).events[0]["data"]
        assert first["verdict"] in {"OK", "REVIEW", "NG"}
        assert (first["threshold"]["ng"], first["threshold"]["source"]) == (4.25, "redis")
        assert status_of(machine.url("worker", "/metrics")) == 200
    finally:
        worker.send_signal(signal.SIGTERM)
        worker.wait(90)
    assert worker.returncode == 0, (machine.folder / "worker.log").read_text()
    assert f"verdict of product '{PRODUCT}'" in machine.run("Pod", "verdict")
    trials = received(kafka, "line-1-check", at_least=1, prefix=PREFIX)
    assert [event["data"]["productId"] for event in trials.events] == [PRODUCT]


def test_triton_answers_health_by_http_and_nothing_else(machine):
    """No inference, no model's data, no loading by plain HTTP; metrics with the names that the rules ask for."""
    assert status_of(machine.url("http", "/v2/health/live")) == 200
    assert status_of(machine.url("http", f"/v2/models/{PRODUCT}")) in {400, 403}
    assert status_of(machine.url("http", f"/v2/models/{PRODUCT}/infer"), b"{}") in {400, 403}
    assert status_of(machine.url("http", "/v2/repository/index"), b"{}") in {400, 403}
    with urllib.request.urlopen(machine.url("metrics", "/metrics"), timeout=5) as answer:  # noqa: S310
        text = answer.read().decode()
    assert re.search(r'nv_inference_queue_duration_us\{model="teacher\.', text)
    assert re.search(r'nv_inference_request_success\{model="teacher\.', text)


def test_triton_changes_nothing_without_the_key(machine):
    """gRPC by TLS: the state of models can be asked for, but not loaded or unloaded, and plain text is refused."""
    authority = str(machine.certificates / "ca.crt")
    client = InferenceServerClient(f"127.0.0.1:{machine.ports['grpc']}", ssl=True, root_certificates=authority)
    try:
        assert client.is_model_ready(PRODUCT, client_timeout=10)
        with pytest.raises(InferenceServerException):
            client.unload_model(PRODUCT, client_timeout=10)
        with pytest.raises(InferenceServerException):
            client.get_model_repository_index(client_timeout=10)
        assert client.is_model_ready(PRODUCT, client_timeout=10)
    finally:
        client.close()
    plain = InferenceServerClient(f"127.0.0.1:{machine.ports['grpc']}")
    try:
        with pytest.raises(InferenceServerException):
            plain.is_server_live(client_timeout=5)
    finally:
        plain.close()


def client_for(machine: Machine, name: str) -> InferenceClient:
    """Make the line's client, to which the cluster's name server has given Triton's address for a name."""
    settings = Triton(
        address=f"{name}:{machine.ports['grpc']}",
        models_repo=MODELS,
        startup_timeout_s=20,
        tls=Tls(ca_file=machine.certificates / "ca.crt"),
    )
    manifests = {PRODUCT: read_manifest(MODELS, PRODUCT)}
    found = [f"127.0.0.1:{machine.ports['grpc']}"]
    return InferenceClient(settings, manifests, metrics=Metrics(), health=Health(), resolve=lambda _: found)


def test_triton_proves_the_name_that_it_was_found_by(machine):
    """By the name of the service it is taken, though its address is a number; by another name it is not."""
    good = client_for(machine, NAME)
    try:
        assert good.start() == []
    finally:
        good.close()
    wrong = client_for(machine, "someone-else")
    try:
        with pytest.raises(DependencyError):
            wrong.start()
    finally:
        wrong.close()
