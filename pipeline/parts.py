"""Which parts are open, and in what order their verdicts go out. Pure state: no clock, no thread, no I/O.

A part is opened when its frame is captured and closed once, by an answer or by its deadline; the first closing wins.
Verdicts of one station leave in the order of capture, so a part that is still open holds back the later ones, at most
until its own deadline. In this line each frame is a part of one view. Owned by `app`, which locks around it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from pipeline.types import Frame, PartVerdict


@dataclass(slots=True)
class _Open:
    frame: Frame
    sequence: int
    verdict: PartVerdict | None = None


class OpenParts:
    """The parts under way, per station."""

    def __init__(self) -> None:
        self._stations: dict[str, deque[_Open]] = {}
        self._by_frame: dict[tuple[str, int], _Open] = {}
        self._sequences: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._by_frame)

    def open(self, frame: Frame) -> int:
        """Open the part of a frame; gives its sequence number at the station, from 1 without a gap."""
        sequence = self._sequences.get(frame.station, 0) + 1
        self._sequences[frame.station] = sequence
        part = _Open(frame, sequence)
        self._stations.setdefault(frame.station, deque()).append(part)
        self._by_frame[frame.camera_id, frame.number] = part
        return sequence

    def sequence(self, frame: Frame) -> int | None:
        """Give an open part's sequence number; None for a part that has its verdict already."""
        part = self._by_frame.get((frame.camera_id, frame.number))
        return part.sequence if part is not None else None

    def close(self, verdict: PartVerdict) -> list[PartVerdict]:
        """Give a part its verdict. Returns the verdicts of its station that may now go out, in order.

        The part must be open (`sequence` said so).
        """
        frame = verdict.frame
        part = self._by_frame.pop((frame.camera_id, frame.number))
        part.verdict, part.frame = verdict, frame  # the verdict's frame may be bare: its picture goes
        waiting = self._stations[frame.station]
        released: list[PartVerdict] = []
        while waiting and (head := waiting[0].verdict) is not None:
            released.append(head)
            waiting.popleft()
        return released

    def overdue(self, now_s: float) -> list[Frame]:
        """List the frames whose deadline has passed without an answer, oldest first."""
        return [part.frame for part in self._by_frame.values() if part.frame.deadline_s <= now_s]
