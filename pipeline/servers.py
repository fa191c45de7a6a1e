"""The servers that a line works with: where they are and how they are reached; part of the line file.

Settings alone: nothing here connects. Read by `config` and by the client of each server.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from pipeline.cameras import Block, Positive, without_credentials

_ADDRESS = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}")


class Triton(Block):
    """The inference server."""

    address: str | list[str] = "127.0.0.1:18001"
    """gRPC address, `host:port`, or a list of them. Every address that a name stands for is a replica: name a headless
    service of Kubernetes, not one with an address of its own."""
    resolve_interval_s: Positive = 10.0
    """How often names are looked up again: a new replica gets its share, and one that is gone is left, this much later
    at most, and a probe of it."""
    models_repo: Path = Path("models_repo")
    """The model repository that the server serves; the line reads the manifests in it."""
    max_in_flight: Annotated[int, Field(ge=1, le=64)] = 3
    """Batches under way at once, over all replicas; more fills the servers' gaps, fewer makes larger batches."""
    startup_timeout_s: Positive = 10.0
    """How long the start waits for a replica to be ready."""

    @field_validator("address")
    @classmethod
    def _are_addresses(cls, address: str | list[str]) -> str | list[str]:
        if not address:
            raise ValueError("name at least one address, `host:port`")
        for each in [address] if isinstance(address, str) else address:
            if not _ADDRESS.fullmatch(each) or not 0 < int(each.rpartition(":")[2]) <= 65535:
                raise ValueError(f"{each!r} is not `host:port`")
        return address

    @property
    def addresses(self) -> list[str]:
        """The addresses, each once, as they are written."""
        return list(dict.fromkeys([self.address] if isinstance(self.address, str) else self.address))


class Kafka(Block):
    """Where verdicts go."""

    bootstrap: Annotated[list[str], Field(min_length=1)] = Field(default=["127.0.0.1:19092"])
    """Brokers, `host:port` each."""
    topic_prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,200}$")] = "inspection"
    """Topics are `<prefix>.verdict.v1`, `.view.v1`, `.status.v1`, `.audit.v1`, `.dlq.v1`; in: `<prefix>.trigger.v1`."""
    content_mode: Literal["binary", "structured"] = "binary"
    """CloudEvents content mode: attributes as `ce_` headers, or all in one JSON value."""
    max_unacknowledged: Annotated[int, Field(ge=1, le=1_000_000)] = 10_000
    """Events held in memory: without an outbox until the broker acknowledges them, with one while the disk does not
    take them. One more is refused and counted as lost."""
    startup_timeout_s: Positive = 10.0
    """How long the start waits for the brokers."""


class Redis(Block):
    """Where thresholds live."""

    url: Annotated[str, Field(pattern=r"^(redis|rediss|unix)://")] = "redis://127.0.0.1:16379/0"
    """Server and data base, without a password."""
    password_file: Path | None = None
    """File that holds the password, and nothing else."""

    @field_validator("url")
    @classmethod
    def _no_credentials(cls, url: str) -> str:
        return without_credentials(url)

    refresh_s: Positive = 30.0
    """How often thresholds are read again, whether or not a change was announced."""
    snapshot: Path | None = None
    """File for the last known good thresholds: used when Redis is down at start."""
