"""The embedded Kafka broker and the embedded Redis: their files, their command lines, and whether they answer.

Configurations are written anew into the state folder at every start; the data beside them is kept. Both listen on
loopback only, without a password: this is a stack for one developer's machine, never a deployment. The supervisor's.
"""

from __future__ import annotations

import base64
import shutil
import subprocess
import uuid
from pathlib import Path

import redis
from processes import LOOPBACK, StackError, answers

from pipeline import topics
from pipeline.errors import DependencyError
from pipeline.servers import Kafka as Settings

PARTITIONS = 6
KAFKA_HEAP_MB = 512


class Kafka:
    """One KRaft node, broker and controller in one process."""

    name = "kafka"
    start_timeout_s = 120.0
    cause_pattern = r"\b(ERROR|FATAL)\b|^Caused by|Exception"

    def __init__(self, state_dir: Path, libs: Path, port: int, controller_port: int) -> None:
        self._folder = state_dir / "kafka"
        self._libs = libs
        self._port = port
        self._controller_port = controller_port
        self._has_topics = False

    def endpoints(self) -> dict[str, str]:
        """Where clients find it."""
        return {"kafka": f"{LOOPBACK}:{self._port}"}

    def require(self) -> None:
        """Raises StackError when the broker's files or a Java are not on this machine."""
        if not any(self._libs.glob("kafka_2.13-*.jar")):
            raise StackError(f"kafka: no broker in '{self._libs}'; run `make setup`", 3)
        if shutil.which("java") is None:
            raise StackError("kafka: no 'java' on PATH; run `make setup`, or install a Java 17 runtime", 3)

    def prepare(self) -> None:
        """Write the configuration; give a new data folder its cluster id."""
        self._has_topics = False
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / "server.properties").write_text(self._properties())
        (self._folder / "log4j2.properties").write_text(LOG4J)
        if not (self._folder / "data/meta.properties").exists():
            self._format()

    def command(self) -> list[str]:
        """The broker's own main class, on a small heap."""
        return [*self._java(KAFKA_HEAP_MB), "kafka.Kafka", str(self._folder / "server.properties")]

    def environment(self) -> dict[str, str]:
        """Nothing of its own."""
        return {}

    def check(self) -> str | None:
        """'' once, when the broker has answered a metadata request and has its topics; None before and after."""
        if self._has_topics or not answers(self._port):
            return None
        here = Settings(bootstrap=[f"{LOOPBACK}:{self._port}"], startup_timeout_s=3.0)
        try:
            topics.create(here, partitions=PARTITIONS, copies=1)
        except DependencyError:
            return None
        self._has_topics = True
        return ""

    def clean(self) -> None:
        """Leaves nothing outside its folder."""

    def _java(self, heap_mb: int) -> list[str]:
        return [
            "java",
            f"-Xmx{heap_mb}m",
            "-XX:+UseSerialGC",
            "-Djava.awt.headless=true",
            f"-Dlog4j2.configurationFile={self._folder / 'log4j2.properties'}",
            "-cp",
            f"{self._libs}/*",
        ]

    def _format(self) -> None:
        identity = uuid.uuid4()
        cluster = _base64(identity)
        tool = ["kafka.tools.StorageTool", "format", "-t", cluster, "-c", str(self._folder / "server.properties")]
        done = subprocess.run(
            ["setpriv", "--pdeathsig", "KILL", *self._java(128), *tool],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if done.returncode:
            words = (done.stdout + done.stderr).strip()[-600:]
            raise StackError(f"kafka: cannot format '{self._folder / 'data'}': {words}", 4)

    def _properties(self) -> str:
        settings = {
            "process.roles": "broker,controller",
            "node.id": "1",
            "controller.quorum.voters": f"1@{LOOPBACK}:{self._controller_port}",
            "listeners": f"PLAINTEXT://{LOOPBACK}:{self._port},CONTROLLER://{LOOPBACK}:{self._controller_port}",
            "advertised.listeners": f"PLAINTEXT://{LOOPBACK}:{self._port}",
            "controller.listener.names": "CONTROLLER",
            "log.dirs": str(self._folder / "data"),
            "auto.create.topics.enable": "false",
            "offsets.topic.num.partitions": "4",
            "offsets.topic.replication.factor": "1",
            "transaction.state.log.replication.factor": "1",
            "transaction.state.log.min.isr": "1",
            "share.coordinator.state.topic.replication.factor": "1",
            "share.coordinator.state.topic.min.isr": "1",
            "group.initial.rebalance.delay.ms": "0",
            "log.segment.bytes": str(64 * 1024 * 1024),
            "log.retention.hours": "168",
        }
        return "".join(f"{key}={value}\n" for key, value in settings.items())


LOG4J = """\
status = warn
appender.stdout.type = Console
appender.stdout.name = stdout
appender.stdout.layout.type = PatternLayout
appender.stdout.layout.pattern = %d %p %c: %m%n
rootLogger.level = warn
rootLogger.appenderRef.stdout.ref = stdout
logger.server.name = kafka.server.KafkaRaftServer
logger.server.level = info
"""


def _base64(identity: uuid.UUID) -> str:
    """Kafka's spelling of a UUID: URL-safe base64 without padding; a leading '-' would be read as an option."""
    text = base64.urlsafe_b64encode(identity.bytes).decode().rstrip("=")
    return text if not text.startswith("-") else "A" + text[1:]


class Redis:
    """One Redis with an append-only file."""

    name = "redis"
    start_timeout_s = 20.0
    cause_pattern = r"#|[Ff]atal|[Ee]rror"

    def __init__(self, state_dir: Path, port: int) -> None:
        self._folder = state_dir / "redis"
        self._port = port
        self._is_ready = False

    def endpoints(self) -> dict[str, str]:
        """Where clients find it."""
        return {"redis": f"redis://{LOOPBACK}:{self._port}/0"}

    def require(self) -> None:
        """Raises StackError when there is no redis-server on this machine."""
        if shutil.which("redis-server") is None:
            raise StackError("redis: no 'redis-server' on PATH; run `make setup`, or install Redis 7", 3)

    def prepare(self) -> None:
        """Write the configuration."""
        self._is_ready = False
        self._folder.mkdir(parents=True, exist_ok=True)
        settings = {
            "bind": LOOPBACK,
            "port": str(self._port),
            "dir": f'"{self._folder}"',
            "appendonly": "yes",
            "save": '""',
            "daemonize": "no",
            "maxmemory": "256mb",
            "maxmemory-policy": "noeviction",
        }
        (self._folder / "redis.conf").write_text("".join(f"{key} {value}\n" for key, value in settings.items()))

    def command(self) -> list[str]:
        """The server in the foreground."""
        return ["redis-server", str(self._folder / "redis.conf")]

    def environment(self) -> dict[str, str]:
        """Nothing of its own."""
        return {}

    def check(self) -> str | None:
        """'' once, at the first answer to PING; None before and after."""
        if self._is_ready:
            return None
        client = redis.Redis(host=LOOPBACK, port=self._port, socket_timeout=1, socket_connect_timeout=1)
        try:
            client.ping()
        except (redis.ConnectionError, redis.TimeoutError):
            return None
        finally:
            client.close()
        self._is_ready = True
        return ""

    def clean(self) -> None:
        """Leaves nothing outside its folder."""
