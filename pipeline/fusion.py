"""One part of several views: what is awaited, judged or missing, and the verdict that its views make. Pure.

The only place where views become a part's verdict. Called by `parts`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

from pipeline.stations import StationView
from pipeline.types import Cause, Frame, Judgement, MissingView, Part, PartVerdict, Verdict, ViewVerdict


@dataclass(slots=True)
class OpenPart:
    """A part under way: each of its views is awaited, under inference (`frames`), judged, or missing.

    `number` is that of the trigger counter, `recipe` the product that its trigger names.
    """

    part: Part
    sequence: int
    views: tuple[StationView, ...]
    awaited: set[str]
    number: int | None = None
    recipe: str | None = None
    frames: dict[str, Frame] = field(default_factory=dict)
    judged: dict[str, ViewVerdict] = field(default_factory=dict)
    missing: dict[str, Cause] = field(default_factory=dict)
    verdict: PartVerdict | None = None

    def give_up(self, camera_id: str, cause: Cause) -> None:
        """Note that an awaited view will not come."""
        self.awaited.discard(camera_id)
        self.missing[camera_id] = cause

    def decide(self, now_s: float) -> bool:
        """Make the verdict once every view is settled; says whether it did."""
        if self.verdict is not None or self.awaited or self.frames:
            return False
        views = [self.judged[view.camera] for view in self.views if view.camera in self.judged]
        missing = [
            MissingView(view.camera, view.required, self.missing[view.camera])
            for view in self.views
            if view.camera in self.missing
        ]
        optional = frozenset(view.camera for view in self.views if not view.required)
        judgement, reasons = fuse(views, missing, optional)
        self.verdict = PartVerdict(
            self.part, self.sequence, judgement, reasons, tuple(views), tuple(missing), now_s, optional
        )
        return True


def worst(views: Sequence[tuple[Judgement, bool]], *, absent: bool) -> Judgement:
    """Judge a part by what each view says and whether it is required; `absent`: a required view is missing.

    An NG stands whatever the others show. Else a required view that is missing or was not inspected makes the part
    UNINSPECTED, and so does a part of which no view was inspected.
    """
    said = {judgement for judgement, _ in views}
    if Judgement.NG in said:
        return Judgement.NG
    if absent or (Judgement.UNINSPECTED, True) in views or said <= {Judgement.UNINSPECTED}:
        return Judgement.UNINSPECTED
    return Judgement.REVIEW if Judgement.REVIEW in said else Judgement.OK


def fuse(
    views: list[ViewVerdict], missing: list[MissingView], optional: Collection[str]
) -> tuple[Judgement, tuple[str, ...]]:
    """Judge a part by its views, see `worst`. Reasons are those of the views that decided."""
    absent = [view for view in missing if view.required]
    said = [(view.verdict.judgement, view.frame.camera_id not in optional) for view in views]
    judgement = worst(said, absent=bool(absent))
    deciding = [view for view in views if view.verdict.judgement is judgement]
    if judgement is Judgement.UNINSPECTED:
        needed = [view for view in deciding if view.frame.camera_id not in optional]
        if needed or absent:
            deciding, missing = needed, absent
    causes = (view.cause.value for view in missing) if judgement is Judgement.UNINSPECTED else ()
    return judgement, tuple(dict.fromkeys(chain(*(view.verdict.reasons for view in deciding), causes)))


def unstored(part: PartVerdict) -> PartVerdict:
    """Make of a verdict what may leave when it could not be stored: an NG stands, anything else is UNINSPECTED."""
    views = tuple(replace(view, verdict=_unstored(view.verdict)) for view in part.views)
    left = _unstored(Verdict(part.judgement, part.reasons))
    return replace(part, judgement=left.judgement, reasons=left.reasons, views=views)


def _unstored(verdict: Verdict) -> Verdict:
    if verdict.judgement in {Judgement.NG, Judgement.UNINSPECTED}:
        return verdict
    return replace(verdict, judgement=Judgement.UNINSPECTED, reasons=(Cause.OUTBOX_UNAVAILABLE.value,))
