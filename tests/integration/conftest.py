"""What the integration tests share besides the stack: a Kafka that asks who is there, triggers, limits for all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from kafka import KafkaProducer
from secure_broker import SecureBroker, secure_broker


@pytest.fixture(scope="session")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureBroker]:
    """A real broker with TLS, logins and ACLs; one for all tests."""
    with secure_broker(tmp_path_factory.mktemp("secure")) as broker:
        yield broker


@pytest.fixture
def lenient(stack: Any, products: list[str]) -> Iterator[None]:
    """Limits that no picture reaches: a part that is whole is OK."""
    server = redis.Redis.from_url(stack.endpoints["redis"])
    models = Path(__file__).resolve().parents[2] / "models_repo"
    for product in products[:2]:
        sha = json.loads((models / product / "manifest.json").read_text())["model_sha256"]
        fields = {"ng": "1e9", "review": "1e9", "version": "1", "model_sha256": sha}
        server.hset(f"logicrd:threshold:{product}", mapping=fields)
    yield
    server.delete(*(f"logicrd:threshold:{product}" for product in products[:2]))


@pytest.fixture
def send(stack: Any) -> Iterator[Callable[..., None]]:
    """Send a trigger, or raw bytes; returns once the broker has it."""
    producer = KafkaProducer(bootstrap_servers=[stack.endpoints["kafka"]], acks="all")

    def send(line: str, part_id: str = "", *, station: str = "here", raw: bytes | None = None, **fields: Any) -> None:
        data = {"partId": part_id, "station": station, "line": line, **fields}
        value = json.dumps(data).encode() if raw is None else raw
        producer.send("inspection.trigger.v1", key=f"{line}/{station}".encode(), value=value).get(timeout=10)

    yield send
    producer.close()
