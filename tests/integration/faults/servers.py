"""The real Triton, Kafka and Redis, each behind a proxy and each killed, stopped and started at the suite's own will.

The same servers as `logicrd stack up` runs, without its supervisor: an outage lasts as long as a case says. A worker
reaches them through the proxies only; the suite's own producer and consumer go straight to Kafka.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from brokers import Kafka, Redis
from integration.faults.proxy import Proxy
from line_process import wait_until
from processes import LOOPBACK, free_ports
from supervisor import Component, Watched
from triton_server import Triton, TritonPorts

from pipeline.manifest import read_manifest

ROOT = Path(__file__).resolve().parents[3]
MODELS = ROOT / "models_repo"
PRODUCT = "fastener-tray"
START_TIMEOUT_S = 300.0
"""Generous: the machines that run this may be busy with other things."""
_SLOW_STEP_S = 0.1


class ProxiedKafka(Kafka):
    """The embedded broker with a second listener, which tells its clients to come back through the proxy."""

    def __init__(self, folder: Path, libs: Path, ports: list[int], proxy: Proxy) -> None:
        port, controller, self._inner = ports
        super().__init__(folder, libs, port, controller)
        self._proxy = proxy

    def _java(self, heap_mb: int) -> list[str]:
        """It is started often and runs for seconds: the quick compiler alone is up in less of the processor's time."""
        program, *options = super()._java(heap_mb)
        return [program, "-XX:TieredStopAtLevel=1", *options]

    def _properties(self) -> str:
        lines = dict(line.split("=", 1) for line in super()._properties().splitlines())
        lines["listeners"] += f",PROXIED://{LOOPBACK}:{self._inner}"
        lines["advertised.listeners"] += f",PROXIED://{LOOPBACK}:{self._proxy.port}"
        lines["listener.security.protocol.map"] = "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,PROXIED:PLAINTEXT"
        lines["inter.broker.listener.name"] = "PLAINTEXT"
        return "".join(f"{key}={value}\n" for key, value in lines.items())


def write_model(folder: Path) -> None:
    """Write the model that Triton serves under the product's name: see `brightness_model`."""
    manifest = read_manifest(MODELS, PRODUCT)
    size = manifest.input
    tensors = [("input", "image", "TYPE_UINT8", [size.height, size.width, 3])]
    tensors += [("output", name, "TYPE_FP32", [1]) for name in ("score", "map_score", "mahalanobis")]
    tensors += [("output", "anomaly_map", "TYPE_FP32", list(manifest.map_shape))]
    config = f'name: "{PRODUCT}"\nbackend: "python"\nmax_batch_size: 8\ninstance_group {{ count: 1 kind: KIND_CPU }}\n'
    config += "".join(
        f'{kind} {{ name: "{name}" data_type: {dtype} dims: {dims} }}\n' for kind, name, dtype, dims in tensors
    )
    (folder / str(manifest.version)).mkdir(parents=True)
    (folder / "config.pbtxt").write_text(config)
    shutil.copy(Path(__file__).with_name("brightness_model.py"), folder / str(manifest.version) / "model.py")


class Server:
    """One server and the proxy before it."""

    def __init__(self, component: Component, proxy: Proxy, log_path: Path) -> None:
        self.proxy = proxy
        component.start_timeout_s = START_TIMEOUT_S
        self._watched = Watched(component, log_path)

    @property
    def name(self) -> str:
        return self._watched.component.name

    @property
    def pid(self) -> int:
        assert self._watched.process is not None, f"{self.name} does not run"
        return self._watched.process.pid

    @property
    def is_ready(self) -> bool:
        """Whether it has answered since it was started last; looks once."""
        trouble = self._watched.trouble()
        assert trouble is None, self._watched.explain(trouble)
        return self._watched.state == "ready"

    def start(self) -> None:
        """Start it, from the main thread; it is up when `is_ready` says so."""
        self._watched.start()

    def kill(self) -> None:
        """SIGKILL to all its processes at once."""
        self._watched.end("stopped", 0.0)

    def wait(self) -> None:
        """Wait until it answers; what has ended meanwhile is started again, as a supervisor does."""
        if self._watched.process is None or self._watched.process.exit_code() is not None:
            self.kill()
            self.start()
        wait_until(lambda: self.is_ready, START_TIMEOUT_S, f"{self.name} up")

    def end(self) -> None:
        """End it for good."""
        self._watched.end("stopped", 10.0)
        self.proxy.close()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to its main process and to its helpers."""
        send(number, self.pid, *children(self.pid))

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Hold it as a hung machine would."""
        self.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.signal(signal.SIGCONT)

    def slow(self, seconds: float, share: float) -> None:
        """Let it have this share of the time only, in turns of 0.1 s."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            with self.stopped():
                time.sleep(_SLOW_STEP_S * (1 - share))
            time.sleep(_SLOW_STEP_S * share)


class Servers:
    """All three, up between `start` and `end`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        ports = free_ports(7)
        triton_ports, kafka_ports = TritonPorts(*ports[:3]), ports[3:6]
        (redis_port,) = ports[6:]
        proxies = {"triton": Proxy(triton_ports.grpc), "kafka": Proxy(kafka_ports[2]), "redis": Proxy(redis_port)}
        for proxy in proxies.values():
            proxy.start()
        environment = ROOT / ".venv-triton"
        components: list[Component] = [
            Triton(folder, folder / "models", environment, triton_ports),
            ProxiedKafka(folder, ROOT / ".stack/kafka/libs", kafka_ports, proxies["kafka"]),
            Redis(folder, redis_port),
        ]
        self.by_name = {each.name: Server(each, proxies[each.name], folder / f"{each.name}.log") for each in components}
        self.kafka_address = f"{LOOPBACK}:{kafka_ports[0]}"
        self.redis_url = f"redis://{LOOPBACK}:{redis_port}/0"

    def start(self) -> None:
        """Start all and wait until all answer."""
        write_model(self._folder / "models" / PRODUCT)
        for server in self.by_name.values():
            server.start()
        self.heal()

    def heal(self) -> None:
        """Make every server and every network good again, and wait until they are."""
        for server in self.by_name.values():
            server.proxy.heal()
        for server in self.by_name.values():
            server.wait()

    def end(self) -> None:
        """Stop everything."""
        for server in self.by_name.values():
            server.end()

    def endpoints(self) -> dict[str, str]:
        """Where a worker finds them: through the proxies."""
        ports = {name: server.proxy.port for name, server in self.by_name.items()}
        return {
            "triton": f"{LOOPBACK}:{ports['triton']}",
            "kafka": f"{LOOPBACK}:{ports['kafka']}",
            "redis": f"redis://{LOOPBACK}:{ports['redis']}/0",
        }


def send(number: signal.Signals, *pids: int) -> None:
    """Send a signal to each; a helper that has ended meanwhile needs none."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def children(pid: int, pattern: str = "") -> list[int]:
    """The processes that a process has started, those whose command line has the pattern."""
    found = subprocess.run(["pgrep", "-P", str(pid), "-f", pattern], capture_output=True, text=True, check=False)
    return [int(number) for number in found.stdout.split()]
