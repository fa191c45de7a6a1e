"""The servers that a line works with: where they are and how they are reached; part of the line file.

Settings alone: nothing here connects. Read by `config` and by the client of each server.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.cameras import Block, Positive, without_credentials
from pipeline.places import Place, Where, beside, is_within

_ADDRESS = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}")


class Tls(Block):
    """How a server is known, and how it knows the line. Every certificate and its name are checked, always."""

    ca_file: Path | None = None
    """Authorities that vouch for the server, in PEM. Unset: those of this machine."""
    certificate_file: Path | None = None
    """Certificate of this line, in PEM, where the server asks for one."""
    key_file: Path | None = None
    """Its key, in PEM, without a password."""

    @model_validator(mode="after")
    def _are_a_pair(self) -> Tls:
        if (self.certificate_file is None) is not (self.key_file is None):
            raise ValueError("`certificate_file` and `key_file` go together")
        return self


class Triton(Block):
    """The inference server."""

    address: str | list[str] = "127.0.0.1:18001"
    """gRPC address, `host:port`, or a list of them. Every address that a name stands for is a replica: name a headless
    service of Kubernetes, not one with an address of its own."""
    tls: Tls | None = None
    """Speak TLS; the server's certificate is for the name in `address`. Unset: plain text."""
    resolve_interval_s: Positive = 10.0
    """How often names are looked up again: a new replica gets its share, and one that is gone is left, this much later
    at most, and a probe of it."""
    models_repo: Place = Path("models_repo")
    """The model repository that the server serves; the line reads the manifests in it. A folder, or a bucket as Triton
    names it: `s3://https://host:port/bucket/prefix`, or `s3://bucket/prefix` for AWS. Keys are taken from the SDK's
    environment or files. Needs the extra `logicrd[s3]`."""
    max_in_flight: Annotated[int, Field(ge=1, le=64)] = 3
    """Batches under way at once for each replica; more fills the server's gaps, fewer makes larger batches."""
    startup_timeout_s: Positive = 10.0
    """How long the start waits for a replica to be ready."""
    model_store: Place | None = None
    """Where every version is that `logicrd models push` took: a folder on the file system of `models_repo`, or a bucket
    where that is one; unset: beside it, `<models_repo>.versions`."""
    control_key_file: Path | None = None
    """File of the key for Triton's model control, the value of its header `triton-grpc-protocol-logicrd`; only
    `logicrd models` uses it."""
    signer_file: Path | None = None
    """Public keys of Ed25519, one or several, in a file in PEM: neither `logicrd models` nor a worker takes a version
    whose manifest none of them signed. Unset: any."""

    @field_validator("address")
    @classmethod
    def _are_addresses(cls, address: str | list[str]) -> str | list[str]:
        if not address:
            raise ValueError("name at least one address, `host:port`")
        for each in [address] if isinstance(address, str) else address:
            if not _ADDRESS.fullmatch(each) or not 0 < int(each.rpartition(":")[2]) <= 65535:
                raise ValueError(f"{each!r} is not `host:port`")
        return address

    @model_validator(mode="after")
    def _are_two_of_one_kind(self) -> Triton:
        if isinstance(self.models_repo, Path) is not isinstance(self.versions, Path):
            raise ValueError("`models_repo` and `model_store` are two folders or two addresses `s3://...`")
        if is_within(self.versions, self.models_repo) or is_within(self.models_repo, self.versions):
            raise ValueError("`models_repo` and `model_store` lie in one another: name two places side by side")
        return self

    @property
    def versions(self) -> Where:
        """Where every pushed version is."""
        return beside(self.models_repo, ".versions") if self.model_store is None else self.model_store

    @property
    def addresses(self) -> list[str]:
        """The addresses, each once, as they are written."""
        return list(dict.fromkeys([self.address] if isinstance(self.address, str) else self.address))


class Sasl(Block):
    """How the line logs in to Kafka."""

    mechanism: Literal["SCRAM-SHA-512", "SCRAM-SHA-256", "PLAIN"] = "SCRAM-SHA-512"
    """How the password is proved. `PLAIN` sends it as it is, and is refused without `tls`."""
    username: Annotated[str, Field(min_length=1)]
    """User of Kafka."""
    password_file: Path
    """File that holds the password, and nothing else."""


class Kafka(Block):
    """Where verdicts go."""

    bootstrap: Annotated[list[str], Field(min_length=1)] = Field(default=["127.0.0.1:19092"])
    """Brokers, `host:port` each."""
    tls: Tls | None = None
    """Speak TLS; `{}` trusts the authorities of this machine. Unset: plain text."""
    sasl: Sasl | None = None
    """Log in with user and password. Unset: no login, or that of the certificate in `tls`."""
    topic_prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,200}$")] = "inspection"
    """Topics are `<prefix>.verdict.v1`, `.view.v1`, `.status.v1`, `.audit.v1`, `.dlq.v1`; in: `<prefix>.trigger.v1`."""
    content_mode: Literal["binary", "structured"] = "binary"
    """CloudEvents content mode: attributes as `ce_` headers, or all in one JSON value."""
    max_unacknowledged: Annotated[int, Field(ge=1, le=1_000_000)] = 10_000
    """Events held in memory: without an outbox until the broker acknowledges them, with one while the disk does not
    take them. One more is refused and counted as lost."""
    startup_timeout_s: Positive = 10.0
    """How long the start waits for the brokers."""
    required_at_start: bool = True
    """Whether a start ends with exit code 4 when Kafka cannot be used. `false`: the worker begins all the same, keeps
    its verdicts in the outbox, is not ready (`kafka`) and delivers once Kafka is there. Not for a worker with a `pool`,
    with triggers by message, or without an outbox."""

    @model_validator(mode="after")
    def _hides_the_password(self) -> Kafka:
        if self.sasl is not None and self.sasl.mechanism == "PLAIN" and self.tls is None:
            raise ValueError("sasl.mechanism PLAIN sends the password as it is: set `tls`, or take SCRAM-SHA-512")
        return self


class Tracing(Block):
    """Where traces of parts go. Needs the packages of `logicrd[tracing]`, which the worker's image has."""

    address: str
    """A collector that speaks OTLP over gRPC, `host:port`; mostly port 4317."""
    tls: Tls | None = None
    """Speak TLS; the collector's certificate is for the name in `address`. Unset: plain text."""
    share: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.01
    """Share of the parts that are traced, each in whole or not at all; the same ones whoever inspects them."""

    @field_validator("address")
    @classmethod
    def _is_address(cls, address: str) -> str:
        if not _ADDRESS.fullmatch(address):
            raise ValueError(f"{address!r} is not `host:port`")
        return address


class Redis(Block):
    """Where thresholds live."""

    url: Annotated[str, Field(pattern=r"^(redis|rediss|unix)://")] = "redis://127.0.0.1:16379/0"
    """Server and data base, without a password; `rediss://` speaks TLS."""
    user: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{0,64}$")] = ""
    """ACL user of Redis; empty: its `default`."""
    password_file: Path | None = None
    """File that holds the password, and nothing else."""
    ca_file: Path | None = None
    """PEM file of the authority that signed the server's certificate, beside those that the system trusts."""
    certificate_file: Path | None = None
    """PEM file of a client certificate, for a server that asks for one."""
    key_file: Path | None = None
    """PEM file of its private key, without a passphrase."""
    refresh_s: Positive = 30.0
    """How often thresholds are read again, whether or not a change was announced."""
    snapshot: Path | None = None
    """File for the last known good thresholds: used when Redis is down at start, or holds older ones."""

    @field_validator("url")
    @classmethod
    def _address_alone(cls, url: str) -> str:
        # The client library takes every setting from the query, a password and the end of all checks among them.
        if re.search(r"[?&](?!db=[0-9]+(&|$))", url) or "#" in url:
            raise ValueError("settings do not belong in the address; `?db=1` alone may follow a socket's path")
        return without_credentials(url)

    @model_validator(mode="after")
    def _tls_fits(self) -> Redis:
        if (self.ca_file or self.certificate_file or self.key_file) and not self.url.startswith("rediss://"):
            raise ValueError("`ca_file`, `certificate_file` and `key_file` need an address with `rediss://`")
        if (self.certificate_file is None) != (self.key_file is None):
            raise ValueError("`certificate_file` and `key_file` go together")
        return self
