"""Every setting of a line, and the only reader of its files, environment and secrets.

A line is one YAML file. Values are looked up in the environment first (`LOGICRD_KAFKA__BOOTSTRAP`, two underscores a
level), then in the file, then in the defaults here. Unknown keys are refused with their place in the file and the
nearest known name. Paths in the file are relative to the file. Called by the command line and by nothing below it.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast, get_args

import yaml
from pydantic import BaseModel, Field, IPvAnyNetwork, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from pipeline.cameras import AnyCamera, Block, Camera, Name, Positive, graph_cameras, read_secret
from pipeline.errors import ConfigError
from pipeline.graph_rules import check_graphs
from pipeline.region import RegionOfInterest, with_mask_read
from pipeline.servers import Kafka, Redis, Tracing, Triton
from pipeline.stations import Station, StationView, check_views

ENV_PREFIX = "LOGICRD_"
MODELINE = "# yaml-language-server: $schema="
_B = TypeVar("_B", bound=Block)


class Batching(Block):
    """How frames are gathered into requests."""

    max_size: Annotated[int, Field(ge=1, le=64)] = 8
    """Most frames in one request; not above the model's own limit."""
    max_age_ms: Annotated[float, Field(ge=0, le=10_000, allow_inf_nan=False)] = 30.0
    """Longest time a frame waits for others to join it while the server is free."""


class Evidence(Block):
    """Pictures kept for review."""

    dir: Path | None = None
    """Folder for the pictures; unset keeps none."""
    keep: Literal["ng", "all"] = "ng"
    """`ng`: overlays of NG and REVIEW parts. `all`: besides, every frame as it went to the model (lossless PNG)."""
    max_files: Annotated[int, Field(ge=1, le=1_000_000)] = 2_000
    """The oldest pictures are removed beyond this number."""


class Outbox(Block):
    """Events on disk until Kafka has them."""

    dir: Path | None = Path("outbox")
    """Folder on a local disk, one for each worker; null goes without: events then are lost with the worker."""
    max_mb: Annotated[int, Field(ge=1, le=1_000_000)] = 2048
    """Most room on disk. Beyond it no verdict is OK (cause `outbox_unavailable`); nothing stored is thrown away."""
    max_age_h: Positive = 72.0
    """The same once the oldest event has waited so long for Kafka."""

    @property
    def max_bytes(self) -> int:
        """The bound on room, in bytes."""
        return self.max_mb * 1024 * 1024

    @property
    def max_age_s(self) -> float:
        """The bound on age, in seconds."""
        return self.max_age_h * 3600


class Monitoring(Block):
    """What ops look at."""

    port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """Port for `/metrics`, `/livez` and `/readyz`; 0 takes a free one, unset serves none."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    heartbeat_s: Annotated[float, Field(ge=0.1, le=3600, allow_inf_nan=False)] = 10.0
    """How often the worker tells of itself on `<prefix>.status.v1`."""
    log_parts: bool = False
    """One JSON line a part on standard error, OK parts included, in place of the log line of those that are not OK."""

    @field_validator("host")
    @classmethod
    def _is_address(cls, host: str) -> str:
        ipaddress.ip_address(host)
        return host


class Pool(Block):
    """Cameras that this worker shares with others: those of one pool of the topic `<prefix>.cameras.v1`.

    The workers of a pool reach the same cameras and have the same `line`. `logicrd cameras apply` fills it.
    """

    name: Name = "default"
    """Which pool; the workers of it are the consumer group `<prefix>.workers.<name>`."""
    capacity: Annotated[int, Field(ge=1, le=1000)] = 16
    """Most cameras of the pool that this worker reads; one more is refused by name, and the others go on."""
    root: Path = Path()
    """Folder on this worker from which relative paths of the pool's cameras are taken; the files of their passwords
    must lie in it. Unset: the folder of the line file."""


class LineConfig(BaseSettings):
    """One line: its cameras and the servers it works with."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        title="LogicRD line",
        # What `_unique_cameras` says of a line without cameras.
        json_schema_extra={
            "anyOf": [
                {"required": ["cameras"], "properties": {"cameras": {"minItems": 1}}},
                {"required": ["pool"], "properties": {"pool": {"type": "object"}}},
            ]
        },
    )

    site: Name = "site"
    """Plant; ISA-95 site."""
    area: Name = "area"
    """Part of the plant; ISA-95 area."""
    line: Name
    """Production line; first half of the Kafka key."""
    budget_ms: Annotated[float, Field(gt=0, le=600_000, allow_inf_nan=False)] = 2_000.0
    """From capture to verdict; a part not judged by then is UNINSPECTED with cause `deadline`."""
    drain_timeout_s: Positive = 20.0
    """Time for the whole end of a run, from the signal on: open parts get their verdicts (the latest after 70 % of it,
    then as UNINSPECTED), then events are delivered. What Kafka has not got by then is left in the outbox. Kubernetes
    must give the pod some seconds more."""
    cameras: list[Camera] = []
    """The cameras that this worker reads, whatever the pool holds; at least one where there is no pool."""
    camera_networks: list[IPvAnyNetwork] = []
    """Networks that cameras must lie in, of this file and of a pool, as `[10.20.0.0/16]`; every address of a name must.
    One outside is not opened (`address_refused`). Empty: no limit."""
    pool: Pool | None = None
    """Share of a pool of cameras; unset: this worker reads `cameras` and no others."""
    stations: list[Station] = Field(default=[])
    """Stations where a part is more than a frame: several views, or triggers. Unset: each frame is a part."""
    triton: Triton = Triton()
    """Inference server."""
    kafka: Kafka = Kafka()
    """Broker for verdicts."""
    redis: Redis = Redis()
    """Server for thresholds."""
    batching: Batching = Batching()
    """Gathering of frames."""
    outbox: Outbox = Outbox()
    """Events on disk until Kafka has them."""
    evidence: Evidence = Evidence()
    """Pictures kept for review."""
    monitoring: Monitoring = Monitoring()
    """Metrics and health."""
    tracing: Tracing | None = None
    """Traces of parts; unset: none, at no cost."""

    @model_validator(mode="after")
    def _unique_cameras(self) -> LineConfig:
        if not self.cameras and self.pool is None:
            raise ValueError("cameras: list at least one, or let this worker read a `pool`")
        seen: set[str] = set()
        for camera in self.cameras:
            if camera.id in seen:
                raise ValueError(f"cameras: two cameras are called {camera.id!r}; ids are unique on a line")
            seen.add(camera.id)
        return self

    @model_validator(mode="after")
    def _stations_fit_cameras(self) -> LineConfig:
        if len({station.name for station in self.stations}) < len(self.stations):
            raise ValueError("stations: two stations have the same name")
        for station in self.stations:
            here = {camera.id for camera in self.cameras if camera.station == station.name}
            check_views(station, here, pooled=self.pool is not None)
        check_graphs(self.cameras, self.stations, self.triton, pooled=self.pool is not None)
        return self

    @model_validator(mode="after")
    def _begins_without_kafka(self) -> LineConfig:
        triggered = [station.name for station in self.stations if station.trigger == "message"]
        needs = [
            (self.pool is not None, "a worker with a `pool` has its cameras from Kafka"),
            (bool(triggered), f"station {', '.join(triggered)} has its triggers from Kafka (`trigger: message`)"),
            (self.outbox.dir is None, "without `outbox.dir` verdicts have no place to wait"),
        ]
        for needed, why in needs:
            if needed and not self.kafka.required_at_start:
                raise ValueError(f"kafka.required_at_start: cannot be false: {why}")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Put the environment above the file; no dotenv, no secrets folder."""
        del settings_cls, dotenv_settings, file_secret_settings
        return env_settings, init_settings

    @property
    def products(self) -> list[str]:
        """Products that the line may have to judge, each once, in the order of the file."""
        fixed = [view.product for station in self.stations for view in station.views if view.product is not None]
        recipes = [product for station in self.stations for product in station.recipes]
        return list(dict.fromkeys([*(camera.product for camera in self.cameras), *fixed, *recipes]))

    @property
    def graph_products(self) -> list[str]:
        """Products that graphs ask Triton for, each once, in the order of the file."""
        return list(dict.fromkeys(camera.product for camera in graph_cameras(self.cameras)))

    @property
    def station_plans(self) -> dict[str, Station]:
        """The stations of the file by name; those that need views and list none have all of their cameras."""
        return {station.name: self._with_views(station) for station in self.stations}

    def _with_views(self, station: Station) -> Station:
        if station.views or station.trigger == "free_run":
            return station
        views = [StationView(camera=camera.id) for camera in self.cameras if camera.station == station.name]
        return station.model_copy(update={"views": views})


def load(path: Path) -> LineConfig:
    """Read and check a line file.

    Raises ConfigError with one line per fault: where, what, and the nearest known name for an unknown key.
    """
    data = read_yaml(path, hint="name the line file with --config")
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a line file is a mapping of keys, not {type(data).__name__}")
    # The settings library takes such names for switches of its own and would not call them unknown.
    if private := [key for key in data if str(key).startswith("_")]:
        raise ConfigError(f"{path}: {private[0]}: unknown key", hint="`logicrd config schema` lists every key")
    try:
        config = LineConfig(**data)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(path, error)), hint="`logicrd config schema` lists every key") from None
    except SettingsError as error:
        raise ConfigError(
            f"environment ({ENV_PREFIX}...): {error}", hint="lists and blocks are JSON there, as '[\"host:9092\"]'"
        ) from None
    except TypeError:
        raise ConfigError(f"{path}: keys must be words", hint="`logicrd config schema` lists every key") from None
    config = _with_masks_read(_rooted(config, path.resolve().parent), path)
    for secret in _secrets(config):
        read_secret(secret)
    for pem in (config.redis.ca_file, config.redis.certificate_file):
        if pem is not None and not pem.is_file():
            raise ConfigError(
                f"{path}: redis: {pem} is not there", hint="correct the path; it is taken from the file's"
            )
    return config


def schema() -> dict[str, Any]:
    """Give the JSON Schema of the line file, in draft-07, which editors and Helm speak."""
    document = LineConfig.model_json_schema()
    document["$schema"] = "http://json-schema.org/draft-07/schema#"
    return cast(dict[str, Any], _rename_definitions(document))


def without_colour() -> bool:
    """Say whether the user asked for plain output (https://no-color.org)."""
    return bool(os.environ.get("NO_COLOR"))  # noqa: TID251 (this module reads the environment)


def read_yaml(path: Path, *, hint: str = "") -> object:
    """Read a YAML file, whatever it holds. Raises ConfigError, with `hint` when there is no such file."""
    try:
        return yaml.safe_load(read_text(path, hint=hint))
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path}: not YAML: {error}") from None


def read_text(path: Path, *, hint: str = "") -> str:
    """Read a file of text. Raises ConfigError, with `hint` when there is no such file."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", hint=hint) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: {error}") from None


def _rooted(config: LineConfig, root: Path) -> LineConfig:
    """Resolve the file's relative paths against the folder it lies in."""
    blocks = {name: rooted(getattr(config, name), root) for name in ("triton", "kafka", "redis", "evidence", "outbox")}
    pool = None if config.pool is None else rooted(config.pool, root)
    tracing = None if config.tracing is None else rooted(config.tracing, root)
    cameras = [rooted(camera, root) for camera in config.cameras]
    return config.model_copy(update={**blocks, "cameras": cameras, "pool": pool, "tracing": tracing})


def rooted(block: _B, root: Path) -> _B:
    """Resolve a block's relative paths, and those of the blocks in it, against a folder."""
    values = {name: getattr(block, name) for name in type(block).model_fields}
    paths = {name: root / value for name, value in values.items() if isinstance(value, Path)}
    blocks = {name: rooted(value, root) for name, value in values.items() if isinstance(value, Block)}
    return block.model_copy(update={**paths, **blocks})


def _with_masks_read(config: LineConfig, path: Path) -> LineConfig:
    """Put the files of the regions' masks into the settings. Raises ConfigError."""
    return config.model_copy(update={"cameras": [with_mask(camera, path) for camera in config.cameras]})


def with_mask(camera: Camera, path: Path) -> Camera:
    """Put the file of a region's mask into the settings; relative to the file `path`, as listed. Raises ConfigError."""
    if camera.region is None:
        return camera
    try:
        region = with_mask_read(camera.region, path.resolve().parent)
    except ValueError as error:
        raise ConfigError(f"{path}: camera {camera.id!r}: region: {error}", hint="check `region.mask`") from None
    return camera.model_copy(update={"region": region})


def _secrets(config: LineConfig) -> Iterator[Path]:
    cameras = (getattr(camera, "password_file", None) for camera in config.cameras)
    kafka = None if config.kafka.sasl is None else config.kafka.sasl.password_file
    servers = (kafka, config.redis.password_file, config.redis.key_file, config.triton.control_key_file)
    yield from (path for path in (*cameras, *servers) if path is not None)


def _explain(path: Path, error: ValidationError) -> Iterator[str]:
    for fault in error.errors(include_url=False, include_context=False):
        steps = list(fault["loc"])
        if steps[:1] == ["cameras"] and len(steps) > 2:
            del steps[2]  # the kind of camera: a step of the checker, not of the file
        place = re.sub(r"\.\[", "[", ".".join(f"[{step}]" if isinstance(step, int) else str(step) for step in steps))
        if fault["type"] == "extra_forbidden":
            yield f"{path}: {place}: unknown key{nearest(str(steps[-1]), steps[:-1])}"
        else:
            yield f"{path}: {place or 'line'}: {fault['msg'].removeprefix('Value error, ')}"


def nearest(word: str, place: list[int | str]) -> str:
    """Suggest the known key that is nearest to an unknown one at a place of the file; '' when none is near."""
    matches = difflib.get_close_matches(word, _known_keys(place), n=1, cutoff=0.5)
    return f"; did you mean `{matches[0]}`?" if matches else ""


def _known_keys(place: list[int | str]) -> list[str]:
    """List the keys that may stand at a place of the file."""
    if not place:
        return list(LineConfig.model_fields)
    if "region" in place:
        return list(RegionOfInterest.model_fields)
    if place[0] == "cameras":
        return sorted({key for kind in get_args(AnyCamera) for key in kind.model_fields})
    if place[0] == "stations":
        return list((StationView if "views" in place else Station).model_fields)
    block: type[BaseModel] | None = LineConfig
    for step in place:
        block = _block(block.model_fields.get(str(step))) if block is not None else None
    return [] if block is None else list(block.model_fields)


def _block(entry: FieldInfo | None) -> type[BaseModel] | None:
    """Find the kind of block that a key holds, if it holds one."""
    kinds = () if entry is None else get_args(entry.annotation) or (entry.annotation,)
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _rename_definitions(node: object) -> object:
    """Move 2020-12's `$defs` to draft-07's `definitions`, references included."""
    if isinstance(node, list):
        return [_rename_definitions(item) for item in node]
    if not isinstance(node, dict):
        return node
    renamed = {("definitions" if key == "$defs" else key): _rename_definitions(value) for key, value in node.items()}
    if isinstance(reference := renamed.get("$ref"), str):
        renamed["$ref"] = reference.replace("#/$defs/", "#/definitions/")
    return renamed
