"""A real Kafka broker that asks who is there: TLS by a throw-away authority, SASL logins, client certificates, ACLs.

One node on loopback, for the tests of what clients say and do; the embedded stack's broker is the open one.
"""

from __future__ import annotations

import base64
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kafka import KafkaAdminClient, KafkaConsumer
from kafka.admin import (
    ACL,
    ACLOperation,
    ACLPermissionType,
    ACLResourcePatternType,
    ResourcePattern,
    ResourceType,
)

LIBS = Path(__file__).parents[1] / ".stack/kafka/libs"
PASSWORD = "pass-W0rd-of-the-line"  # noqa: S105 (of a broker that lives for a test)
TOPICS = ("verdict.v1", "view.v1", "trigger.v1", "audit.v1", "status.v1", "dlq.v1", "cameras.v1")
USERS = {"line": PASSWORD, "guest": PASSWORD}
MECHANISMS = ("SCRAM-SHA-256", "SCRAM-SHA-512")


@dataclass
class SecureBroker:
    """A running broker: an address for each way to speak to it, and the folder of the keys.

    `line` may do what a line does, `guest` may log in and nothing else; the open address may do everything.
    """

    folder: Path
    addresses: dict[str, str] = field(default_factory=dict)

    def path(self, name: str) -> Path:
        return self.folder / name

    def settings(self, listener: str, **keys: Any) -> dict[str, Any]:
        """The block `kafka` of a line file that speaks to a listener."""
        return {"bootstrap": [self.addresses[listener]], "startup_timeout_s": 5.0, **keys}

    def login(self, mechanism: str = "SCRAM-SHA-512", user: str = "line", password: str = PASSWORD) -> dict[str, Any]:
        path = self.path(f"password-{uuid.uuid4().hex}")
        path.write_text(password + "\n")
        return {"mechanism": mechanism, "username": user, "password_file": str(path)}

    def admin(self) -> KafkaAdminClient:
        return KafkaAdminClient(
            bootstrap_servers=self.addresses["PLAINTEXT"], bootstrap_timeout_ms=2_000, request_timeout_ms=10_000
        )


@contextmanager
def secure_broker(folder: Path) -> Iterator[SecureBroker]:
    """Start the broker, with the line's topics, users and their rights; ends it with the block."""
    make_keys(folder)
    listeners = ("PLAINTEXT", "SASL_SSL", "SSL", "SASL_PLAINTEXT", "CONTROLLER")
    ports = dict(zip(listeners, _free_ports(len(listeners)), strict=True))
    broker = SecureBroker(folder, {name: f"127.0.0.1:{port}" for name, port in ports.items() if name != "CONTROLLER"})
    (folder / "server.properties").write_text(_properties(folder, ports))
    (folder / "log4j2.properties").write_text("status = off\nrootLogger.level = off\n")
    _format(folder)
    with (folder / "broker.log").open("wb") as log:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *_java(folder, 320), "kafka.Kafka", str(folder / "server.properties")],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        _set_up(broker, process)
        yield broker
    finally:
        process.kill()
        process.wait(timeout=20)


def make_keys(folder: Path) -> None:
    """Make two authorities (`ca`, `other-ca`), the broker's certificate for 127.0.0.1 and the client's `CN=line`."""
    for name in ("ca", "other-ca"):
        _openssl(folder, *_request(name), "-x509", "-days", "2", "-out", f"{name}.pem", "-subj", f"/CN={name}")
    for name, more in (("broker", ["-addext", "subjectAltName=IP:127.0.0.1"]), ("line", [])):
        _openssl(folder, *_request(name), "-out", f"{name}.csr", "-subj", f"/CN={name}", *more)
        authority = ["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-copy_extensions", "copy"]
        _openssl(folder, "x509", "-req", "-in", f"{name}.csr", *authority, "-days", "2", "-out", f"{name}.pem")
    (folder / "broker-store.pem").write_text((folder / "broker.key").read_text() + (folder / "broker.pem").read_text())


def _request(name: str) -> list[str]:
    return ["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", f"{name}.key"]


def _openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True, timeout=30)


def _properties(folder: Path, ports: dict[str, int]) -> str:
    listeners = [f"{name}://127.0.0.1:{port}" for name, port in ports.items()]
    security = "org.apache.kafka.common.security"
    users = " ".join(f'user_{name}="{password}"' for name, password in USERS.items())
    logins = {
        f"listener.name.{listener}.{mechanism.lower()}.sasl.jaas.config": f"{security}.{login} required {words};"
        for listener in ("sasl_ssl", "sasl_plaintext")
        for mechanism, login, words in (
            ("PLAIN", "plain.PlainLoginModule", users),
            *((name, "scram.ScramLoginModule", "") for name in MECHANISMS),
        )
    }
    settings = {
        "process.roles": "broker,controller",
        "node.id": "1",
        "controller.quorum.voters": f"1@127.0.0.1:{ports['CONTROLLER']}",
        "controller.listener.names": "CONTROLLER",
        "listeners": ",".join(listeners),
        "advertised.listeners": ",".join(listeners[:-1]),
        "listener.security.protocol.map": ",".join(
            f"{name}:{'PLAINTEXT' if name == 'CONTROLLER' else name}" for name in ports
        ),
        "inter.broker.listener.name": "PLAINTEXT",
        "log.dirs": str(folder / "data"),
        "auto.create.topics.enable": "false",
        "offsets.topic.num.partitions": "1",
        "offsets.topic.replication.factor": "1",
        "group.initial.rebalance.delay.ms": "0",
        "message.max.bytes": str(4 * 1024 * 1024),  # so that a record can be larger than a client expects
        "sasl.enabled.mechanisms": ",".join(("PLAIN", *MECHANISMS)),
        "ssl.keystore.type": "PEM",
        "ssl.keystore.location": str(folder / "broker-store.pem"),
        "ssl.truststore.type": "PEM",
        "ssl.truststore.location": str(folder / "ca.pem"),
        "listener.name.ssl.ssl.client.auth": "required",
        "listener.name.sasl_plaintext.sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-512",
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": "User:ANONYMOUS;User:CN=line",
        **logins,
    }
    return "".join(f"{key}={value}\n" for key, value in settings.items())


def _java(folder: Path, heap_mb: int) -> list[str]:
    small = [f"-Xmx{heap_mb}m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Djava.awt.headless=true"]
    return ["java", *small, f"-Dlog4j2.configurationFile={folder / 'log4j2.properties'}", "-cp", f"{LIBS}/*"]


def _format(folder: Path) -> None:
    """Make the data folder; the SCRAM logins must be in it before the first of them is tried."""
    cluster = "A" + base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")[1:]
    tool = ["kafka.tools.StorageTool", "format", "-t", cluster, "-c", str(folder / "server.properties")]
    for mechanism in MECHANISMS:
        for user, password in USERS.items():
            tool += ["--add-scram", f"{mechanism}=[name={user},password={password}]"]
    subprocess.run([*_java(folder, 128), *tool], check=True, capture_output=True, timeout=150)


def _set_up(broker: SecureBroker, process: subprocess.Popen[bytes]) -> None:
    _wait_for(lambda: _answers(broker.addresses["PLAINTEXT"]), broker, process)
    with broker.admin() as admin:
        topics = {f"inspection.{name}": {"num_partitions": 2, "replication_factor": 1} for name in TOPICS}
        admin.create_topics(topics, timeout_ms=10_000, wait_for_metadata=True)
        admin.create_acls([_allow(*right) for right in RIGHTS])
    _wait_for(lambda: _sees_topics(broker), broker, process)


def _wait_for(is_so: Callable[[], bool], broker: SecureBroker, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 150
    while not is_so():
        if process.poll() is not None or time.monotonic() > until:
            words = (broker.folder / "broker.log").read_text(errors="replace")[-2000:]
            raise RuntimeError(f"the broker does not start: {words}")
        time.sleep(0.2)


def _answers(address: str) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", int(address.rpartition(":")[2]))) == 0


def _sees_topics(broker: SecureBroker) -> bool:
    """Whether the rights of the line are in force: rights come some time after they are given."""
    consumer = KafkaConsumer(
        bootstrap_servers=broker.addresses["SASL_PLAINTEXT"],
        security_protocol="SASL_PLAINTEXT",
        sasl_mechanism="SCRAM-SHA-512",
        sasl_plain_username="line",
        sasl_plain_password=PASSWORD,
    )
    try:
        return len(consumer.topics()) >= len(TOPICS)
    finally:
        consumer.close()


# What README says that the user of a line needs, and no more.
RIGHTS = (
    *((ResourceType.TOPIC, f"inspection.{name}.v1", ACLOperation.WRITE) for name in ("verdict", "view", "status")),
    *((ResourceType.TOPIC, f"inspection.{name}.v1", ACLOperation.WRITE) for name in ("audit", "dlq", "cameras")),
    *((ResourceType.TOPIC, f"inspection.{name}.v1", ACLOperation.READ) for name in ("trigger", "cameras")),
    *((ResourceType.TOPIC, f"inspection.{name}.v1", ACLOperation.READ) for name in ("verdict", "status")),
    (ResourceType.GROUP, "logicrd.", ACLOperation.READ),
    (ResourceType.GROUP, "inspection.workers.", ACLOperation.READ),
)


def _allow(kind: ResourceType, name: str, operation: ACLOperation) -> ACL:
    by = ACLResourcePatternType.PREFIXED if kind is ResourceType.GROUP else ACLResourcePatternType.LITERAL
    return ACL("User:line", "*", operation, ACLPermissionType.ALLOW, ResourcePattern(kind, name, by))


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in sockets]
    finally:
        for probe in sockets:
            probe.close()
