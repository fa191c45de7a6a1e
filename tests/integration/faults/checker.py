"""The rules that every run must keep, whatever was done to it: a consumer that knows the numbers of the parts.

Pure: what existed and what was received goes in, an account with every breach by name comes out. Knows no broker and no
clock, and nothing of the faults. Dedupes as the README tells a consumer to: by source and id, the first one counts.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

_SAME_SCORE = 0.01
"""How far a score may be from what its picture is known to score: the models round."""


@dataclass(frozen=True)
class Part:
    """A part that existed, by its key on Kafka and the number that its trigger or its picture bears."""

    key: str
    number: int
    certain: bool = True
    """False: it may have been under way when its worker was killed, so that no verdict of it is no breach."""
    scores: tuple[float, ...] = ()
    """What its picture may score: one value where the part has a picture of its own; () where that is not known."""
    triggered_at: float | None = None
    """Seconds since the epoch; None where that is not known."""


@dataclass(frozen=True)
class View:
    """One picture of a part, as the verdict tells it."""

    verdict: str
    score: float | None
    review: float | None
    """The limit from which on it is not OK."""


@dataclass(frozen=True)
class Verdict:
    """One record of the verdict topic, in the order of its partition."""

    key: str
    source: str
    id: str
    number: int
    verdict: str
    views: tuple[View, ...] = ()
    lacks_view: bool = False
    """Whether a required view is missing."""
    worker: str = ""
    sequence: int = 0
    decided_at: float | None = None
    reasons: tuple[str, ...] = ()


@dataclass
class Account:
    """What became of the parts. `breaches` is empty for a run that kept every rule."""

    parts: int = 0
    judged: int = 0
    uninspected: int = 0
    retold: int = 0
    """Records that a consumer drops because it has their source and id already."""
    uncertain_without: int = 0
    """Parts without a verdict that were under way in a killed worker's memory."""
    breaches: list[str] = field(default_factory=list)

    def rules(self) -> set[str]:
        """The names of the rules that were broken."""
        return {breach.partition(":")[0] for breach in self.breaches}


def check(
    parts: Sequence[Part],
    verdicts: Sequence[Verdict],
    *,
    words: Mapping[tuple[str, int], str] | None = None,
    dark: Iterable[tuple[float, float]] = (),
) -> Account:
    """Hold what was received against what existed.

    `words` is what the worker said of parts by key and number, once it was sure of it: a consumer must get the same.
    `dark` are spans of time (seconds since the epoch) in which nothing could be judged. `parts` are in the order of
    their triggers, per key; `verdicts` in the order of their offsets.
    """
    first: dict[tuple[str, str], Verdict] = {}
    for verdict in verdicts:
        first.setdefault((verdict.source, verdict.id), verdict)
    known = {(part.key, part.number): part for part in parts}
    by_part: dict[tuple[str, int], list[Verdict]] = defaultdict(list)
    for verdict in first.values():
        by_part[verdict.key, verdict.number].append(verdict)
    account = Account(
        parts=len(parts),
        judged=sum(verdict.verdict != "UNINSPECTED" for verdict in first.values()),
        uninspected=sum(verdict.verdict == "UNINSPECTED" for verdict in first.values()),
        retold=len(verdicts) - len(first),
        uncertain_without=sum(not part.certain and place not in by_part for place, part in known.items()),
    )
    account.breaches += _each_once(parts, known, by_part)
    account.breaches += _shared_ids(verdicts, first)
    account.breaches += _out_of_order(parts, first.values())
    account.breaches += _gaps(verdicts)
    account.breaches += _changed(first.values(), words or {})
    for verdict in verdicts:
        account.breaches += _unfounded(verdict, known.get((verdict.key, verdict.number)), tuple(dark))
    return account


def _each_once(
    parts: Sequence[Part],
    known: Mapping[tuple[str, int], Part],
    by_part: Mapping[tuple[str, int], Sequence[Verdict]],
) -> Iterator[str]:
    for part in parts:
        if part.certain and (part.key, part.number) not in by_part:
            yield f"lost: part {part.number} of {part.key} has no verdict"
    for place, told in by_part.items():
        key, number = place
        if place not in known:
            yield f"invented: {key} has a verdict of part {number}, which never was"
        if len(told) > 1:
            yield f"doubled: part {number} of {key} has {len(told)} verdicts: {', '.join(each.id for each in told)}"


def _shared_ids(verdicts: Iterable[Verdict], first: Mapping[tuple[str, str], Verdict]) -> Iterator[str]:
    for verdict in verdicts:
        other = first[verdict.source, verdict.id]
        if (other.key, other.number) != (verdict.key, verdict.number):
            places = f"part {other.number} of {other.key} and {verdict.number} of {verdict.key}"
            yield f"shared id: {verdict.id} is of {places}"


def _out_of_order(parts: Sequence[Part], first: Iterable[Verdict]) -> Iterator[str]:
    """By first appearance: what is told again later is dropped by whoever dedupes."""
    place = {(part.key, part.number): index for index, part in enumerate(parts)}
    last: dict[str, Verdict] = {}
    for verdict in first:
        if (verdict.key, verdict.number) not in place:
            continue
        before = last.get(verdict.key)
        if before is not None and place[verdict.key, verdict.number] < place[before.key, before.number]:
            yield f"order: part {verdict.number} of {verdict.key} comes after part {before.number}"
        last[verdict.key] = verdict


def _gaps(verdicts: Iterable[Verdict]) -> Iterator[str]:
    """The sequence of one run of a worker goes up by one from 1; a repeat is a record that is told again."""
    reached: dict[tuple[str, str], int] = defaultdict(int)
    for verdict in verdicts:
        run = (verdict.key, verdict.worker)
        if verdict.sequence > reached[run] + 1:
            yield f"gap: {verdict.key} goes from sequence {reached[run]} to {verdict.sequence} ({verdict.worker})"
        reached[run] = max(reached[run], verdict.sequence)


def _changed(first: Iterable[Verdict], words: Mapping[tuple[str, int], str]) -> Iterator[str]:
    for verdict in first:
        word = words.get((verdict.key, verdict.number), verdict.verdict)
        if word != verdict.verdict:
            yield f"changed: the worker said {word} of part {verdict.number} of {verdict.key}, not {verdict.verdict}"


def _unfounded(verdict: Verdict, part: Part | None, dark: Iterable[tuple[float, float]]) -> Iterator[str]:
    """An OK must be borne out by what the verdict says of itself, by the part's picture, and by the time."""
    if verdict.verdict != "OK":
        return
    name = f"unfounded OK: part {verdict.number} of {verdict.key}"
    if not verdict.views:
        yield f"{name} has no view"
    if verdict.lacks_view:
        yield f"{name} lacks a required view"
    for view in verdict.views:
        yield from (f"{name} {fault}" for fault in _faults(view, () if part is None else part.scores))
    if part is None or part.triggered_at is None or verdict.decided_at is None:
        return
    for begin, end in dark:
        if begin < part.triggered_at <= verdict.decided_at < end:
            yield f"{name} was triggered and decided while nothing could be judged"


def _faults(view: View, scores: tuple[float, ...]) -> Iterator[str]:
    if view.verdict != "OK":
        yield f"has a view that is {view.verdict}"
    if view.score is None or not math.isfinite(view.score):
        yield "has no score"
    elif view.review is None or not view.score < view.review:
        yield f"scores {view.score}, and the limit is {view.review}"
    elif not _is_among(view.score, scores):
        yield f"scores {view.score}, and its picture {scores}"


def _is_among(score: float, scores: tuple[float, ...]) -> bool:
    return not scores or any(abs(score - known) <= _SAME_SCORE for known in scores)


def verdict_of(event: Mapping[str, Any], number: int) -> Verdict:
    """Read an event of `inspection.verdict.v1` (attributes, data, key) of the part with this number."""
    attributes, data = event["attributes"], event["data"]
    return Verdict(
        key=event["key"],
        source=attributes["source"],
        id=attributes["id"],
        number=number,
        verdict=data["verdict"],
        views=tuple(_view(view) for view in data["views"]),
        lacks_view=any(view["required"] for view in data["missingViews"]),
        worker=data["worker"],
        sequence=data["sequence"],
        decided_at=datetime.fromisoformat(attributes["time"]).timestamp(),
        reasons=tuple(data["reasonCodes"]),
    )


def _view(view: Mapping[str, Any]) -> View:
    scores, threshold = view["scores"], view["threshold"]
    return View(
        verdict=view["verdict"],
        score=None if scores is None else scores["fused"],
        review=None if threshold is None else threshold["review"],
    )
