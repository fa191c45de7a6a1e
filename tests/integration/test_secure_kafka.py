"""Kafka that asks who is there: TLS by a throw-away authority, every login, and what each refusal says."""

from __future__ import annotations

import gc
import json
import logging
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from cloudevents.core.bindings.kafka import KafkaMessage, from_kafka
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from kafka import KafkaConsumer
from kafka.structs import TopicPartition
from line_process import wait_until
from secure_broker import PASSWORD
from wire_events import AT, PLACE, sent

from pipeline import config
from pipeline.brokers import client_options, poll
from pipeline.config import Pool
from pipeline.errors import ConfigError, DependencyError
from pipeline.events import Encoder
from pipeline.health import Health
from pipeline.metrics import Metrics
from pipeline.pool import CameraPool, PoolTopic
from pipeline.roster import Change
from pipeline.servers import Kafka
from pipeline.sink import Sink
from pipeline.stations import Station, StationView
from pipeline.tail import VerdictReader
from pipeline.triggers import TriggerReader

# The library leaves the sockets of refused connections to the garbage collector.
pytestmark = [pytest.mark.stack, pytest.mark.timeout(400), pytest.mark.filterwarnings("ignore::ResourceWarning")]

ROOT = Path(__file__).parents[2]
SCHEMAS = {path.name: json.loads(path.read_text()) for path in (ROOT / "pipeline/schemas").glob("*.v1.json")}


WRONG = "wr0ng-one"


@pytest.fixture(scope="module", autouse=True)
def _leftovers() -> Iterator[None]:
    """Collect here what the library left behind; its log would hold on to it."""
    logger = logging.getLogger("kafka")
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(logging.NOTSET)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def authority(secure, name="ca") -> dict[str, Any]:
    return {"ca_file": secure.path(f"{name}.pem")}


def certificate(secure) -> dict[str, Any]:
    return {**authority(secure), "certificate_file": secure.path("line.pem"), "key_file": secure.path("line.key")}


WAYS = {
    "SCRAM-SHA-512 over TLS": lambda s: ("SASL_SSL", {"tls": authority(s), "sasl": s.login("SCRAM-SHA-512")}),
    "SCRAM-SHA-256 over TLS": lambda s: ("SASL_SSL", {"tls": authority(s), "sasl": s.login("SCRAM-SHA-256")}),
    "PLAIN over TLS": lambda s: ("SASL_SSL", {"tls": authority(s), "sasl": s.login("PLAIN")}),
    "a client certificate": lambda s: ("SSL", {"tls": certificate(s)}),
    "SCRAM-SHA-512 in the open": lambda s: ("SASL_PLAINTEXT", {"sasl": s.login("SCRAM-SHA-512")}),
}


def settings_for(secure, way, **more) -> Kafka:
    listener, security = way(secure)
    return Kafka(**secure.settings(listener, **security, **more))


def raw_records(settings: Kafka, topic: str, source: str) -> list[Any]:
    """All records of a topic whose value or headers name a source, as the library gives them."""
    consumer = KafkaConsumer(**client_options(settings), group_id=None, enable_auto_commit=False)
    partitions = [TopicPartition(topic, number) for number in consumer.partitions_for_topic(topic)]
    consumer.assign(partitions)
    consumer.seek_to_beginning()
    ends, found = consumer.end_offsets(partitions), []
    while any(consumer.position(partition) < end for partition, end in ends.items()):
        found += poll(consumer, 250)  # steps over what other tests have put there for the library to choke on
    consumer.close()
    wanted = source.encode()
    return [record for record in found if wanted in (dict(record.headers).get("ce_source") or record.value or b"")]


@pytest.mark.parametrize(
    ("way", "mode"),
    [
        pytest.param(make, mode, id=f"{name}, {mode}")
        for name, make in WAYS.items()
        for mode in ("binary", "structured")
    ],
)
def test_what_is_read_back_is_a_cloud_event_that_fits_its_schema(secure, way, mode, request):
    """By every login and in both modes: all kinds of events arrive, and the SDK and the schemas take each of them."""
    settings = settings_for(secure, way)
    place = replace(PLACE, line=f"l{abs(hash(request.node.name)) % 10**9}")
    events = list(sent(mode, place))
    sink = Sink(settings, encoder=Encoder(place, mode), metrics=(metrics := Metrics()), health=Health())
    sink.start()
    sink.put(*(event for _, _, event in events))
    assert sink.close(time.monotonic() + 30.0) == []
    assert metrics.registry.get_sample_value("inspection_events_total", {"fate": "acknowledged"}) == len(events)
    checked, all_may = 0, Kafka(**secure.settings("PLAINTEXT"))
    for topic in ("verdict.v1", "view.v1", "audit.v1", "status.v1"):
        records = raw_records(all_may, f"inspection.{topic}", place.source)
        assert len(records) == sum(event.topic == topic for _, _, event in events)
        for record in records:
            message = KafkaMessage(headers=dict(record.headers), key=record.key, value=record.value)
            cloud = from_kafka(message, JSONFormat(), CloudEvent)
            assert (cloud.get_source(), cloud.get_time()) == (place.source, AT)
            assert cloud.get_extension("partitionkey").encode() == record.key
            kind = cloud.get_type().removeprefix("io.logicrd.inspection.")
            validator = jsonschema.Draft202012Validator(
                SCHEMAS["verdict.v1.json" if kind == "view.v1" else f"{kind}.json"],
                format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER,
            )
            validator.validate(cloud.get_data())
            checked += 1
    assert checked == len(events)


def test_every_client_of_the_line_logs_in(secure):
    """Triggers, the pool's topic and the reader of verdicts come through the same door as the verdicts."""
    settings = settings_for(secure, WAYS["SCRAM-SHA-512 over TLS"])
    reader = trigger_reader(settings)
    reader.connect()
    reader.start()
    reader.close()
    worker = CameraPool(settings, Pool(), None, metrics=Metrics(), health=Health())
    worker.connect()
    worker.start([])
    wait_until(lambda: worker._consumer.assignment(), 30, "a place in the group")
    worker.close()
    topic = PoolTopic(settings)
    topic.write([])
    assert topic.read() == ({}, 2)
    with VerdictReader(settings, start="now") as verdicts:
        assert list(verdicts.read_to_end()) == []


def trigger_reader(settings: Kafka) -> TriggerReader:
    station = Station(name="s1", trigger="message", views=[StationView(camera="c1")])
    return TriggerReader(
        settings,
        {"s1": station},
        line="l1",
        take=print,
        refuse=print,
        encoder=Encoder(PLACE, "binary"),
        metrics=Metrics(),
        health=Health(),
    )


# Listener and security of each refusal, and what the error and its hint say.
REFUSALS = {
    "wrong password, SCRAM": (
        lambda s: ("SASL_SSL", {"tls": authority(s), "sasl": s.login(password=WRONG)}),
        "login of user 'line' by SCRAM-SHA-512 is refused",
        "password_file",
    ),
    "wrong password, PLAIN": (
        lambda s: ("SASL_SSL", {"tls": authority(s), "sasl": s.login("PLAIN", password=WRONG)}),
        "login of user 'line' by PLAIN is refused",
        "password_file",
    ),
    "unknown user": (
        lambda s: ("SASL_SSL", {"tls": authority(s), "sasl": s.login(user="nobody")}),
        "login of user 'nobody'",
        "kafka.sasl: username",
    ),
    "unknown authority": (
        lambda s: ("SASL_SSL", {"tls": authority(s, "other-ca"), "sasl": s.login()}),
        "CERTIFICATE_VERIFY_FAILED",
        "kafka.tls.ca_file",
    ),
    "an authority of this machine": (
        lambda s: ("SASL_SSL", {"tls": {}, "sasl": s.login()}),
        "CERTIFICATE_VERIFY_FAILED",
        "kafka.tls.ca_file",
    ),
    "another name": (lambda s: ("localhost", {"tls": authority(s), "sasl": s.login()}), "mismatch", "kafka.bootstrap"),
    "no certificate": (lambda s: ("SSL", {"tls": authority(s)}), "alert", "kafka.tls.certificate_file"),
    "plain text to TLS": (lambda _: ("SSL", {}), "hangs up on plain text", "set kafka.tls"),
    "login in the open to TLS": (
        lambda s: ("SASL_SSL", {"sasl": s.login()}),
        "hangs up on plain text",
        "set kafka.tls",
    ),
    "TLS to plain text": (lambda s: ("PLAINTEXT", {"tls": authority(s)}), "speaks no TLS", "remove kafka.tls"),
    "no login": (lambda s: ("SASL_SSL", {"tls": authority(s)}), "asks for a login", "set kafka.sasl"),
    "a login too many": (lambda s: ("PLAINTEXT", {"sasl": s.login()}), "asks for no login", "remove kafka.sasl"),
    "another mechanism": (
        lambda s: ("SASL_PLAINTEXT", {"sasl": s.login("SCRAM-SHA-256")}),
        "login of user 'line' by SCRAM-SHA-256 is refused",
        "mechanism",
    ),
    "no right": (
        lambda s: ("SASL_SSL", {"tls": authority(s), "sasl": s.login(user="guest")}),
        "user 'guest' may not",
        "ACL",
    ),
}


def refused_settings(secure, way) -> Kafka:
    listener, security = way(secure)
    port = secure.addresses["SASL_SSL"].rpartition(":")[2]
    bootstrap = [f"localhost:{port}" if listener == "localhost" else secure.addresses[listener]]
    return Kafka(bootstrap=bootstrap, startup_timeout_s=5.0, **security)


@pytest.mark.parametrize(("way", "text", "remedy"), REFUSALS.values(), ids=REFUSALS)
def test_a_refusal_is_named_with_its_remedy(secure, way, text, remedy):
    """The reader of verdicts ends with DependencyError (exit code 4): what is wrong, where, and which key to change."""
    settings = refused_settings(secure, way)
    with pytest.raises(DependencyError, match=text) as caught, VerdictReader(settings, start="now"):
        pass
    assert remedy in caught.value.hint
    assert settings.bootstrap[0] in str(caught.value)
    assert PASSWORD not in repr(settings) + str(caught.value)
    assert WRONG not in repr(settings) + str(caught.value)


@pytest.mark.parametrize("reach", ["sink", "triggers", "pool", "pool write"])
@pytest.mark.parametrize("refusal", ["wrong password, SCRAM", "no right"])
def test_every_client_says_the_same(secure, reach, refusal):
    """Whoever is refused says why, in the same words."""
    way, text, _ = REFUSALS[refusal]
    settings = refused_settings(secure, way)
    reaches = {
        "sink": Sink(settings, encoder=Encoder(PLACE, "binary"), metrics=Metrics(), health=Health()).start,
        "triggers": trigger_reader(settings).connect,
        "pool": PoolTopic(settings).read,
        "pool write": lambda: PoolTopic(settings).write([change_of("c1")]),
    }
    with pytest.raises(DependencyError, match=text):
        reaches[reach]()


def change_of(name):
    return Change("added", name, "default", "tray", "s1", (((0, name), b"{}"),))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"tls": {"ca_file": "no-such.pem"}}, "kafka.tls.ca_file .*no-such.pem: No such file"),
        ({"tls": {"ca_file": "line.key"}}, "kafka.tls.ca_file"),
        ({"tls": {"certificate_file": "line.pem", "key_file": "broker.key"}}, "KEY_VALUES_MISMATCH|mismatch"),
        ({"tls": {"certificate_file": "line.pem", "key_file": "locked.key"}}, "locked.key"),
        ({"sasl": {"username": "line", "password_file": "empty"}}, "empty is empty"),
        ({"sasl": {"username": "line", "password_file": "no-such"}}, "secret file .*no-such"),
    ],
)
def test_a_file_that_cannot_be_used_is_a_fault_of_the_line_file(secure, change, word):
    """A missing, wrong or locked file is ConfigError (exit code 3) that names key and file; nobody is asked."""
    secure.path("empty").write_text("\n")
    lock = ["openssl", "ec", "-in", "line.key", "-aes128", "-passout", "pass:x", "-out", "locked.key"]
    subprocess.run(lock, cwd=secure.folder, check=True, capture_output=True, timeout=30)
    blocks = {
        block: {key: str(secure.path(value)) if key.endswith("file") else value for key, value in keys.items()}
        for block, keys in change.items()
    }
    with pytest.raises(ConfigError, match=word):
        client_options(Kafka(bootstrap=["127.0.0.1:9"], **blocks))


def line_file(secure, folder, **kafka) -> Path:
    document = {
        "line": "l1",
        "cameras": [{"id": "c1", "type": "folder", "product": "tray", "path": "pictures"}],
        "kafka": {"bootstrap": [secure.addresses["SASL_SSL"]], "startup_timeout_s": 10.0, **kafka},
    }
    path = folder / "line.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def logicrd(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pipeline.cli", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_command_tells_and_keeps_the_secret(secure, tmp_path):
    """Files beside the line file are found; exit code 0, and 4 with a wrong password.

    While it runs, neither command line nor environment holds the password, and nothing that is printed does.
    """
    for name in ("ca.pem", "line.pem", "line.key"):
        (tmp_path / name).write_bytes(secure.path(name).read_bytes())
    (tmp_path / "password").write_text(PASSWORD + "\n")
    sasl = {"mechanism": "SCRAM-SHA-512", "username": "line", "password_file": "password"}
    path = line_file(secure, tmp_path, tls={"ca_file": "ca.pem"}, sasl=sasl)
    assert config.load(path).kafka.tls.ca_file == tmp_path / "ca.pem"
    running = logicrd("verdicts", "tail", "-c", str(path), "--from-start", "--idle", "2", "--json")
    time.sleep(0.5)
    process = Path(f"/proc/{running.pid}")
    seen = process.joinpath("cmdline").read_bytes() + process.joinpath("environ").read_bytes()
    out, err = running.communicate(timeout=90)
    assert running.returncode == 0, err
    shown = config.load(path).model_dump_json() + repr(config.load(path))
    (tmp_path / "password").write_text(WRONG)
    refused = logicrd("verdicts", "tail", "-c", str(path))
    told = refused.communicate(timeout=90)
    assert refused.returncode == 4
    assert "the login of user 'line' by SCRAM-SHA-512 is refused" in told[1]
    everything = seen.decode(errors="replace") + out + err + shown + "".join(told)
    assert PASSWORD not in everything
    assert WRONG not in everything
