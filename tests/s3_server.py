"""A real S3 server for tests, versitygw on a folder: buckets are its folders, objects their files."""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from processes import answers, free_ports

GATEWAY = Path(__file__).resolve().parents[1] / ".cache/bin/versitygw"
KEYS = {"AWS_ACCESS_KEY_ID": "line", "AWS_SECRET_ACCESS_KEY": "sesame-street", "AWS_REGION": "us-east-1"}
BUCKET = "models"
_START_S = 30.0


@dataclass
class S3Server:
    """A server of one bucket, which can be stopped and started again on its port."""

    folder: Path
    certificate: Path | None = None
    port: int = 0
    process: subprocess.Popen[bytes] | None = None

    @property
    def buckets(self) -> Path:
        """Beside it lie ETags and checksums, for file systems without extended attributes."""
        return self.folder / "buckets"

    @property
    def endpoint(self) -> str:
        return f"{'http' if self.certificate is None else 'https'}://127.0.0.1:{self.port}"

    def address(self, prefix: str) -> str:
        return f"s3://{self.endpoint}/{BUCKET}/{prefix}"

    def start(self) -> None:
        for folder in (self.buckets / BUCKET, self.folder / "etags"):
            folder.mkdir(parents=True, exist_ok=True)
        self.port = self.port or free_ports(1)[0]
        tls = [] if self.certificate is None else ["--cert", str(self.certificate), "--key", str(self.certificate)]
        options = ["--port", f"127.0.0.1:{self.port}", "--region", KEYS["AWS_REGION"], "--quiet", *tls]
        keys = {"ROOT_ACCESS_KEY": KEYS["AWS_ACCESS_KEY_ID"], "ROOT_SECRET_KEY": KEYS["AWS_SECRET_ACCESS_KEY"]}
        with (self.folder / "log").open("ab") as log:
            command = [str(GATEWAY), *options, "posix", "--sidecar", str(self.folder / "etags"), str(self.buckets)]
            self.process = subprocess.Popen(command, env=keys, stdout=log, stderr=log)
        until = time.monotonic() + _START_S
        while not answers(self.port):
            if self.process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"versitygw did not start: {(self.folder / 'log').read_text()[-2000:]}")
            time.sleep(0.05)

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(20)
            self.process = None

    def objects(self, prefix: str = "") -> dict[str, bytes]:
        """Read the bucket past the server."""
        root = self.buckets / BUCKET
        found = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
        return {name: path.read_bytes() for name, path in found.items() if name.startswith(prefix)}
