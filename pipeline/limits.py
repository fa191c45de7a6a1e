"""What a threshold record is: what may be written, what of a record is used, and how records travel in a file.

Pure: no client, no clock, no file. What Redis or a file holds is not trusted. Called by `thresholds` (the line),
`threshold_store` and the commands.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from pipeline.cameras import Block, Product
from pipeline.errors import CheckError, ConfigError, first_fault
from pipeline.manifest import Finite, Manifest, Sha256
from pipeline.types import Threshold, ThresholdSource

LINE_FIELDS = ("ng", "review", "version", "model_sha256", "updated_at")
"""What the line reads of a record."""
RECORD_FIELDS = (*LINE_FIELDS, "updated_by", "updated_as", "approved_by", "approved_as", "reason")
"""A whole record. `*_by` is the name that a person gave, `*_as` the user by whom Redis let the command in."""

_NUMBER = re.compile(r"[+-]?([0-9]{1,40}\.?[0-9]{0,40}|\.[0-9]{1,40})([eE][+-]?[0-9]{1,3})?", re.ASCII)
# Exact in Lua's doubles, in JSON and in every consumer's 64 bits. The store counts on from 14 digits at most, so that
# what it writes after somebody's row of nines is a version still.
_VERSION = re.compile(r"[0-9]{1,15}", re.ASCII)
_SET_AGAIN = "set it with `logicrd thresholds set`"


@dataclass(frozen=True, slots=True)
class Change:
    """Limits that somebody wants in force for a network of a product.

    `expected` is the version, as Redis holds it, on which the wish is founded; None for whichever. The new version is
    above `floor`. `beside`: the network is not the served one, whose limits stay as they are.
    """

    product: str
    ng: float
    review: float
    model_sha256: str
    reason: str = ""
    expected: str | None = None
    floor: int = 0
    beside: bool = False


@dataclass(frozen=True, slots=True)
class Reading:
    """What a record is worth for a product's model: its limits, or why they are not used (`fault`, told in `why`).

    `version` is that of limits for another model.
    """

    threshold: Threshold | None
    fault: Literal["", "absent", "invalid", "other_model"] = ""
    why: str = ""
    version: int = 0


def check_limits(ng: float, review: float) -> None:
    """Refuse limits that would let everything or nothing through. Raises ConfigError."""
    if not (math.isfinite(ng) and math.isfinite(review)):
        raise ConfigError(f"limits must be finite numbers, not ng={ng} review={review}")
    if review > ng:
        raise ConfigError(f"review={review} lies above ng={ng}", hint="review marks doubt below NG: lower it")


def check_words(author: str, reason: str) -> None:
    """Refuse an author or a reason that could not be read in a table. Raises ConfigError."""
    if not (0 < len(author.strip()) <= 128 and author.isprintable()):
        raise ConfigError("the author is a name of 1 to 128 printable characters", hint="give it with --author")
    if len(reason) > 1000 or not reason.isprintable():
        raise ConfigError("the reason is one line of at most 1000 printable characters")


def parse(fields: Mapping[str, str]) -> Threshold:
    """Read a threshold record. Raises ConfigError for anything that is not one; nothing in it is trusted."""
    texts = [str(fields.get(name, "")) for name in ("ng", "review", "version")]
    for name, text, pattern in zip(("ng", "review", "version"), texts, (_NUMBER, _NUMBER, _VERSION), strict=True):
        if not pattern.fullmatch(text):
            raise ConfigError(f"not a threshold: {name}={text[:40]!r}", hint=_SET_AGAIN)
    ng, review, version = float(texts[0]), float(texts[1]), int(texts[2])
    check_limits(ng, review)
    sha = str(fields.get("model_sha256", ""))
    return Threshold(ng, review, version, ThresholdSource.REDIS, sha, _moment(fields.get("updated_at")))


def read(fields: Mapping[str, str], manifest: Manifest) -> Reading:
    """Say what a record, empty if there is none, is worth for this model."""
    if not fields:
        return Reading(None, "absent", "no limits in Redis")
    try:
        threshold = parse(fields)
    except ConfigError as error:
        return Reading(None, "invalid", str(error))
    if threshold.model_sha256 != manifest.model_sha256:
        return Reading(None, "other_model", "set for another model; not used", threshold.version)
    return Reading(threshold)


def of_model(record: Mapping[str, str], own: Mapping[str, str], model_sha256: str) -> Mapping[str, str]:
    """Give the record that counts for a network: the later one of the product's, where it is for this network, and of
    the network's own. Without either it is the product's, which is another network's or empty."""
    counting = [fields for fields in (record, own) if fields.get("model_sha256") == model_sha256]
    return max(counting, key=_number_of, default=record)


def is_older(found: Threshold, known: Threshold) -> bool:
    """Say whether what Redis holds now is from before what it held once: it was restored from a backup.

    Its version is lower then, and it was not set later. Limits that somebody set after such a restoration have a low
    version too, and count.
    """
    if found.version >= known.version or known.set_at is None:
        return False
    return found.set_at is None or found.set_at <= known.set_at


def to_roll_back_to(
    history: Sequence[Mapping[str, str]], current: str, version: int | None, manifest: Manifest
) -> Threshold:
    """Find limits of the past, newest entry first: those of `version`, or this model's before the current version.

    Raises ConfigError when there are none, or when they were set for another model.
    """
    sound = [threshold for threshold in map(_past, history) if threshold is not None]
    below = int(current) if _VERSION.fullmatch(current) and int(current) > 0 else math.inf
    wanted = [past for past in sound if (past.version < below if version is None else past.version == version)]
    if not wanted:
        which = "version before the one in force" if version is None else f"version {version}"
        raise ConfigError(f"{manifest.product!r} has no {which} in its history", hint="`logicrd thresholds history`")
    own = [past for past in wanted if past.model_sha256 == manifest.model_sha256]
    if not own:
        raise ConfigError(
            f"version {wanted[0].version} of {manifest.product!r} was set for another model, whose scores mean another "
            "thing",
            hint="name a later version with --to, or `logicrd thresholds suggest`",
        )
    return own[0]


class _Entry(Block):
    ng: Finite
    review: Finite
    version: Annotated[int, Field(ge=0, lt=10**14)] | None = None
    model_sha256: Sha256 | None = None
    updated_at: str = ""
    updated_by: str = ""
    reason: str = ""

    @model_validator(mode="after")
    def _ordered(self) -> _Entry:
        if self.review > self.ng:
            raise ValueError("`review` lies above `ng`")
        return self


class _File(Block):
    schema_version: Literal[1]
    thresholds: dict[Product, _Entry]


def to_document(records: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """Make the file of an export of these records; each must parse. Raises ConfigError."""
    entries = {}
    for product, fields in records.items():
        try:
            threshold = parse(fields)
        except ConfigError as error:
            raise ConfigError(f"{product}: {error}", hint=error.hint) from None
        told = {name: fields.get(name, "") for name in ("model_sha256", "updated_at", "updated_by", "reason")}
        numbers = {"ng": threshold.ng, "review": threshold.review, "version": threshold.version}
        entries[product] = numbers | {name: text for name, text in told.items() if text}
    return {"schema_version": 1, "thresholds": entries}


def plan(
    document: object, name: str, current: Mapping[str, Mapping[str, str]], manifests: Mapping[str, Manifest]
) -> list[Change]:
    """Give what has to change for the limits to be those of a file; `current` are the records as Redis holds them.

    Raises ConfigError for a file that is wrong, or names limits of another model, and CheckError when somebody has
    changed a product since the file was written. An entry of a later version than Redis has is what a backup of Redis
    lost: it gets a version above its own.
    """
    try:
        entries = _File.model_validate(document).thresholds
    except ValidationError as error:
        raise ConfigError(f"{name}: {first_fault(error, 'file')}") from None
    changes = (_planned(product, entry, current[product], manifests[product]) for product, entry in entries.items())
    return [change for change in changes if change is not None]


def products_of(document: object) -> list[str]:
    """Name the products of an export, unchecked; `plan` says what is wrong with it."""
    entries = document.get("thresholds") if isinstance(document, dict) else None
    return [str(product) for product in entries] if isinstance(entries, dict) else []


def _planned(product: str, entry: _Entry, fields: Mapping[str, str], manifest: Manifest) -> Change | None:
    if entry.model_sha256 not in (None, manifest.model_sha256):
        raise ConfigError(
            f"{product}: the file's limits are for another model, whose scores mean another thing",
            hint="set new ones: `logicrd thresholds suggest`",
        )
    held, version = fields.get("version", "0"), _number_of(fields)
    if entry.version is not None and entry.version < version:
        raise CheckError(
            f"{product}: the file has version {entry.version}, Redis has version {version}",
            hint="somebody changed it since: export again, or take `version` out of the file",
        )
    found = read(fields, manifest).threshold
    same = found is not None and (found.ng, found.review) == (entry.ng, entry.review)
    if same and (entry.version is None or entry.version == version):
        return None
    return Change(
        product, entry.ng, entry.review, manifest.model_sha256, entry.reason, expected=held, floor=entry.version or 0
    )


def _number_of(fields: Mapping[str, str]) -> int:
    held = fields.get("version", "")
    return int(held) if _VERSION.fullmatch(held) else 0


def _past(fields: Mapping[str, str]) -> Threshold | None:
    """Read an entry of the history; None for what was only proposed, and for what makes no sense."""
    try:
        return parse(fields)
    except ConfigError:
        return None


def _moment(text: str | None) -> datetime | None:
    try:
        moment = datetime.fromisoformat(text or "")
    except ValueError:
        return None
    return moment if moment.tzinfo is not None else None
