"""The part id that a camera stamps its H.264 frames with: an unregistered SEI message (ITU-T H.264 D.1.7). Pure.

FFmpeg finds the messages of the frames that it decodes; here they are also found in the NAL units of one that nobody
decodes, or that another process does. Called by `stream` and `deepstream`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from uuid import UUID

PART_ID_UUID = UUID("d4616770-2d24-58ba-ac16-6665a1d7737b")
"""uuid5(NAMESPACE_URL, "urn:logicrd:part-id"): what follows it in the SEI message is the part id in UTF-8."""
MAX_PART_ID_BYTES = 128

_SEI_UNIT = 6
_UNREGISTERED = 5


def part_id_of(messages: Iterable[bytes]) -> str | None:
    """Find the part id among a frame's unregistered SEI messages; a text that is no id is no id."""
    for message in messages:
        if message[:16] == PART_ID_UUID.bytes and len(message) <= 16 + MAX_PART_ID_BYTES:
            try:
                text = message[16:].decode().strip("\0")
            except UnicodeDecodeError:
                return None
            return text if text.isprintable() and text else None
    return None


def part_id_in(units: bytes) -> str | None:
    """Find the part id in NAL units (Annex B): those of a frame, or those before its picture."""
    found = (unit for unit in units.split(b"\0\0\1") if unit and unit[0] & 0x1F == _SEI_UNIT)
    return part_id_of(message for unit in found for message in _unregistered(unit[1:].replace(b"\0\0\3", b"\0\0")))


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
