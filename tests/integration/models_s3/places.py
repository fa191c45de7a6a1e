"""Repositories in a bucket of a real S3 server, and locks that are given up sooner than in life."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from exported import PRODUCT
from s3_server import BUCKET, S3Server

from pipeline import s3_lock
from pipeline.model_repository import ModelRepository
from pipeline.places import parse_place
from pipeline.s3_bucket import Bucket
from pipeline.s3_lock import S3Lock
from pipeline.stores import store_of


def in_a_hurry(lease_s: float) -> Callable[[S3Lock], str | None]:
    """Take a lock that is not renewed for so long; those who hold one may still be slow to renew it."""
    free = S3Lock._free

    def hurried(lock: S3Lock) -> str | None:
        whole_s, s3_lock.LEASE_S = s3_lock.LEASE_S, lease_s
        try:
            return free(lock)
        finally:
            s3_lock.LEASE_S = whole_s

    return hurried


class Place:
    """A repository of a test's own in the bucket; `disk` is the same, read past the server."""

    def __init__(self, server: S3Server, prefix: str) -> None:
        self.server, self.prefix = server, prefix
        self.address = server.address(prefix)
        self.root = server.buckets / BUCKET
        self.disk = ModelRepository(self.root / prefix, self.root / f"{prefix}.versions")

    def open(self) -> ModelRepository:
        """As a command does it, with a client of its own."""
        store_of.cache_clear()
        return ModelRepository(parse_place(self.address), parse_place(f"{self.address}.versions"))

    def objects(self) -> dict[str, bytes]:
        found = self.server.objects(self.prefix)
        return {name: content for name, content in found.items() if not name.endswith("/lock")}

    def push(self, folder: Path) -> bool:
        repository = self.open()
        with repository.locked():
            return repository.push(folder)[1]

    def seed(self, folder: Path) -> None:
        """Put an exported repository there, as an operator would with any tool."""
        bucket = Bucket(parse_place(self.address))
        for path in folder.rglob("*"):
            if path.is_file():
                bucket.put(path.relative_to(folder).as_posix(), path.read_bytes(), None)
        version = json.loads((folder / PRODUCT / "manifest.json").read_text())["version"]
        bucket.put(f"{PRODUCT}/{version}/.gitkeep", b"", None)
