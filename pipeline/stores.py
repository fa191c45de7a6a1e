"""Files under one root, in a folder or in a bucket: what the model repository is made of, and how it is opened.

Names are relative, `a/b/c`. A folder of files counts as a whole by its `head`, the file that readers look for: it comes
last and goes first, so that what a killed command leaves is not seen. Called by all that read or write a repository.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from pipeline.folder_store import FolderStore
from pipeline.places import S3Address, Where
from pipeline.s3_store import S3Store


class Store(Protocol):
    """A root. A bucket raises DependencyError where it does not answer or refuses, a folder OSError."""

    def path(self, name: str = "") -> str:
        """Tell where a file is, for messages."""

    def exists(self) -> bool:
        """Whether the root itself is there."""

    def names(self, pattern: str) -> list[str]:
        """List the files whose names match, sorted; `*` is within one part of a name."""

    def folders(self, pattern: str) -> list[str]:
        """List the folders whose names match, sorted."""

    def read(self, name: str) -> bytes | None:
        """Give a file's bytes; None when it is not there."""

    def digest(self, name: str) -> str | None:
        """Give a file's SHA-256 in hexadecimal digits, in a bucket as its server has it; None when it is not there."""

    def write(self, name: str, content: bytes) -> bytes | None:
        """Replace a file as a whole; gives what was there, and leaves alone what is the same."""

    def add(self, tree: Path, folder: str, *, head: str, instead: bool = False) -> bool:
        """Make a folder of the files in `tree`, which may be moved; whether it was not there, or not whole.

        `instead` takes the place of a folder that is there; without it, that one must hold the same files. Raises
        CheckError.
        """

    def remove(self, name: str, *, head: str = "") -> None:
        """Remove a file, or a folder with all that is in it; nothing when it is not there."""

    def fetch(self, folder: str, into: Path | None) -> Path:
        """Give a folder as one of this machine: itself, or a copy below `into`."""

    def incoming(self) -> AbstractContextManager[Path]:
        """An empty folder of this machine for what is not whole yet; it goes at the end."""

    def locked(self) -> AbstractContextManager[None]:
        """Keep other commands out. Raises CheckError when one is at work."""

    def hold(self) -> None:
        """Raise CheckError when the lock is lost, and another command may be at work."""


@lru_cache(maxsize=16)
def store_of(place: Where) -> Store:
    """Open a place; connects to nothing yet."""
    return S3Store(place) if isinstance(place, S3Address) else FolderStore(place)
