"""A real Redis server for tests: users and rights of `deploy/config/redis-users.acl`, TLS by a throw-away authority."""

from __future__ import annotations

import re
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis
from processes import free_ports

ROOT = Path(__file__).resolve().parents[1]
ACL_FILE = ROOT / "deploy/config/redis-users.acl"
ADMIN_PASSWORD = "of-the-test"  # noqa: S105
_EC = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc")


@dataclass(frozen=True)
class Certificates:
    """An authority, what it signed for server and client, and another authority that signed nothing here."""

    folder: Path

    def __getattr__(self, name: str) -> Path:
        stem, _, kind = name.rpartition("_")
        return self.folder / f"{stem}.{kind}"


def make_certificates(folder: Path) -> Certificates:
    for authority in ("ca", "other"):
        _openssl(folder, "req", "-x509", *_EC, *_files(authority), "-subj", f"/CN={authority}", "-days", "2")
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1\n")
    for name in ("server", "client"):
        request = ("-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        _openssl(folder, "req", *_EC, *request)
        signing = ("-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "names")
        _openssl(folder, "x509", "-req", "-in", f"{name}.csr", *signing, "-out", f"{name}.crt")
    return Certificates(folder)


def _files(name: str) -> tuple[str, ...]:
    return "-keyout", f"{name}.key", "-out", f"{name}.crt"


def _openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True, timeout=60)


@dataclass
class RedisServer:
    """One redis-server on free ports of loopback; `lines` are added to its configuration."""

    folder: Path
    lines: tuple[str, ...] = ()
    certificates: Certificates | None = None
    users: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> RedisServer:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.port, self.tls_port = free_ports(2)
        acl = ACL_FILE.read_text()
        for user, kind in self.users.items():
            rights = re.search(rf"^user {kind} off (.*)$", acl, re.MULTILINE)
            assert rights is not None, kind
            (self.folder / f"{user}.password").write_text(f"password-of-{user}\n")
            acl += f"user {user} on >password-of-{user} {rights[1]}\n"
        acl = "".join(f"{line}\n" for line in acl.splitlines() if not re.match(r"user \w+ off re", line))
        (self.folder / "users.acl").write_text(f"{acl}user admin on >{ADMIN_PASSWORD} ~* &* +@all\n")
        options = [f"port {self.port}", "bind 127.0.0.1", f"dir {self.folder}", "aclfile users.acl", 'save ""']
        if self.certificates is not None:
            files = {"cert": "server.crt", "key": "server.key", "ca-cert": "ca.crt"}
            options += [f"tls-{key}-file {self.certificates.folder / name}" for key, name in files.items()]
            options += [f"tls-port {self.tls_port}", "tls-auth-clients no"]
        (self.folder / "redis.conf").write_text("\n".join([*options, *self.lines, ""]))
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        log = (self.folder / "redis.log").open("ab")
        self.process = subprocess.Popen(["redis-server", "redis.conf"], cwd=self.folder, stdout=log, stderr=log)
        log.close()
        deadline = time.monotonic() + 30
        while True:
            try:
                with self.admin() as admin:
                    admin.ping()
            except redis.RedisError:
                assert self.process.poll() is None, (self.folder / "redis.log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.05)
            else:
                return

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(20)

    def admin(self) -> redis.Redis:
        """A client that may do everything, as somebody with redis-cli."""
        return redis.Redis(port=self.port, username="admin", password=ADMIN_PASSWORD, decode_responses=True)

    def settings(self, user: str, **more: Any) -> dict[str, Any]:
        """The `redis` block of a line file for one of the users."""
        url = f"redis://127.0.0.1:{self.port}/0"
        return {"url": url, "user": user, "password_file": str(self.folder / f"{user}.password")} | more
