"""An append-only journal on disk: what was appended is there after a crash, in order, until it is acknowledged.

Records lie in segment files, each with a checksum; an append is durable (fdatasync) when it returns. Acknowledgements
are written with the next append, so they cost no wait of their own; the oldest segments of which nothing is left are
removed. Giving things up needs no room, so a full disk empties itself. (SQLite, the other choice, needs room in its log
to delete a row, and its version 3.40 is safe with one connection only, so that nobody else could look in.)

What a crash cut off at the end of a file was never durable, and is passed over. Anything else that cannot be read is
damage: the records around it are kept, and the file is set aside by name instead of removed. One process at a time (the
folder is locked), one thread at a time, on a local disk. Called by `outbox`.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from zlib import crc32

import structlog

from pipeline.errors import ConfigError

SEGMENT_BYTES = 4 * 1024 * 1024
_SUFFIX = ".outbox"
_HEAD = b"LOGICRD-OUTBOX1\n"
_MARK = b"\xd7REC"
# mark; checksum of all that follows; length of the payload; kind; number; milliseconds since 1970
_RECORD = struct.Struct(">4sIIBQQ")
_CHECKED_FROM = 8
_LONGEST = 64 * 1024 * 1024
_ACKNOWLEDGEMENTS = 0
_PROBE_BYTES = 64 * 1024

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Record:
    """One record: `kind` is the caller's, 1..255; `at_ms` is wall clock, since 1970."""

    number: int
    kind: int
    at_ms: int
    payload: bytes


@dataclass(slots=True)
class _Segment:
    """One file. `end` is as far as it is durable, `read_to` as far as it was read, `live` what is unacknowledged."""

    path: Path
    fd: int
    first: int
    end: int = len(_HEAD)
    read_to: int = len(_HEAD)
    live: int = 0
    damaged: bool = False


@dataclass(slots=True)
class _Content:
    """What lies in a file: numbers and kinds of its records, and the acknowledgements, which are of older ones too."""

    numbers: array[int] = field(default_factory=lambda: array("Q"))
    kinds: bytearray = field(default_factory=bytearray)
    acknowledged: array[int] = field(default_factory=lambda: array("Q"))
    damaged: bool = False


class Journal:
    """The records of one folder; `segment_bytes` is how long a file becomes before the next one is begun."""

    def __init__(self, folder: Path, *, segment_bytes: int = SEGMENT_BYTES) -> None:
        self._folder = folder
        self._segment_bytes = segment_bytes
        self.counts: Counter[int] = Counter()
        """Unacknowledged records by kind."""
        self.left = 0
        """The sum of them; to be looked at from any thread."""
        self.damaged = 0
        """Files found damaged."""
        self._segments: list[_Segment] = []
        self._active: _Segment | None = None
        self._gone: set[int] = set()
        self._unwritten = array("Q")
        self._next = 1
        self._lock: int | None = None

    def open(self) -> None:
        """Take the folder for this process and find what an earlier one left. Raises ConfigError, OSError.

        A folder that is there but cannot be written is taken all the same: what it holds can still be delivered.
        """
        if not self._folder.is_dir():
            self._folder.mkdir(parents=True)
        self._lock = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)  # the folder itself: a full disk can lock it
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise ConfigError(
                f"outbox.dir {self._folder}: another worker uses it",
                hint="give each worker a folder of its own: `outbox.dir`, or LOGICRD_OUTBOX__DIR in its environment",
            ) from None
        contents = [content for path in segment_files(self._folder) if (content := self._take(path)) is not None]
        self._gone = {number for content in contents for number in content.acknowledged}
        for segment, content in zip(self._segments, contents, strict=True):
            left = [
                kind for number, kind in zip(content.numbers, content.kinds, strict=True) if number not in self._gone
            ]
            segment.live = len(left)
            self.left += len(left)
            self.counts.update(left)
            self._next = max([self._next, *content.numbers[-1:]])
        self._next += 1
        self._remove_done()

    def append(self, records: Sequence[tuple[int, bytes]], at_ms: int) -> list[int]:
        """Make records (kind, payload) durable, all or none; gives their numbers. Raises OSError."""
        numbers = list(range(self._next, self._next + len(records)))
        self._next += max(1, len(records))  # the numbers of a failed append are never used again
        parts = (
            [_packed(self._next - 1, _ACKNOWLEDGEMENTS, at_ms, _swapped(self._unwritten))] if self._unwritten else []
        )
        parts += [
            _packed(number, kind, at_ms, payload) for number, (kind, payload) in zip(numbers, records, strict=True)
        ]
        segment = self._writable(self._next - max(1, len(records)))
        self._write(segment, b"".join(parts))
        self._unwritten = array("Q")
        segment.live += len(records)
        self.left += len(records)
        self.counts.update(kind for kind, _ in records)
        return numbers

    def acknowledge(self, records: Iterable[tuple[int, int]]) -> None:
        """Note records (number, kind) that are done with, each once. Removes files of which nothing is left."""
        for number, kind in records:
            self._segments[bisect_right(self._segments, number, key=_first) - 1].live -= 1
            self.counts[kind] -= 1
            self.left -= 1
            self._unwritten.append(number)
        self._remove_done()

    def read(self, limit: int) -> list[Record]:
        """Give the next unacknowledged records, at most `limit`; each is given once."""
        found: list[Record] = []
        for segment in self._segments:
            if segment.read_to == segment.end:
                continue
            for offset, record in _records(segment.fd, segment.read_to, segment.end):
                segment.read_to = offset
                if record is None or record.kind == _ACKNOWLEDGEMENTS or record.number in self._gone:
                    continue
                found.append(record)
                if len(found) == limit:
                    return found
            segment.read_to = segment.end
        return found

    def skip(self) -> None:
        """Give nothing of what is stored now."""
        for segment in self._segments:
            segment.read_to = segment.end

    @property
    def behind(self) -> bool:
        """Whether there is more to read."""
        return any(segment.read_to < segment.end for segment in self._segments)

    @property
    def unwritten(self) -> int:
        """How many acknowledgements a crash would forget: as many records would be read once more."""
        return len(self._unwritten)

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(segment.end for segment in self._segments)

    def probe(self) -> None:
        """See that there is room to write. Raises OSError."""
        segment = self._writable(self._next)
        try:
            _write_whole(segment.fd, bytes(_PROBE_BYTES), segment.end)
            os.fdatasync(segment.fd)
        finally:
            with suppress(OSError):
                os.ftruncate(segment.fd, segment.end)

    def clear(self) -> None:
        """Remove every file, when nothing is left in them."""
        if not self.left:
            self._active = None
            self._remove_done()
            self._unwritten = array("Q")

    def close(self) -> None:
        """Let go of the folder."""
        for segment in self._segments:
            os.close(segment.fd)
        self._segments.clear()
        self._active = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _take(self, path: Path) -> _Content | None:
        """Go through a file that an earlier run left; None for one that holds nothing of ours."""
        fd = os.open(path, os.O_RDONLY)
        named = path.stem.isdigit()
        segment = _Segment(path, fd, int(path.stem) if named else 0, end=os.fstat(fd).st_size)
        content = _content(fd, segment.end) if named else _Content(damaged=True)
        segment.damaged = content.damaged
        if content.damaged:
            self.damaged += 1
            log.error(
                "outbox file damaged: what can be read of it is delivered", file=str(path), events=len(content.kinds)
            )
        if not content.numbers and not content.acknowledged:
            self._put_away(segment)
            return None
        self._segments.append(segment)
        return content

    def _writable(self, first: int) -> _Segment:
        """Give the file to append to, a new one where there is none or it is long enough."""
        if self._active is not None and self._active.end < self._segment_bytes:
            return self._active
        path = self._folder / f"{first:020d}{_SUFFIX}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o640)
        try:
            _write_whole(fd, _HEAD, 0)
            if self._lock is not None:
                os.fsync(self._lock)  # the folder's own entry
        except OSError:
            os.close(fd)
            with suppress(OSError):
                path.unlink()
            raise
        self._active = _Segment(path, fd, first)
        self._segments.append(self._active)
        self._remove_done()
        return self._active

    def _write(self, segment: _Segment, data: bytes) -> None:
        """Write at the end, durably, or leave the file as it was."""
        try:
            _write_whole(segment.fd, data, segment.end)
            os.fdatasync(segment.fd)
        except OSError:
            try:
                os.ftruncate(segment.fd, segment.end)
            except OSError:
                self._active = None  # nothing more is written behind what may lie there
            raise
        segment.end += len(data)

    def _remove_done(self) -> None:
        """Remove the oldest files of which nothing is left: acknowledgements in later ones may be of older records."""
        while self._segments and not self._segments[0].live and self._segments[0] is not self._active:
            self._put_away(self._segments.pop(0))

    def _put_away(self, segment: _Segment) -> None:
        """Remove a file that is done with, or set it aside when something in it could not be read."""
        os.close(segment.fd)
        try:
            if segment.damaged:
                aside = segment.path.with_name(f"{segment.path.name}.{int(time.time())}.damaged")
                segment.path.rename(aside)
                log.error("damaged outbox file set aside", file=str(aside))
            else:
                segment.path.unlink()
        except OSError as error:
            log.error("outbox file not removed", file=str(segment.path), error=error.strerror)


def stored(folder: Path) -> Iterator[Record]:
    """Read what a folder holds and no acknowledgement names, oldest first; also while a worker writes to it.

    Raises OSError. A record may be given whose acknowledgement is not written yet.
    """
    descriptors: list[int] = []
    try:
        for path in segment_files(folder):
            with suppress(FileNotFoundError):  # its worker has just removed it: nothing was left in it
                descriptors.append(os.open(path, os.O_RDONLY))
        files = [(fd, os.fstat(fd).st_size) for fd in descriptors]
        gone = {number for fd, size in files for number in _content(fd, size).acknowledged}
        for fd, size in files:
            for _, record in _records(fd, len(_HEAD), size):
                if record is not None and record.kind != _ACKNOWLEDGEMENTS and record.number not in gone:
                    yield record
    finally:
        for fd in descriptors:
            os.close(fd)


def segment_files(folder: Path) -> list[Path]:
    """List the files of events in a folder, oldest first."""
    return sorted(folder.glob(f"*{_SUFFIX}"))


def _first(segment: _Segment) -> int:
    return segment.first


def _content(fd: int, end: int) -> _Content:
    """List what lies in a file."""
    head = os.pread(fd, len(_HEAD), 0)
    content = _Content(damaged=not _HEAD.startswith(head))
    for _, record in _records(fd, len(_HEAD), end):
        if record is None:
            content.damaged = True
        elif record.kind == _ACKNOWLEDGEMENTS:
            content.acknowledged.extend(_unpacked(record.payload))
        else:
            content.numbers.append(record.number)
            content.kinds.append(record.kind)
    return content


def _records(fd: int, offset: int, end: int) -> Iterator[tuple[int, Record | None]]:
    """Go through a file: the offset behind each record, and the record; None for a stretch that cannot be read.

    An unfinished record at the very end is passed over.
    """
    while offset < end:
        record = _record(fd, offset, end)
        if record is not None:
            offset += _RECORD.size + len(record.payload)
            yield offset, record
            continue
        after = _next_mark(fd, offset, end)
        if after < end or not _cut_off(fd, offset, end):
            yield after, None
        offset = after


def _record(fd: int, offset: int, end: int) -> Record | None:
    """Read the record at an offset; None if there is no whole and undamaged one."""
    head = os.pread(fd, _RECORD.size, offset)
    if len(head) < _RECORD.size:
        return None
    mark, checksum, length, kind, number, at_ms = _RECORD.unpack(head)
    if mark != _MARK or length > _LONGEST or offset + _RECORD.size + length > end:
        return None
    payload = os.pread(fd, length, offset + _RECORD.size)
    if crc32(payload, crc32(head[_CHECKED_FROM:])) != checksum:
        return None
    return Record(number, kind, at_ms, payload)


def _next_mark(fd: int, offset: int, end: int) -> int:
    """Find where the next record behind a damaged place begins; the end where there is none."""
    rest = os.pread(fd, end - offset, offset)
    at = rest.find(_MARK, 1)
    while at >= 0 and _record(fd, offset + at, end) is None:
        at = rest.find(_MARK, at + 1)
    return offset + at if at >= 0 else end


def _cut_off(fd: int, offset: int, end: int) -> bool:
    """Whether what stands at the end is the beginning of a record, or room that was never written."""
    rest = os.pread(fd, min(end - offset, _RECORD.size), offset)
    if not any(rest):
        return not any(os.pread(fd, end - offset, offset))
    if not _MARK.startswith(rest[: len(_MARK)]):
        return False
    return len(rest) < _RECORD.size or offset + _RECORD.size + _RECORD.unpack(rest)[2] > end


def _write_whole(fd: int, data: bytes, offset: int) -> None:
    """Write all of it; a disk that is nearly full takes a part and refuses the rest. Raises OSError."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, memoryview(data)[done:], offset + done)


def _packed(number: int, kind: int, at_ms: int, payload: bytes) -> bytes:
    head = _RECORD.pack(_MARK, 0, len(payload), kind, number, at_ms)[_CHECKED_FROM:]
    return _MARK + crc32(payload, crc32(head)).to_bytes(4, "big") + head + payload


def _swapped(numbers: array[int]) -> bytes:
    return struct.pack(f">{len(numbers)}Q", *numbers)


def _unpacked(payload: bytes) -> tuple[int, ...]:
    return struct.unpack(f">{len(payload) // 8}Q", payload)
