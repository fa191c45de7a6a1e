"""Parts of one station without the rest of the line, for tests: short words for what happens to them."""

from collections import Counter
from dataclasses import replace

from pipeline.parts import Parts
from pipeline.stations import StationView
from pipeline.types import Judgement, Trigger, Verdict

BUDGET_S = 2.0
PRODUCTS = {"c1": "tray", "c2": "tray", "c3": "tray"}
BOTH = [StationView(camera="c1"), StationView(camera="c2")]


class Bench:
    """Parts of station s1, with short words for what happens to them."""

    def __init__(self, make_frame, make_view, station=None, run="R"):
        self.run = run
        self.parts = Parts({} if station is None else {"s1": station}, PRODUCTS, budget_s=BUDGET_S, run=run)
        self._make_frame, self._make_view = make_frame, make_view
        self._numbers = Counter()

    def frame(self, camera="c1", at=0.0, part_id=None, **fields):
        """Let a frame arrive the moment it is captured; gives what that led to."""
        self._numbers[camera] += 1
        number = self._numbers[camera]
        stamp = (part_id, "sei") if part_id is not None else (f"{camera}-{self.run}-{number}", "generated")
        frame = self._make_frame(
            camera_id=camera,
            number=number,
            captured_s=at,
            deadline_s=at + BUDGET_S,
            **({"part_id": stamp[0], "part_id_source": stamp[1]} | fields),
        )
        return self.parts.arrive(frame, at)

    def trigger(self, part_id, at=0.0, **fields):
        values = {"meas_id": "", "product": None, "cameras": None, "triggered_at": None, "receipt": (0, 0)} | fields
        return self.parts.trigger(Trigger("s1", part_id, triggered_s=at, **values))

    def judge(self, frame, judgement=Judgement.OK, reasons=(), at=0.1):
        view = self._make_view()
        inference = replace(view.inference, frame=frame)
        verdict = Verdict(judgement, reasons)
        return self.parts.settle(replace(view, frame=frame, inference=inference, verdict=verdict, decided_s=at))

    def end(self, at, lost=()):
        return self.parts.expire(at, lost)


def told(verdicts):
    """Part id, verdict and reasons of each verdict, in the order in which they leave."""
    return [(verdict.part.part_id, verdict.judgement.value, verdict.reasons) for verdict in verdicts]


def missing(verdict):
    return {view.camera_id: view.cause.value for view in verdict.missing}
