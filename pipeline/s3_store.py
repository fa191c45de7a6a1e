"""A root of files that is a prefix in a bucket of an S3-compatible store.

There is no rename in S3: of a folder's files the `head` is put last, and is the first to go. Between them and after, a
killed command leaves files that nobody looks at; the next one completes or replaces them. Called through `stores`.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from pipeline.errors import CheckError
from pipeline.model_files import HARMLESS, sha256
from pipeline.places import S3Address
from pipeline.s3_bucket import Bucket
from pipeline.s3_lock import S3Lock

# Times of objects are whole seconds, and Triton takes a model for unchanged while its newest file has the time it saw.
_TICK_S = 1.0


class S3Store:
    """See `stores.Store`; any thread may read."""

    def __init__(self, address: S3Address) -> None:
        self._bucket = Bucket(address)
        self._lock = S3Lock(self._bucket)

    def path(self, name: str = "") -> str:
        return self._bucket.path(name)

    def exists(self) -> bool:
        """A prefix is there as soon as its bucket is. Raises DependencyError when that is not."""
        self._bucket.require()
        return True

    def names(self, pattern: str) -> list[str]:
        return [name for name in self._bucket.list(_literal(pattern)) if _matches(name, pattern)]

    def folders(self, pattern: str) -> list[str]:
        depth = pattern.count("/") + 1
        parts = (name.split("/") for name in self._bucket.list(_literal(pattern)))
        found = {"/".join(part[:depth]) for part in parts if len(part) > depth}
        return sorted(name for name in found if _matches(name, pattern))

    def read(self, name: str) -> bytes | None:
        found = self._bucket.get(name)
        return None if found is None else found.content

    def digest(self, name: str) -> str | None:
        return self._bucket.digest(name)

    def write(self, name: str, content: bytes) -> bytes | None:
        found = self._bucket.get(name)
        if found is None:
            self._bucket.put(name, content, None)
            return None
        if found.content != content:
            if found.is_new:
                time.sleep(_TICK_S)
            self._bucket.put(name, content, found.etag)
        return found.content

    def add(self, tree: Path, folder: str, *, head: str, instead: bool = False) -> bool:
        files = {path.relative_to(tree).as_posix(): path for path in tree.rglob("*") if path.is_file()}
        there = {name.removeprefix(f"{folder}/"): etag for name, etag in self._bucket.list(f"{folder}/").items()}
        same = {name for name in files.keys() & there.keys() if self.digest(f"{folder}/{name}") == sha256(files[name])}
        others = [name for name in there.keys() - same if name.rpartition("/")[2] not in HARMLESS]
        if others and not instead:
            words = f"{self.path(folder)} holds other files than the version: {', '.join(sorted(others))}"
            raise CheckError(words, hint="find out who wrote them, and remove them")
        for name in sorted(files.keys() - same, key=lambda name: (name == head, name)):
            self.hold()
            with files[name].open("rb") as file:
                self._bucket.put(f"{folder}/{name}", file, there.get(name))
        for name in there.keys() - files.keys() if instead else ():
            self._bucket.delete(f"{folder}/{name}")
        return bool(files.keys() - same)

    def remove(self, name: str, *, head: str = "") -> None:
        under = self._bucket.list(f"{name}/")
        for each in sorted(under, key=lambda each: (each != f"{name}/{head}", each)):
            self._bucket.delete(each)
        if not under:
            self._bucket.delete(name)

    def fetch(self, folder: str, into: Path | None) -> Path:
        if into is None:
            raise RuntimeError("copies are made under `locked` alone")
        for name in self._bucket.list(f"{folder}/"):
            if ".." in name.split("/") or name.startswith("/"):
                raise CheckError(f"{self.path(name)} leads out of its folder", hint="find out who wrote it; remove it")
            path = into / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.read(name) or b"")
        return into / folder

    @contextmanager
    def incoming(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="logicrd-models-") as folder:
            yield Path(folder)

    @contextmanager
    def locked(self) -> Iterator[None]:
        with self._lock.held():
            yield

    def hold(self) -> None:
        self._lock.require()


def _literal(pattern: str) -> str:
    """Give what all names begin with that match; they are listed by it."""
    found = re.search(r"[*?[]", pattern)
    return pattern if found is None else pattern[: found.start()]


def _matches(name: str, pattern: str) -> bool:
    parts, patterns = name.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))
