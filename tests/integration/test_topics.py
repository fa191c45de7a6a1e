"""`logicrd topics create` against the real broker."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from kafka.admin import KafkaAdminClient

from pipeline.topics import TOPICS

pytestmark = pytest.mark.stack


def create(line_file: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline.cli", "topics", "create", "--copies", "1", "--partitions", "2"]
    return subprocess.run(
        [*command, "-c", str(line_file), "--json"], capture_output=True, text=True, timeout=60, check=False
    )


def settings(folder: Path, bootstrap: str, prefix: str) -> Path:
    path = folder / "line.yaml"
    kafka = {"bootstrap": [bootstrap], "topic_prefix": prefix, "startup_timeout_s": 10}
    path.write_text(yaml.safe_dump({"line": "line-1", "pool": {}, "kafka": kafka}))
    return path


def test_topics_are_made_once(stack, tmp_path):
    """The first call makes all of them as asked, the second none; both end well."""
    kafka = stack.endpoints["kafka"]
    path = settings(tmp_path, kafka, "made-once")
    first = create(path)
    assert first.returncode == 0, first.stderr
    assert len(json.loads(first.stdout)["created"]) == len(TOPICS)
    with KafkaAdminClient(bootstrap_servers=kafka) as admin:
        names = ["made-once.verdict.v1", "made-once.cameras.v1"]
        counts = {topic["name"]: len(topic["partitions"]) for topic in admin.describe_topics(names)}
    assert counts == {"made-once.verdict.v1": 2, "made-once.cameras.v1": 32}
    second = create(path)
    assert second.returncode == 0, second.stderr
    assert json.loads(second.stdout) == {"created": [], "faults": {}}


def test_a_pool_topic_without_compaction_is_refused(stack, tmp_path):
    """Somebody made it with the broker's defaults: exit 5 names it, and it is left as it is."""
    kafka = stack.endpoints["kafka"]
    with KafkaAdminClient(bootstrap_servers=kafka) as admin:
        admin.create_topics({"by-hand.cameras.v1": {"num_partitions": 1, "replication_factor": 1}}, timeout_ms=10_000)
    answer = create(settings(tmp_path, kafka, "by-hand"))
    assert answer.returncode == 5
    assert "by-hand.cameras.v1: cleanup.policy is delete, not compact" in answer.stderr


def test_a_broker_that_is_away_is_named(tmp_path):
    """Exit 4 with the address."""
    answer = create(settings(tmp_path, "127.0.0.1:9", "away"))
    assert answer.returncode == 4
    assert "127.0.0.1:9" in answer.stderr
