"""The camera pool on paper: its records, where they lie in the topic, and what a worker has to start, stop and refuse.

A record of `<prefix>.cameras.v1` has the camera's id as its key and, as JSON, the camera's block of the line file with
the name of its `pool`; a tombstone removes it. All cameras of a station lie in one partition, so that one worker reads
them: the parts of a station are put together and numbered in one place. Pure: no clock, no client. Called by `pool`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from pipeline.cameras import Camera, PoolMember, graph_cameras
from pipeline.config import nearest
from pipeline.errors import ConfigError

_APPLY = "correct it with `logicrd cameras apply`"
_CAMERA: TypeAdapter[Camera] = TypeAdapter(Camera)


@dataclass(frozen=True, slots=True)
class PoolCamera:
    """A camera, and the pool whose workers can reach it."""

    pool: str
    camera: Camera

    @property
    def station(self) -> tuple[str, str]:
        """What is never split between workers."""
        return self.pool, self.camera.station

    def encode(self) -> bytes:
        """Give the record's value: what was set, and none of the defaults."""
        document = {"pool": self.pool, **self.camera.model_dump(mode="json", exclude_unset=True)}
        return json.dumps(document).encode()


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a worker does not read a camera: a code for events and metrics, and words for the log."""

    reason: Literal["invalid", "product_unknown", "duplicate", "capacity"]
    text: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a worker has to do, in this order."""

    stop: tuple[str, ...]
    start: tuple[Camera, ...]
    refuse: dict[str, Refusal]


Place = tuple[int, str]
"""Partition and camera id: where a record lies in the topic."""


@dataclass(frozen=True, slots=True)
class Change:
    """One camera that differs, and the records that make it right; a value of None is a tombstone."""

    kind: Literal["added", "changed", "removed"]
    camera_id: str
    pool: str
    product: str
    station: str
    writes: tuple[tuple[Place, bytes | None], ...]

    @property
    def moves(self) -> bool:
        """Whether one worker has to let go of the camera before another reads it."""
        return len({value is None for _, value in self.writes}) == 2


def plan(
    wanted: Mapping[str, Camera],
    running: Mapping[str, Camera],
    *,
    products: Collection[str],
    taken: Collection[str],
    capacity: int,
) -> Plan:
    """Compare what a worker should read with what it reads; all by camera id.

    A camera whose settings changed is stopped and started; it keeps its place. What runs stays; new cameras come in
    the order of their names until `capacity`. `taken` are ids that the line file gives away.
    """
    stop = tuple(name for name, camera in running.items() if wanted.get(name) != camera)
    room = capacity - (len(running) - len(stop))
    start: list[Camera] = []
    refuse: dict[str, Refusal] = {}
    for name in sorted(wanted.keys() - (running.keys() - set(stop)), key=lambda name: (name not in stop, name)):
        camera = wanted[name]
        if camera.product not in products:
            refuse[name] = _product_unknown(camera.product, products)
        elif name in taken:
            refuse[name] = Refusal("duplicate", "the line file has a camera of this name", "give one of them another")
        elif len(start) >= room:
            full = f"this worker reads {capacity} cameras of the pool already"
            refuse[name] = Refusal("capacity", full, "start another worker, or raise pool.capacity")
        else:
            start.append(camera)
    return Plan(stop, tuple(start), refuse)


def _product_unknown(product: str, products: Collection[str]) -> Refusal:
    return Refusal(
        "product_unknown",
        f"product {product!r} is not served here; there are: {', '.join(sorted(products)) or 'none'}",
        "export the product and let Triton load it: the camera is read then; or correct the camera",
    )


def read_record(key: bytes | None, value: bytes, pool: str) -> Camera | Refusal | None:
    """Read a record as a worker of `pool` does; None for another pool's camera. Nothing in a record is trusted."""
    try:
        document = _object(value)
        if _pool_of(document, "record") != pool:
            return None
        camera = parse(document, "record").camera
    except ConfigError as error:
        return Refusal("invalid", str(error), _APPLY)
    if camera.id.encode() != key:
        return Refusal("invalid", f"record: id {camera.id!r} is not the record's key", _APPLY)
    return camera


def read_list(document: object, path: str) -> list[PoolCamera]:
    """Read the list of cameras that `cameras apply` gets. Raises ConfigError naming the place in the file."""
    if not isinstance(document, list):
        raise ConfigError(f"{path}: the cameras are a list", hint="as `cameras` in the line file, each with its `pool`")
    entries = [parse(item, f"{path}: [{number}]") for number, item in enumerate(document)]
    counts = Counter(entry.camera.id for entry in entries)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise ConfigError(f"{path}: two cameras are called {twice[0]!r}", hint="ids are unique in the topic")
    pools: dict[str, str] = {}
    for entry in entries:
        if pools.setdefault(entry.camera.station, entry.pool) != entry.pool:
            raise ConfigError(f"{path}: station {entry.camera.station!r} is in two pools", hint="one worker reads it")
    return entries


def parse(document: object, place: str) -> PoolCamera:
    """Read one camera with its pool. Raises ConfigError, whose text never holds a value: it may be a password."""
    if not isinstance(document, dict):
        raise ConfigError(f"{place}: a camera is a mapping of keys, not {type(document).__name__}")
    block = {key: value for key, value in document.items() if key != "pool"}
    try:
        camera = _CAMERA.validate_python(block)
        if graph_cameras([camera]):
            raise ConfigError(
                f"{place}: a camera with `inference: graph` belongs in a worker's line file, not in a pool"
            )
        return PoolCamera(_pool_of(document, place), camera)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
        steps = fault["loc"][1:]
        where = ".".join(str(step) for step in steps) or "type"
        words = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            words = f"unknown key{nearest(str(steps[-1]), ['cameras', *steps[:-1]])}"
        raise ConfigError(f"{place}: {where}: {words}") from None


def difference(
    wanted: Sequence[PoolCamera], present: Mapping[Place, bytes], partitions: int, *, prune: bool
) -> list[Change]:
    """List what has to be written so that the topic holds `wanted`; without `prune` other cameras stay as they are."""
    names = {entry.camera.id for entry in wanted}
    known = {place: _present(value) for place, value in present.items() if place[1] in names or not prune}
    homes = _homes(wanted, known, partitions)
    changes = [_change(entry, homes[entry.station], present, known) for entry in wanted]
    if prune:
        changes += [_removal(name, present) for name in sorted({name for _, name in present} - names)]
    return [change for change in changes if change is not None]


def table_rows(present: Mapping[Place, bytes]) -> list[dict[str, Any]]:
    """Give each camera of the topic, with its pool, as a row of words; of a record that is no camera the id alone."""
    rows: dict[str, dict[str, Any]] = {}
    for (_, name), value in sorted(present.items()):
        entry = _present(value)
        known = {} if entry is None else {"pool": entry.pool, **entry.camera.model_dump(mode="json")}
        rows.setdefault(name, {"id": name, "pool": "", **known})
    return sorted(rows.values(), key=lambda row: (row["pool"], row["id"]))


def cameras_of(present: Mapping[Place, bytes], pool: str) -> list[Camera]:
    """Give the cameras of one pool in the topic."""
    entries = (_present(value) for value in present.values())
    return [entry.camera for entry in entries if entry is not None and entry.pool == pool]


def _change(
    entry: PoolCamera, home: int, present: Mapping[Place, bytes], known: Mapping[Place, PoolCamera | None]
) -> Change | None:
    camera = entry.camera
    places = [place for place in present if place[1] == camera.id]
    if places == [(home, camera.id)] and known[places[0]] == entry:
        return None
    # What lies in another partition, or in another pool, is another worker's until the tombstone.
    away: list[tuple[Place, bytes | None]] = [
        (place, None)
        for place in places
        if place[0] != home or ((old := known[place]) is not None and old.pool != entry.pool)
    ]
    writes = (*away, ((home, camera.id), entry.encode()))
    kind: Literal["added", "changed"] = "changed" if places else "added"
    return Change(kind, camera.id, entry.pool, camera.product, camera.station, writes)


def _removal(name: str, present: Mapping[Place, bytes]) -> Change:
    places = [place for place in present if place[1] == name]
    old = _present(present[places[0]])
    writes = tuple((place, None) for place in places)
    if old is None:
        return Change("removed", name, "", "", "", writes)
    return Change("removed", name, old.pool, old.camera.product, old.camera.station, writes)


def _homes(
    wanted: Sequence[PoolCamera], known: Mapping[Place, PoolCamera | None], partitions: int
) -> dict[tuple[str, str], int]:
    """Give each station its partition: where most of it lies, or else where its pool has the fewest cameras."""
    order = _spread(partitions)
    homes: dict[tuple[str, str], int] = {}
    filled: Counter[tuple[str, int]] = Counter()
    lying: dict[tuple[str, str], Counter[int]] = {}
    for (partition, _), entry in known.items():
        if entry is not None:
            filled[entry.pool, partition] += 1
            lying.setdefault(entry.station, Counter())[partition] += 1
    for station, cameras in Counter(entry.station for entry in wanted).items():
        here = lying.get(station)
        if here:
            homes[station] = min(here, key=lambda partition: (-here[partition], partition))
            continue
        homes[station] = min(order, key=lambda partition: filled[station[0], partition])
        filled[station[0], homes[station]] += cameras
    return homes


def _spread(partitions: int) -> list[int]:
    """Order partitions so that the first few are shared evenly by workers that get them in turns, and in runs too.

    Kafka deals them out in turns to workers that come together, and gives a run of them to one that comes later. Steps
    of the golden section serve both.
    """
    step = next(step for step in range(round(partitions * 0.618), -1, -1) if math.gcd(step, partitions) == 1)
    return [number * step % partitions for number in range(partitions)]


def _present(value: bytes) -> PoolCamera | None:
    try:
        return parse(_object(value), "record")
    except ConfigError:
        return None


def _pool_of(document: Mapping[str, Any], place: str) -> str:
    try:
        return PoolMember.model_validate({key: value for key, value in document.items() if key == "pool"}).pool
    except ValidationError:
        raise ConfigError(f"{place}: pool: a name of letters, digits, '_', '.' and '-'") from None


def _object(value: bytes) -> dict[str, Any]:
    try:
        document = json.loads(value)
    except (ValueError, RecursionError):
        raise ConfigError("record: not JSON") from None
    if not isinstance(document, dict):
        raise ConfigError("record: no JSON object")
    return document


def merged(partitions: Iterable[Mapping[str, Camera | Refusal]]) -> tuple[dict[str, Camera], dict[str, Refusal]]:
    """Put a worker's partitions together; of a camera that lies in two of them the first counts."""
    cameras: dict[str, Camera] = {}
    refused: dict[str, Refusal] = {}
    for records in partitions:
        for name, record in records.items():
            if isinstance(record, Refusal):
                refused.setdefault(name, record)
            else:
                cameras.setdefault(name, record)
    return cameras, {name: refusal for name, refusal in refused.items() if name not in cameras}
