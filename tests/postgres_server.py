"""A real PostgreSQL on loopback and a free port, from Debian's package; as another user where the tests run as root."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType

import psycopg


def binaries() -> Path:
    """Folder of the newest server on this machine."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    assert found, "no PostgreSQL server on this machine: `make setup` installs it"
    return found[-1].parent


class Postgres:
    """One server with an empty data base `mes`, running inside the block."""

    def __enter__(self) -> Postgres:
        self._folder = Path(tempfile.mkdtemp(prefix="logicrd-postgres-"))
        self._as_user = ["setpriv", "--pdeathsig", "KILL"]
        if os.getuid() == 0:  # the server refuses to run as root
            self._as_user += ["--reuid", "nobody", "--regid", "nogroup", "--clear-groups"]
            shutil.chown(self._folder, "nobody", "nogroup")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        data = ["-D", str(self._folder / "data")]
        initdb = [
            str(binaries() / "initdb"),
            *data,
            "--no-sync",
            "-A",
            "trust",
            "-U",
            "mes",
            "-E",
            "UTF8",
            "--locale=C",
        ]
        subprocess.run([*self._as_user, *initdb], check=True, capture_output=True, timeout=120, cwd="/")
        self._process: subprocess.Popen[bytes] | None = None
        self.start()
        with psycopg.connect(self.address("postgres"), autocommit=True) as database:
            database.execute("CREATE DATABASE mes")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGQUIT)  # PostgreSQL's word for: at once
        self._process.wait(30)
        shutil.rmtree(self._folder)

    def address(self, database: str = "mes") -> str:
        """Connection string."""
        return f"host=127.0.0.1 port={self._port} dbname={database} user=mes connect_timeout=5"

    def start(self) -> None:
        """Start the server and wait until it answers; after a crash it recovers first."""
        options = ["-D", str(self._folder / "data"), "-k", "", "-h", "127.0.0.1", "-p", str(self._port)]
        with (self._folder / "log").open("ab") as log:
            command = [*self._as_user, str(binaries() / "postgres"), *options]
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd="/")
        until = time.monotonic() + 60
        while not self._answers():
            assert time.monotonic() < until, (self._folder / "log").read_text()
            time.sleep(0.1)

    def _answers(self) -> bool:
        try:
            psycopg.connect(self.address("postgres")).close()
        except psycopg.OperationalError:
            return False
        return True

    def crash(self) -> None:
        """Kill the server and its sessions as a power cut would, without a word."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGQUIT)
        self._process.wait(30)
