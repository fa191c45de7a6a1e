"""A MES's end of the line: reads part verdicts from Kafka and keeps each part's one verdict in PostgreSQL.

Copy it and make it yours; it needs kafka-python and psycopg 3, and knows nothing of LogicRD but its events.

- Where reading goes on is kept in the database, in the transaction that writes what was read. A process killed at any
  point has therefore written a record and moved on, or neither. Kafka's own offsets, committed after the database,
  would be safe too, since a second write of a part changes nothing; but a database that is restored from a backup
  would miss what came since, and a group that stood still for a week would lose its place.
- (source, id) is the key of a part: what is delivered twice is kept once, the first verdict counts. Only where two
  workers read the same camera, of about the same time, the higher `epoch` counts.
- A record that is no verdict goes to the table `refused`, as it came, and reading goes on.
- A second process on the same database waits until the first one is gone, then takes over.

Exit codes: 0 stopped by SIGTERM or Ctrl-C, 2 wrong settings, 3 the database lacks the tables. While Kafka or the
database is away it waits and tries again.
"""

from __future__ import annotations

import argparse
import configparser
import json
import logging
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import psycopg
from kafka import KafkaConsumer
from kafka.errors import KafkaError, OffsetOutOfRangeError
from kafka.structs import TopicPartition
from psycopg.types.json import Jsonb

BATCH = 500  # most records in one transaction
LONGEST_PAUSE_S = 10.0
ONE_AT_A_TIME = 0x4C6F6769  # PostgreSQL's advisory lock: who holds it reads, others wait
NEEDED = (
    "source",
    "id",
    "time",
    "line",
    "station",
    "partId",
    "productId",
    "verdict",
    "reasonCodes",
    "worker",
    "sequence",
)
REFUSALS = (ValueError, psycopg.DataError, psycopg.IntegrityError, psycopg.ProgrammingError)
WRONG_TYPE = (None, "42804")  # what is wrong with a value, not with the tables: said by psycopg, or by the server

VERDICT = """
INSERT INTO verdict (source, id, told_at, line, station, part_id, meas_id, product_id, verdict, reason_codes, worker,
                     sequence, epoch, data)
VALUES (%(source)s, %(id)s, %(time)s, %(line)s, %(station)s, %(partId)s, %(measId)s, %(productId)s, %(verdict)s,
        %(reasonCodes)s, %(worker)s, %(sequence)s, %(epoch)s, %(data)s)
ON CONFLICT (source, id) DO UPDATE
SET told_at = excluded.told_at, product_id = excluded.product_id, verdict = excluded.verdict,
    reason_codes = excluded.reason_codes, worker = excluded.worker, sequence = excluded.sequence,
    epoch = excluded.epoch, data = excluded.data, received_at = now()
WHERE excluded.epoch > verdict.epoch
  AND excluded.told_at BETWEEN verdict.told_at - interval '5 minutes' AND verdict.told_at + interval '5 minutes'
"""
REFUSED = """
INSERT INTO refused (topic, partition, "offset", key, value, headers, error)
VALUES (%s, %s, %s, %s, %s, %s, %s) ON CONFLICT DO NOTHING
"""
PLACE = """
INSERT INTO place (topic, partition, next_offset) VALUES (%s, %s, %s)
ON CONFLICT (topic, partition) DO UPDATE SET next_offset = excluded.next_offset
"""

log = logging.getLogger("mes")
Database = psycopg.Connection[tuple[Any, ...]]


def verdict_of(record: Any) -> dict[str, Any]:  # noqa: ANN401 (kafka-python's record has no public type)
    """Read a verdict, a CloudEvent of either mode. Raises ValueError for anything else."""
    headers = dict(record.headers)
    document = json.loads(record.value or b"")
    if not isinstance(document, dict):
        raise ValueError("no JSON object")  # noqa: TRY004 (a wrong record, not a wrong call)
    if (headers.get("content-type") or b"").startswith(b"application/cloudevents"):
        attributes, data = document, document.get("data")
    else:
        attributes = {
            name.removeprefix("ce_"): text.decode() for name, text in headers.items() if name.startswith("ce_") and text
        }
        data = document
    if not isinstance(data, dict) or not str(attributes.get("type", "")).endswith("inspection.verdict.v1"):
        raise ValueError(f"not a verdict but {attributes.get('type')}")
    row = {"measId": None, "epoch": None, **data, **{name: attributes.get(name) for name in ("source", "id", "time")}}
    if absent := [name for name in NEEDED if row.get(name) is None]:
        raise ValueError(f"no {absent[0]}")
    return {**row, "data": Jsonb(data)}


def keep(database: Database, records: list[Any]) -> None:
    """Write records inside the caller's transaction: all at once or, where the database refuses one, each by itself."""
    read = []
    for record in records:
        try:
            read.append((record, verdict_of(record)))
        except (ValueError, RecursionError) as error:
            refuse(database, record, error)
    try:
        with database.transaction(), database.cursor() as cursor:  # a savepoint
            cursor.executemany(VERDICT, [row for _, row in read])
    except REFUSALS:
        for record, row in read:
            keep_one(database, record, row)


def keep_one(database: Database, record: Any, row: dict[str, Any]) -> None:  # noqa: ANN401 (as above)
    """Write one verdict, or write down why the database refuses it."""
    try:
        with database.transaction():
            database.execute(VERDICT, row)
    except REFUSALS as error:
        if isinstance(error, psycopg.ProgrammingError) and error.sqlstate not in WRONG_TYPE:
            raise
        refuse(database, record, error)


def refuse(database: Database, record: Any, error: Exception) -> None:  # noqa: ANN401 (as above)
    """Keep a record that is no verdict, as it came."""
    place = (record.topic, record.partition, record.offset)
    log.warning("record refused: %s/%s/%s: %s", *place, error)
    headers = Jsonb({name: (text or b"").hex() for name, text in record.headers})
    database.execute(REFUSED, (*place, record.key, record.value, headers, str(error).replace("\0", "")))


def seek(database: Database, consumer: KafkaConsumer, topic: str) -> None:
    """Go to the kept places; a partition that is new here is read from its start."""
    partitions = [TopicPartition(topic, number) for number in sorted(consumer.partitions_for_topic(topic) or ())]
    if not partitions:
        raise KafkaError(f"no topic {topic}")
    rows = database.execute("SELECT partition, next_offset FROM place WHERE topic = %s", (topic,)).fetchall()
    places: dict[int, int] = dict(rows)
    consumer.assign(partitions)
    first, end = consumer.beginning_offsets(partitions), consumer.end_offsets(partitions)
    for partition in partitions:
        place = places.get(partition.partition, first[partition])
        if not first[partition] <= place <= end[partition]:
            words = f"offset {place} is not there any more: {first[partition]} to {end[partition]} are"
            log.error("verdicts may be lost: %s/%s: %s", topic, partition.partition, words)
            lost = (topic, partition.partition, place, None, None, Jsonb({}), f"verdicts may be lost: {words}")
            database.execute(REFUSED, lost)
            place = first[partition]
        consumer.seek(partition, place)
    database.commit()


def read(database: Database, consumer: KafkaConsumer, topic: str, stop: threading.Event) -> None:
    """Read until asked to stop; every batch is one transaction. Raises what the servers raise."""
    while database.execute("SELECT pg_try_advisory_lock(%s)", (ONE_AT_A_TIME,)).fetchone() != (True,):
        database.commit()
        if stop.wait(1.0):
            return
    seek(database, consumer, topic)
    log.info("reading %s", topic)
    while not stop.is_set():
        if len(consumer.partitions_for_topic(topic) or ()) > len(consumer.assignment()):
            seek(database, consumer, topic)  # partitions were added
        try:
            batch = consumer.poll(timeout_ms=500, max_records=BATCH)
        except OffsetOutOfRangeError:
            seek(database, consumer, topic)
            continue
        with database.transaction():
            for partition, records in batch.items():
                keep(database, records)
                database.execute(PLACE, (topic, partition.partition, records[-1].offset + 1))


def run(settings: argparse.Namespace, stop: threading.Event) -> None:
    """Read, and begin again from the kept places whenever Kafka or the database was away."""
    pause_s = 0.5
    while not stop.is_set():
        consumer = None
        try:
            with psycopg.connect(settings.database, connect_timeout=5, keepalives_idle=10) as database:
                consumer = KafkaConsumer(
                    bootstrap_servers=settings.bootstrap.split(","),
                    group_id=None,
                    enable_auto_commit=False,
                    auto_offset_reset="none",
                    allow_auto_create_topics=False,
                )
                pause_s = 0.5
                read(database, consumer, settings.topic, stop)
        except (psycopg.OperationalError, psycopg.InterfaceError, KafkaError) as error:
            log.warning("going on in %s s: %s", pause_s, error)
            stop.wait(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        finally:
            if consumer is not None:
                consumer.close()


def settings_of(arguments: list[str]) -> argparse.Namespace:
    """Read the arguments, and the file that `--settings` names for what they leave out."""
    parser = argparse.ArgumentParser(description="Keep an inspection line's verdicts in PostgreSQL.")
    parser.add_argument("--settings", type=Path, help="a file as mes.ini")
    parser.add_argument("--database", help="libpq connection string, its password in a `passfile`")
    parser.add_argument("--bootstrap", help="brokers, host:port, with commas between them")
    parser.add_argument("--topic")
    given, file = parser.parse_args(arguments), configparser.ConfigParser(interpolation=None)
    if given.settings is not None and not file.read(given.settings):
        parser.error(f"no file {given.settings}")
    defaults = {"topic": "inspection.verdict.v1", **(file["mes"] if file.has_section("mes") else {})}
    for name in ("database", "bootstrap", "topic"):
        if getattr(given, name) is None:
            if name not in defaults:
                parser.error(f"--{name} is needed, or `{name}` in the settings' file")
            setattr(given, name, defaults[name])
    return given


def main() -> int:
    """Run until SIGTERM or Ctrl-C."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("kafka").setLevel(logging.ERROR)
    settings, stop = settings_of(sys.argv[1:]), threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        run(settings, stop)
    except psycopg.ProgrammingError as error:
        log.error("%s: has schema.sql been run, and may this user write?", str(error).splitlines()[0])
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
