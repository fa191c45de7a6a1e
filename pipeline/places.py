"""Where model repositories are: a folder of this machine, or a bucket of an S3-compatible store.

A bucket is named as Triton names it: `s3://bucket/prefix` for AWS, `s3://https://host:port/bucket/prefix` for a store
of one's own. Keys are never part of it. Nothing here connects. Read by the settings and by `stores`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, TypeAlias

from pydantic import PlainSerializer, PlainValidator, WithJsonSchema

_S3 = "s3://"
_SCHEME = re.compile(r"\s*[A-Za-z][A-Za-z0-9+.-]*:/")
# Triton reads no other: it takes a server's name only with a port, and these characters in a prefix.
_OWN = re.compile(r"(?P<endpoint>https?://([A-Za-z0-9.-]+|\[[0-9A-Fa-f:]+\]):[0-9]{1,5})/(?P<rest>.*)")
_BUCKET = re.compile(r"(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?P<prefix>(/[A-Za-z0-9._-]+)*)/?")


@dataclass(frozen=True, slots=True)
class S3Address:
    """Objects of a bucket that begin with `prefix/`; without `endpoint` the SDK's settings say where the server is."""

    bucket: str
    prefix: str = ""
    endpoint: str = ""

    def __str__(self) -> str:
        parts = (self.endpoint, self.bucket, self.prefix)
        return _S3 + "/".join(part for part in parts if part)


Where: TypeAlias = Path | S3Address


def parse_place(text: object) -> Where:
    """Read a folder or an `s3://` address. Raises ValueError, which repeats no address: it may hold a secret."""
    if isinstance(text, (Path, S3Address)):
        return text
    if not isinstance(text, str):
        raise ValueError("give a folder or an address `s3://...`")  # noqa: TRY004 (pydantic turns this one into its own)
    if not text.startswith(_S3):
        if _SCHEME.match(text):  # no folder: with keys in it, messages would repeat them
            raise ValueError("an address begins with `s3://`; anything else is a folder, which has no scheme")
        return Path(text)
    if "@" in text:
        raise ValueError("keys do not belong in the address: the SDK takes them from its environment or a file")
    own = _OWN.fullmatch(text.removeprefix(_S3))
    found = _BUCKET.fullmatch(own["rest"] if own else text.removeprefix(_S3))
    if found is None:
        raise ValueError("the address is not `s3://bucket/prefix` or `s3://https://host:port/bucket/prefix`")
    return S3Address(found["bucket"], found["prefix"].strip("/"), own["endpoint"] if own else "")


def beside(place: Where, ending: str) -> Where:
    """Name the place that is called like this one, with an ending. Raises ValueError for what has no name of its own:
    a whole bucket, or a whole file system."""
    if isinstance(place, Path):
        named = place if place.name not in {"", ".."} else place.resolve()
        if not named.name:
            raise ValueError(f"{place} is a whole file system: name a folder in it")
        return named.with_name(named.name + ending)
    if not place.prefix:
        raise ValueError(f"{place} is a whole bucket: name a prefix in it")
    return replace(place, prefix=place.prefix + ending)


def is_within(place: Where, other: Where) -> bool:
    """Whether a place is the other one, or lies in it."""
    if isinstance(place, Path) and isinstance(other, Path):
        return place.resolve().is_relative_to(other.resolve())
    return f"{place}/".startswith(f"{other}/")


_validate: Callable[[object], Where] = parse_place
Place = Annotated[
    Path | S3Address,
    PlainValidator(_validate),
    PlainSerializer(str, return_type=str, when_used="json"),
    WithJsonSchema({"type": "string", "format": "path"}),
]
"""The field of a setting that is such a place."""
