"""A root of files that is a folder of this machine or of a share: renames make what is written whole or absent.

Called through `stores`.
"""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from pipeline.errors import CheckError
from pipeline.model_files import flush, flush_folder, move_in, replace, sha256

_INCOMING = ".incoming-"


class FolderStore:
    """See `stores.Store`."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def path(self, name: str = "") -> str:
        return str(self._root / name)

    def exists(self) -> bool:
        return self._root.is_dir()

    def names(self, pattern: str) -> list[str]:
        return self._found(pattern, folders=False)

    def folders(self, pattern: str) -> list[str]:
        return self._found(pattern, folders=True)

    def read(self, name: str) -> bytes | None:
        try:
            return (self._root / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def digest(self, name: str) -> str | None:
        path = self._root / name
        return sha256(path) if path.is_file() else None

    def write(self, name: str, content: bytes) -> bytes | None:
        before = self.read(name)
        if before != content:
            replace(self._root / name, content)
        return before

    def add(self, tree: Path, folder: str, *, head: str, instead: bool = False) -> bool:
        del head  # one rename brings all of it
        target = self._root / folder
        target.parent.mkdir(exist_ok=True)
        if not instead:
            return move_in(tree, target)
        flush(tree)
        if target.exists():
            target.rename(tree.with_name(tree.name + "-replaced"))
        tree.rename(target)
        flush_folder(target.parent)
        return True

    def remove(self, name: str, *, head: str = "") -> None:
        path = self._root / name
        if not path.is_dir():
            path.unlink(missing_ok=True)
            return
        if head:
            (path / head).unlink(missing_ok=True)
        shutil.rmtree(path)

    def fetch(self, folder: str, into: Path | None) -> Path:
        del into  # it is here
        return self._root / folder

    @contextmanager
    def incoming(self) -> Iterator[Path]:
        stage = Path(tempfile.mkdtemp(prefix=_INCOMING, dir=self._root))
        stage.chmod(0o755)
        try:
            yield stage
        finally:
            self._sweep(stage.name)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Also remove what a killed command left half copied."""
        self._root.mkdir(parents=True, exist_ok=True)
        with (self._root / "lock").open("w") as lock:
            self._lock(lock)
            self._sweep(_INCOMING)
            yield

    def hold(self) -> None:
        """A folder's lock lasts as long as the command does."""

    def _lock(self, lock: IO[str]) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckError(f"another command is at work on {self._root}", hint="try again when it ends") from None

    def _sweep(self, begins: str) -> None:
        for left in self._root.glob(f"{begins}*"):
            shutil.rmtree(left)

    def _found(self, pattern: str, *, folders: bool) -> list[str]:
        found = (path for path in self._root.glob(pattern) if path.is_dir() is folders)
        return sorted(str(path.relative_to(self._root)) for path in found)
