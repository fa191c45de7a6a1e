"""Which parts are open, and which frames are theirs. Pure state: no clock, no thread, no I/O.

A part is opened by its first frame, by the camera's trigger counter or by a trigger message, as its station is set. It
gets one verdict, when every view is settled or its deadline passes; a frame that comes later is a stray. Verdicts of
one station leave in the order of opening, so a part that is still open holds back the later ones, at most until its own
deadline. Owned by `judge`, which locks around it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain

from pipeline.fusion import OpenPart
from pipeline.stations import Station, StationView
from pipeline.types import Cause, Frame, Part, PartVerdict, Stray, StrayReason, Trigger, ViewVerdict

# Per station: parts remembered after their verdict, to tell a late frame; triggers remembered, to tell a repeated one;
# frames that wait for their trigger, of which the oldest gives way.
_RECENT = 256
_TRIGGERS_SEEN = 4096
_MAX_HELD = 64


@dataclass(frozen=True, slots=True)
class Arrival:
    """What a frame or a trigger led to: frames of known parts, strays, how many parts were opened, a counter reset."""

    frames: tuple[Frame, ...] = ()
    strays: tuple[Stray, ...] = ()
    opened: int = 0
    reset: bool = False


@dataclass(slots=True)
class _Station:
    plan: Station | None
    sequence: int = 0
    waiting: deque[OpenPart] = field(default_factory=deque)
    recent: deque[OpenPart] = field(default_factory=lambda: deque(maxlen=_RECENT))
    held: deque[Frame] = field(default_factory=deque)
    seen: dict[tuple[str, str], None] = field(default_factory=dict)
    last_number: int | None = None
    counters: dict[str, tuple[int, int]] = field(default_factory=dict)
    """By camera: its last count, and what has to be added to a count to get the part's number."""

    @property
    def window_s(self) -> float:
        return self.plan.window_s if self.plan is not None else 0.0

    def expecting(self, frame: Frame) -> OpenPart | None:
        """Find the open part whose view a frame is: by the id that the camera stamped, else by time of capture.

        By time it is the latest part at or before the capture, failing that the nearest one after it.
        """
        parts = [part for part in self.waiting if frame.camera_id in part.awaited]
        if _is_stamped(frame):
            return next((part for part in parts if part.part.part_id == frame.part_id), None)
        near = [part for part in parts if abs(part.part.opened_s - frame.captured_s) <= self.window_s]
        before = [part for part in near if part.part.opened_s <= frame.captured_s]
        if before:
            return max(before, key=lambda part: part.part.opened_s)
        return min(near, key=lambda part: part.part.opened_s, default=None)

    def stray(self, frame: Frame) -> Stray | None:
        """Tell whose frame it was that no open part expects; None for one of no known part."""
        for known in chain(reversed(self.recent), reversed(self.waiting)):
            part = known.part
            missed = frame.camera_id in known.missing
            if (
                _is_stamped(frame)
                and part.part_id == frame.part_id
                and any(view.camera == frame.camera_id for view in known.views)
            ):
                reason = StrayReason.LATE_FRAME if missed else StrayReason.DUPLICATE_FRAME
                return Stray(frame, reason, part)
            if not _is_stamped(frame) and missed and abs(part.opened_s - frame.captured_s) <= self.window_s:
                return Stray(frame, StrayReason.LATE_FRAME, part)
        return None

    def numbered(self, number: int) -> OpenPart | None:
        """Find the part of a number, open or recent."""
        return next((part for part in chain(self.waiting, self.recent) if part.number == number), None)

    def is_new(self, number: int) -> bool:
        """Whether no part of this or a later number was opened yet."""
        return self.last_number is None or number > self.last_number

    def fits(self, frame: Frame, number: int) -> bool:
        """Whether the other views of the part with this number were captured when this frame was.

        Where they were not, a camera has missed a trigger without counting it: its counter must be aligned anew.
        """
        part = self.numbered(number)
        if part is None or not (part.frames or part.judged):
            return True
        return abs(part.part.opened_s - frame.captured_s) <= self.window_s

    def aligned(self, frame: Frame, count: int) -> int:
        """Number the first frame of a counter: as the part that the other views show now, else as the next one."""
        lacking = (
            part
            for part in chain(self.waiting, self.recent)
            if frame.camera_id in part.awaited or frame.camera_id in part.missing
        )
        near = [part for part in lacking if abs(part.part.opened_s - frame.captured_s) <= self.window_s]
        part = min(near, key=lambda part: abs(part.part.opened_s - frame.captured_s), default=None)
        if part is not None and part.number is not None:
            return part.number
        return count if self.last_number is None else self.last_number + 1


class Parts:
    """The parts under way, per station.

    `stations` are those of the line file; a station that is not among them has parts of one frame each. `products` is
    the product of each camera that is read, `run` names this run in made-up part ids.
    """

    def __init__(
        self, stations: Mapping[str, Station], products: Mapping[str, str], *, budget_s: float, run: str
    ) -> None:
        self._plans = stations
        self._products = dict(products)
        self._budget_s = budget_s
        self._run = run
        self._stations: dict[str, _Station] = {}
        self._by_frame: dict[tuple[str, int], OpenPart] = {}
        self._reopened: set[str] = set()
        self._undecided = 0

    def __len__(self) -> int:
        """Count the parts that have no verdict yet."""
        return self._undecided

    def open_by_station(self) -> dict[str, int]:
        """Count the parts of each station whose verdict has not been released."""
        return {name: len(station.waiting) for name, station in self._stations.items()}

    def add_camera(self, camera_id: str, product: str) -> None:
        """Note that a camera is read from now on."""
        self._products[camera_id] = product

    def remove_camera(self, camera_id: str) -> None:
        """Note that a camera is read no longer: its views are missing as those of a lost camera are."""
        self._products.pop(camera_id, None)
        self.reopen(camera_id)

    def arrive(self, frame: Frame, now_s: float) -> Arrival:
        """Take a frame: its part is opened or found. The frames returned carry their part's identity and deadline."""
        station = self._station(frame.station)
        plan = station.plan
        if plan is None or plan.view(frame.camera_id) is None or (plan.trigger == "free_run" and len(plan.views) < 2):
            return self._alone(station, frame)
        if plan.trigger == "counter":
            return self._counted(station, plan, frame, now_s)
        if (part := station.expecting(frame)) is not None:
            return Arrival((self._admit(part, frame),))
        if plan.trigger == "message":
            return self._hold(station, frame)
        if (stray := station.stray(frame)) is not None:
            return Arrival(strays=(stray,))
        part = self._open(station, self._part_of(plan, frame, frame.part_id, frame.part_id_source), plan.views)
        return Arrival((self._admit(part, frame),), opened=1)

    def trigger(self, trigger: Trigger) -> Arrival | None:
        """Open the part of a trigger, and give it the frames that were there first; None for a repeated trigger.

        The station must be one of those in mode `message`.
        """
        station = self._station(trigger.station)
        plan = self._plans[trigger.station]
        key = (trigger.part_id, trigger.meas_id)
        if key in station.seen:
            return None
        station.seen[key] = None
        if len(station.seen) > _TRIGGERS_SEEN:
            del station.seen[next(iter(station.seen))]
        views = [view for view in plan.views if trigger.cameras is None or view.camera in trigger.cameras]
        part = self._open(station, self._part_of_trigger(views, trigger), views, recipe=trigger.product)
        if trigger.stale:
            for view in views:
                part.give_up(view.camera, Cause.DEADLINE)
            self._decide(part, trigger.triggered_s)
        return Arrival(tuple(self._claim_held(station)), opened=1)

    def reopen(self, camera_id: str) -> None:
        """Note that a camera was lost: its trigger counter may start anew, and an equal count is then no repeat."""
        self._reopened.add(camera_id)

    def awaits(self, frame: Frame) -> Part | None:
        """Give the part that still waits for this frame's verdict; None when it has its verdict already."""
        part = self._by_frame.get((frame.camera_id, frame.number))
        return part.part if part is not None else None

    def admitted(self, frame: Frame) -> Frame:
        """Give a frame with its part's identity and deadline; as it is where no part waits for it."""
        part = self._by_frame.get((frame.camera_id, frame.number))
        return frame if part is None else part.frames[frame.camera_id]

    def settle(self, view: ViewVerdict) -> list[PartVerdict]:
        """Give a view its verdict. Returns the part verdicts of its station that may now go out, in order.

        The part must await it (`awaits` said so).
        """
        camera_id = view.frame.camera_id
        part = self._by_frame.pop((camera_id, view.frame.number))
        del part.frames[camera_id]
        part.judged[camera_id] = view
        self._decide(part, view.decided_s)
        return list(_released(self._stations[part.part.station]))

    def overdue(self, now_s: float) -> list[Frame]:
        """List the frames under inference whose part's deadline has passed, oldest first."""
        found = ((part, part.frames[camera_id]) for (camera_id, _), part in self._by_frame.items())
        return [frame for part, frame in found if part.part.deadline_s <= now_s]

    def expire(
        self, now_s: float, lost: Collection[str], *, last: bool = False
    ) -> tuple[list[PartVerdict], list[Stray]]:
        """Give up the views that did not come by their part's deadline, and the frames whose trigger did not.

        `lost` names the cameras that are away, besides those that are not read here; `last` gives up whatever is open.
        Returns verdicts that may now go out, in order, and strays.
        """
        due_s = math.inf if last else now_s
        released: list[PartVerdict] = []
        strays: list[Stray] = []
        for station in self._stations.values():
            for part in station.waiting:
                if part.verdict is None and part.part.deadline_s <= due_s and not part.frames:
                    for camera_id in sorted(part.awaited):
                        away = camera_id in lost or camera_id not in self._products
                        part.give_up(camera_id, Cause.CAMERA_LOST if away else Cause.DEADLINE)
                    self._decide(part, now_s)
            released += _released(station)
            while station.held and station.held[0].captured_s + station.window_s < due_s:
                frame = station.held.popleft()
                strays.append(station.stray(frame) or Stray(frame, StrayReason.NO_TRIGGER))
        return released, strays

    def _station(self, name: str) -> _Station:
        station = self._stations.get(name)
        if station is None:
            station = self._stations[name] = _Station(self._plans.get(name))
        return station

    def _open(
        self,
        station: _Station,
        part: Part,
        views: Iterable[StationView],
        *,
        number: int | None = None,
        recipe: str | None = None,
    ) -> OpenPart:
        station.sequence += 1
        self._undecided += 1
        views = tuple(views)
        opened = OpenPart(part, station.sequence, views, {view.camera for view in views}, number, recipe)
        station.waiting.append(opened)
        if number is not None:
            station.last_number = number
        return opened

    def _admit(self, part: OpenPart, frame: Frame) -> Frame:
        """Make a frame the view of a part."""
        fixed = next(view.product for view in part.views if view.camera == frame.camera_id)
        frame = replace(
            frame,
            part_id=part.part.part_id,
            part_id_source=part.part.part_id_source,
            product=fixed or part.recipe or frame.product,
            deadline_s=part.part.deadline_s,
            meas_id=part.part.meas_id,
        )
        part.awaited.discard(frame.camera_id)
        part.frames[frame.camera_id] = frame
        self._by_frame[frame.camera_id, frame.number] = part
        return frame

    def _decide(self, part: OpenPart, now_s: float) -> None:
        self._undecided -= part.decide(now_s)

    def _alone(self, station: _Station, frame: Frame) -> Arrival:
        """Open the part of which this frame is all."""
        view = (station.plan.view(frame.camera_id) if station.plan is not None else None) or StationView(
            camera=frame.camera_id
        )
        part = Part(
            frame.station,
            frame.part_id,
            frame.part_id_source,
            view.product or frame.product,
            frame.captured_at,
            frame.captured_s,
            frame.deadline_s,
            camera_id=frame.camera_id,
            epoch=frame.epoch,
        )
        return Arrival((self._admit(self._open(station, part, (view,)), frame),), opened=1)

    def _counted(self, station: _Station, plan: Station, frame: Frame, now_s: float) -> Arrival:
        """Find the part by the camera's trigger counter; the numbers it left out are parts that this view missed."""
        camera_id, known = frame.camera_id, station.counters.get(frame.camera_id)
        count = frame.trigger_count
        if count is None:  # a damaged picture: the camera has counted on
            count = 0 if known is None else known[0] + 1
        reopened = camera_id in self._reopened
        self._reopened.discard(camera_id)
        if known is not None and count == known[0] and not reopened:
            return Arrival(strays=(Stray(frame, StrayReason.DUPLICATE_FRAME),))
        opened, reset = 0, False
        if known is not None and 0 < count - known[0] <= plan.max_missed + 1 and station.fits(frame, count + known[1]):
            number = count + known[1]
            for missed in range(known[0] + 1 + known[1], number):
                opened += self._miss(station, plan, missed, frame, now_s)
        else:
            number, reset = station.aligned(frame, count), known is not None
        station.counters[camera_id] = (count, number - count)
        part = station.numbered(number)
        if part is None and station.is_new(number):
            part, opened = self._open_number(station, plan, number, frame), opened + 1
        if part is None or camera_id not in part.awaited:
            stray = Stray(frame, StrayReason.LATE_FRAME, part.part if part is not None else None)
            return Arrival(strays=(stray,), opened=opened, reset=reset)
        return Arrival((self._admit(part, frame),), opened=opened, reset=reset)

    def _miss(self, station: _Station, plan: Station, number: int, frame: Frame, now_s: float) -> int:
        """Give up this camera's view of a part that its counter left out; gives how many parts that opened."""
        part, opened = station.numbered(number), 0
        if part is None and station.is_new(number):
            part, opened = self._open_number(station, plan, number, frame), 1
        if part is not None and frame.camera_id in part.awaited:
            part.give_up(frame.camera_id, Cause.TRIGGER_MISSED)
            self._decide(part, now_s)
        return opened

    def _open_number(self, station: _Station, plan: Station, number: int, frame: Frame) -> OpenPart:
        part = self._part_of(plan, frame, f"{plan.name}-{self._run}-{number}", "counter")
        return self._open(station, part, plan.views, number=number)

    def _hold(self, station: _Station, frame: Frame) -> Arrival:
        """Keep a frame until its trigger comes; beyond the bound the oldest one gives way."""
        station.held.append(frame)
        if len(station.held) <= _MAX_HELD:
            return Arrival()
        oldest = station.held.popleft()
        return Arrival(strays=(station.stray(oldest) or Stray(oldest, StrayReason.NO_TRIGGER),))

    def _claim_held(self, station: _Station) -> Iterator[Frame]:
        for frame in list(station.held):
            if (part := station.expecting(frame)) is not None:
                station.held.remove(frame)
                yield self._admit(part, frame)

    def _part_of(self, plan: Station, frame: Frame, part_id: str, source: str) -> Part:
        """Identify a part of several views by the frame that opens it."""
        product = self._product(plan.views[0])
        captured = frame.captured_at, frame.captured_s
        return Part(plan.name, part_id, source, product, *captured, frame.deadline_s, epoch=frame.epoch)

    def _part_of_trigger(self, views: list[StationView], trigger: Trigger) -> Part:
        return Part(
            trigger.station,
            trigger.part_id,
            "trigger",
            trigger.product or self._product(views[0]),
            trigger.triggered_at,
            trigger.triggered_s,
            trigger.triggered_s + self._budget_s,
            meas_id=trigger.meas_id,
            receipt=trigger.receipt,
            epoch=trigger.epoch,
        )

    def _product(self, view: StationView) -> str:
        return view.product or self._products.get(view.camera, "")  # a camera that is not read here has none


def _released(station: _Station) -> Iterator[PartVerdict]:
    """Take the verdicts that are at the head of the station's order."""
    while station.waiting and (verdict := station.waiting[0].verdict) is not None:
        part = station.waiting.popleft()
        part.judged.clear()  # what is remembered is which views came, not what they showed
        if station.plan is not None:
            station.recent.append(part)
        yield verdict


def _is_stamped(frame: Frame) -> bool:
    """Say whether the camera, or the file, told the part's id."""
    return frame.part_id_source != "generated"
