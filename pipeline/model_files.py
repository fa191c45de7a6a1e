"""Files of a model repository, moved so that a killed command or a power cut leaves each whole or absent.

Nothing here knows what a model is. Called by `folder_store` and `model_repository`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from pipeline.errors import CheckError

# What Git and Python leave in a folder of files, and no server reads.
HARMLESS = frozenset({".gitkeep", "__pycache__"})
_CHUNK = 1 << 20


def sha256(path: Path) -> str:
    """Hash a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def copy_file(source: Path, target: Path) -> None:
    """Copy a regular file. Raises CheckError for a link and for what is not there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        # A link could lead anywhere; a pipe would never end.
        number = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        reason = "is a link" if source.is_symlink() else error.strerror
        raise CheckError(f"{source}: {reason}", hint="nothing was changed; export the product again") from None
    with os.fdopen(number, "rb") as reader, target.open("wb") as writer:
        shutil.copyfileobj(reader, writer, _CHUNK)


def link(source: Path, target: Path) -> None:
    """Give a file one more name. Raises CheckError."""
    try:
        os.link(source, target)
    except OSError as error:
        raise CheckError(
            f"{target.parent}: no link to {source}: {error.strerror}",
            hint="triton.model_store and triton.models_repo must lie on one file system that has hard links",
        ) from None


def move_in(source: Path, target: Path) -> bool:
    """Rename a folder into place. One that is there has to hold the same files: a shared teacher's, or a second try.

    Names in `HARMLESS` are not compared. Gives whether the folder is new. Raises CheckError.
    """
    if not target.exists():
        flush(source)
        try:
            source.rename(target)
        except OSError as error:
            raise CheckError(f"{target}: {error.strerror}", hint="check the rights of this user") from None
        flush_folder(target.parent)
        return True
    wanted = {path.name: sha256(path) for path in source.iterdir() if path.name not in HARMLESS}
    present = {path.name: sha256(path) for path in target.iterdir() if path.name not in HARMLESS and path.is_file()}
    if wanted != present:
        raise CheckError(f"{target} holds other files than the version", hint="find out who wrote them, and remove it")
    return False


def replace(path: Path, content: bytes) -> None:
    """Write a file so that readers see the old one or the new one, also after a power cut."""
    number, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(number, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def flush(tree: Path) -> None:
    """Bring a tree to the disk."""
    for folder, _, names in os.walk(tree):
        for name in names:
            flush_folder(Path(folder) / name)
        flush_folder(Path(folder))


def flush_folder(path: Path) -> None:
    """Bring a folder's own entries to the disk, or a file."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
