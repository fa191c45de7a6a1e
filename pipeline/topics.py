"""The topics of a line: which there are, how each is set, and their creation by `logicrd topics create`.

Only what is missing is made; a topic that is there is never changed. The line itself makes none. Called by the command
line and by the embedded stack.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kafka.admin import ConfigResource, ConfigResourceType, KafkaAdminClient
from kafka.errors import KafkaError

from pipeline.brokers import client_options, unreachable
from pipeline.servers import Kafka as KafkaSettings

_TIMEOUT_MS = 10_000


@dataclass(frozen=True, slots=True)
class Topic:
    """One topic without its prefix; `partitions` None leaves the number to whoever creates it."""

    kind: str
    partitions: int | None = None
    settings: Mapping[str, str] = field(default_factory=dict)


TOPICS = (
    Topic("verdict.v1"),
    Topic("view.v1"),
    Topic("trigger.v1"),
    Topic("audit.v1"),
    # The last word of each camera and worker stays for a week; what lies in the open segment is never compacted.
    Topic("status.v1", settings={"cleanup.policy": "compact,delete", "segment.ms": "3600000"}),
    Topic("dlq.v1"),
    # A camera belongs to a partition, and a partition to a worker: as many as workers could ever share, never changed.
    Topic("cameras.v1", 32, {"cleanup.policy": "compact"}),
)


@dataclass(frozen=True, slots=True)
class Wanted:
    """A topic to be made. A number of copies of -1 is the broker's default."""

    name: str
    partitions: int
    copies: int
    settings: Mapping[str, str]


def plan(
    prefix: str, present: Mapping[str, Mapping[str, str]], *, partitions: int, copies: int
) -> tuple[list[Wanted], dict[str, str]]:
    """Give the topics to be made, and what is wrong with those that are there, by name.

    `present` has the settings of each topic that is there, at least those that `TOPICS` names.
    With three copies and more, one may be away and verdicts are still taken: `min.insync.replicas` is then two.
    """
    durable = {"min.insync.replicas": "2"} if copies >= 3 else {}
    missing: list[Wanted] = []
    faults: dict[str, str] = {}
    for topic in TOPICS:
        name = f"{prefix}.{topic.kind}"
        if name not in present:
            missing.append(Wanted(name, topic.partitions or partitions, copies, {**durable, **topic.settings}))
        elif differing := _differences(topic, present[name]):
            faults[name] = differing
    return missing, faults


def _differences(topic: Topic, found: Mapping[str, str]) -> str:
    """Say what is set otherwise; the order of several policies means nothing."""
    return ", ".join(
        f"{key} is {found.get(key, 'unknown')}, not {value}"
        for key, value in topic.settings.items()
        if set(found.get(key, "").split(",")) != set(value.split(","))
    )


def create(settings: KafkaSettings, *, partitions: int, copies: int) -> tuple[list[Wanted], dict[str, str]]:
    """Make the topics that are missing; gives them, and what is wrong with the others. Raises DependencyError."""
    try:
        options = client_options(settings)
        del options["allow_auto_create_topics"]  # an option of readers and writers
        with KafkaAdminClient(**options, request_timeout_ms=_TIMEOUT_MS) as admin:
            missing, faults = plan(
                settings.topic_prefix, _present(admin, settings.topic_prefix), partitions=partitions, copies=copies
            )
            if missing:
                new = {
                    topic.name: {
                        "num_partitions": topic.partitions,
                        "replication_factor": topic.copies,
                        "configs": dict(topic.settings),
                    }
                    for topic in missing
                }
                admin.create_topics(new, timeout_ms=_TIMEOUT_MS, wait_for_metadata=True)
    except KafkaError as error:
        raise unreachable(settings, error) from None
    return missing, faults


def _present(admin: KafkaAdminClient, prefix: str) -> dict[str, dict[str, str]]:
    """Give the line's topics that are there, with the settings that matter."""
    known = {f"{prefix}.{topic.kind}": topic for topic in TOPICS}
    present: dict[str, dict[str, str]] = {name: {} for name in admin.list_topics() if name in known}
    resources = [
        ConfigResource(ConfigResourceType.TOPIC, name, dict.fromkeys(known[name].settings))
        for name in present
        if known[name].settings
    ]
    if resources:
        for name, values in admin.describe_configs(resources, config_filter="all")["topic"].items():
            present[name] = {key: str(value["value"]) for key, value in values.items()}
    return present
