"""What changed between two JSON Schemas that breaks somebody: the pure rule behind "changes are additive"."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

Direction = Literal["sent", "taken"]
Schema = dict[str, Any]
# Of what is taken, by word: whether the new limit must not be above (1) or below (-1) the old one.
_LIMITS = {
    "minLength": 1,
    "minItems": 1,
    "minimum": 1,
    "exclusiveMinimum": 1,
    "maxLength": -1,
    "maxItems": -1,
    "maximum": -1,
    "exclusiveMaximum": -1,
}


def breaking(old: Schema, new: Schema, direction: Direction) -> list[str]:
    """List what breaks a consumer of what is `sent`, or a producer of what is `taken`; each with its place."""
    return list(_Comparison(old, new, direction).differences(old, new, "$"))


class _Comparison:
    def __init__(self, old: Schema, new: Schema, direction: Direction) -> None:
        self._old, self._new, self._direction = old, new, direction

    def differences(self, old: Schema, new: Schema, place: str) -> Iterator[str]:
        old, new = _resolved(old, self._old), _resolved(new, self._new)
        if "alternatives" in old or "alternatives" in new:
            yield from self._alternatives(old, new, place)
            return
        yield from self._types(old, new, place)
        yield from self._values(old, new, place)
        yield from self._properties(old, new, place)
        if "items" in old and "items" in new:
            yield from self.differences(old["items"], new["items"], f"{place}[]")

    def _alternatives(self, old: Schema, new: Schema, place: str) -> Iterator[str]:
        before, after = old.get("alternatives", [old]), new.get("alternatives", [new])
        for one in before:
            if not any(self._fits(one, other, place) for other in after):
                yield f"{place}: {_name(one)} is gone, or not what it was"
        for one in after if self._direction == "sent" else ():
            if not any(self._fits(other, one, place) for other in before):
                yield f"{place}: {_name(one)} is new"

    def _fits(self, old: Schema, new: Schema, place: str) -> bool:
        return not list(self.differences(old, new, place))

    def _types(self, old: Schema, new: Schema, place: str) -> Iterator[str]:
        before, after = _types(old), _types(new)
        if before != after and (self._direction == "sent" or not before <= after):
            yield f"{place}: type {sorted(before)} became {sorted(after)}"
        for word in ("format", "pattern", "const"):
            if new.get(word) != old.get(word) and (self._direction == "sent" or word in new):
                yield f"{place}: {word} {old.get(word)!r} became {new.get(word)!r}"

    def _values(self, old: Schema, new: Schema, place: str) -> Iterator[str]:
        if self._direction == "sent":
            return
        if "enum" in new and (gone := [value for value in old.get("enum", ["any"]) if value not in new["enum"]]):
            yield f"{place}: values {gone} are no longer taken"
        for word, sign in _LIMITS.items():
            if word in new and (word not in old or sign * new[word] > sign * old[word]):
                yield f"{place}: {word} {old.get(word)} became {new[word]}"
        if new.get("additionalProperties") is False and old.get("additionalProperties") is not False:
            yield f"{place}: other keys are no longer taken"

    def _properties(self, old: Schema, new: Schema, place: str) -> Iterator[str]:
        before, after = old.get("properties", {}), new.get("properties", {})
        for name in before.keys() - after.keys():
            yield f"{place}.{name}: removed"
        needed, known = set(new.get("required", ())), set(old.get("required", ()))
        if self._direction == "taken":
            yield from (f"{place}.{name}: newly required" for name in sorted(needed - known))
        else:
            yield from (f"{place}.{name}: no longer always there" for name in sorted((known - needed) & after.keys()))
        for name in before.keys() & after.keys():
            yield from self.differences(before[name], after[name], f"{place}.{name}")


def _resolved(schema: Schema, root: Schema) -> Schema:
    while "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rpartition("/")[2]]
    if alternatives := schema.get("anyOf", schema.get("oneOf")):
        return {"alternatives": [_resolved(one, root) for one in alternatives]}
    return schema


def _types(schema: Schema) -> set[str]:
    kind = schema.get("type", "any")
    return set(kind) if isinstance(kind, list) else {kind}


def _name(schema: Schema) -> str:
    return str(schema.get("title", schema.get("type", "an alternative")))
