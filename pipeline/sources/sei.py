"""The part id in the SEI messages of an H.264 stream that another process decodes. Pure; used by `deepstream`.

FFmpeg finds the messages for `stream.py`; here they are found in the NAL units that come before a picture.
"""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.sources.stream import part_id_of

_SEI_UNIT = 6
_UNREGISTERED = 5


def part_id_in(before: bytes) -> str | None:
    """Find the part id in the NAL units before a picture."""
    units = (unit for unit in before.split(b"\0\0\1") if unit and unit[0] & 0x1F == _SEI_UNIT)
    return part_id_of(message for unit in units for message in _unregistered(unit[1:].replace(b"\0\0\3", b"\0\0")))


def _unregistered(raw: bytes) -> Iterator[bytes]:
    """Walk the messages of one SEI unit (H.264 7.3.2.3); gives those of the unregistered kind."""
    at = 0
    while at + 2 < len(raw):
        kind, at = _number(raw, at)
        size, at = _number(raw, at)
        if kind == _UNREGISTERED:
            yield raw[at : at + size]
        at += size


def _number(raw: bytes, at: int) -> tuple[int, int]:
    """Read a number of SEI's kind: bytes of 255, then the rest; gives it, and where the next one starts."""
    total = 0
    while at < len(raw) and raw[at] == 255:
        total, at = total + 255, at + 1
    return total + (raw[at] if at < len(raw) else 0), at + 1
