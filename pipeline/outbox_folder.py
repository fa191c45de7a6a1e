"""Looks at an outbox's folder as a worker will find it: what `logicrd check` says of it.

Leaves nothing there, and takes nothing from a worker that uses it. Called by the command line.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import Outbox as Settings
from pipeline.errors import CheckError, ConfigError
from pipeline.journal import segment_files

_PROBE_BYTES = 64 * 1024
_MB = 1024 * 1024
_MOUNTS = Path("/proc/self/mountinfo")
_NETWORK = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs", "lustre", "beegfs"}
_NETWORK |= {f"fuse.{name}" for name in ("sshfs", "glusterfs", "s3fs", "rclone", "ceph")}
_REMEDY = "name a folder on a local disk that this worker may write to, or null to go without an outbox"
# What a file system means for events that have to outlive the worker.
_DOUBTS = {
    **dict.fromkeys(_NETWORK, "a disk of the network: its locks and its word that data are stored cannot be relied on"),
    **dict.fromkeys(("tmpfs", "ramfs"), "memory: events are lost when this machine stops"),
    "overlay": "the container's own layer: events are lost with the container; mount a volume there",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """What is there, in one line, and what speaks against it though a worker would run."""

    said: str
    doubts: tuple[str, ...] = ()


def look(settings: Settings) -> Finding:
    """Try the folder: place, rights, room, and who uses it.

    Raises ConfigError where a worker would not start, and CheckError where it would, and no verdict of it would be OK.
    """
    if settings.dir is None:
        return Finding("no outbox", ("outbox.dir is null: events that Kafka has not got are lost with the worker",))
    folder = settings.dir
    try:
        nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        state = _state(folder, is_there=nearest is folder)
        free, used = shutil.disk_usage(nearest).free, sum(_sizes(folder))
    except OSError as error:
        raise ConfigError(f"outbox.dir {folder}: {error.strerror}", hint=_REMEDY) from None
    try:
        _write(nearest)
    except OSError as error:
        if nearest is not folder:
            raise ConfigError(f"outbox.dir {folder}: cannot be made: {error.strerror}", hint=_REMEDY) from None
        words = f"outbox.dir {folder}: cannot be written: {error.strerror}: no verdict would be OK"
        raise CheckError(words, hint="make room, or give the worker's user the right to write there") from None
    system = file_system(nearest.resolve(), _MOUNTS.read_text()) or "unknown file system"
    said = f"outbox {folder}: {state}, holds {used // _MB} of {settings.max_mb} MB, {free // _MB} MB free ({system})"
    return Finding(said, tuple(_doubts(settings, system, free + used)))


def file_system(path: Path, mounts: str) -> str:
    """Give the kind of file system that holds a path, of a process's `mountinfo`; '' where none does."""
    found, depth = "", 0
    for line in mounts.splitlines():
        place, _, rest = line.partition(" - ")
        point = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), place.split()[4]))
        if path.is_relative_to(point) and len(point.parts) >= depth:  # of two at one place the later one is seen
            found, depth = rest.split()[0], len(point.parts)
    return found


def _state(folder: Path, *, is_there: bool) -> str:
    """Say whose the folder is. Raises OSError."""
    if not is_there:
        return "made by the first run"
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        # The journal locks the folder. A shared lock harms no worker that runs, and is gone at once.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return "in use by a worker"
    finally:
        os.close(descriptor)
    return "in use by nobody"


def _sizes(folder: Path) -> Iterator[int]:
    """Give the bytes of each file of events. Raises OSError."""
    for path in segment_files(folder):
        with contextlib.suppress(FileNotFoundError):  # a worker has just removed it
            yield path.stat().st_size


def _write(folder: Path) -> None:
    """Store something durably in a file without a name. Raises OSError."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(_PROBE_BYTES))
        file.flush()
        os.fdatasync(file.fileno())


def _doubts(settings: Settings, system: str, room: int) -> list[str]:
    doubts = [f"outbox.dir {settings.dir} is on {system}, {_DOUBTS[system]}"] if system in _DOUBTS else []
    if room < settings.max_bytes:
        doubts.append(
            f"outbox.max_mb is {settings.max_mb}, and its disk has room for {room // _MB} MB: it is full before that"
        )
    return doubts
