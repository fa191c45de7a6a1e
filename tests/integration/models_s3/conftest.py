"""A real S3 server with TLS, an environment for the SDK, and a repository of each test's own in the bucket."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from integration.models_s3.places import Place, in_a_hurry
from s3_server import KEYS, S3Server

from pipeline import s3_lock
from pipeline.s3_lock import S3Lock
from pipeline.stores import store_of


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A server with TLS, known by a certificate of its own."""
    folder = tmp_path_factory.mktemp("s3")
    certificate = folder / "server.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=s3"
    files = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(certificate), "-out", str(folder / "ca.pem")]
    subprocess.run([*command.split(), *files], check=True, capture_output=True)
    certificate.write_text(certificate.read_text() + (folder / "ca.pem").read_text())
    made = S3Server(folder, certificate)
    made.start()
    yield made
    made.stop()


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch, server: S3Server) -> None:
    """The SDK's environment, and nothing of this machine's."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    nothing = {"AWS_CONFIG_FILE": "/dev/null", "AWS_SHARED_CREDENTIALS_FILE": "/dev/null"}
    for name, value in (KEYS | nothing | {"AWS_CA_BUNDLE": str(server.folder / "ca.pem")}).items():
        monkeypatch.setenv(name, value)
    store_of.cache_clear()
    monkeypatch.setattr(s3_lock, "_RENEW_S", 0.4)
    monkeypatch.setattr(s3_lock, "_LOOK_S", 0.3)
    monkeypatch.setattr(s3_lock, "LEASE_S", s3_lock.LEASE_S)  # threads in a hurry may leave another one
    monkeypatch.setattr(S3Lock, "_free", in_a_hurry(4.0))


@pytest.fixture
def place(server: S3Server, tmp_path: Path) -> Place:
    return Place(server, tmp_path.name.replace("_", "-"))
