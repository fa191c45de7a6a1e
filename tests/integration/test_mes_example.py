"""The example MES of deploy/examples/mes on the real broker and PostgreSQL: one row a part, whatever happens."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from kafka import KafkaProducer
from kafka.admin import KafkaAdminClient
from line_process import wait_until
from postgres_server import Postgres

from pipeline.events import Encoder, Event, Place
from pipeline.types import Cause, Judgement, MissingView, Part, PartVerdict

pytestmark = pytest.mark.stack
EXAMPLE = Path(__file__).resolve().parents[2] / "deploy/examples/mes"
AT = datetime(2026, 11, 25, 6, 0, tzinfo=UTC)
SEED = 20261125


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    """The server that these tests share."""
    with Postgres() as server:
        yield server


@pytest.fixture
def database(postgres) -> Iterator[psycopg.Connection[Any]]:
    """A connection to the MES's data base, its tables fresh."""
    with psycopg.connect(postgres.address(), autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
        connection.execute((EXAMPLE / "schema.sql").read_text())
        yield connection


@pytest.fixture
def topic(stack) -> str:
    """A topic of the test's own, with 3 partitions."""
    name = f"mes-{uuid4().hex[:8]}.verdict.v1"
    with KafkaAdminClient(bootstrap_servers=stack.endpoints["kafka"]) as admin:
        wanted = {name: {"num_partitions": 3, "replication_factor": 1}}
        admin.create_topics(wanted, timeout_ms=10_000, wait_for_metadata=True)
    return name


class Mes:
    """`consume.py` as a process."""

    def __init__(self, stack: Any, postgres: Postgres, topic: str, log: Path) -> None:
        servers = ["--database", postgres.address(), "--bootstrap", stack.endpoints["kafka"], "--topic", topic]
        self._command = [sys.executable, str(EXAMPLE / "consume.py"), *servers]
        self._log = log

    def __enter__(self) -> Mes:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.terminate()
        # SIGTERM itself: one that came before the program had begun to listen for it.
        assert self._process.wait(60) in (0, -signal.SIGKILL, -signal.SIGTERM), self._log.read_text()

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(10)

    def said(self, words: str) -> int:
        return self._log.read_text().count(words)


@pytest.fixture
def mes(stack, postgres, topic, tmp_path) -> Mes:
    return Mes(stack, postgres, topic, tmp_path / "mes.log")


@pytest.fixture
def send(stack, topic) -> Iterator[Any]:
    """Send events, or raw values; each is acknowledged on return of `flush`."""
    producer = KafkaProducer(bootstrap_servers=[stack.endpoints["kafka"]], acks="all", linger_ms=5)

    def send(*events: Event | bytes | None) -> None:
        for event in events:
            if isinstance(event, Event):
                producer.send(topic, key=event.key, value=event.value, headers=list(event.headers))
            else:
                producer.send(topic, key=b"l1/s0", value=event)
        producer.flush(timeout=60)

    yield send
    producer.close()


def told(
    number: int,
    judgement: Judgement = Judgement.UNINSPECTED,
    *,
    worker: str = "w1",
    epoch: int | None = None,
    part_id: str | None = None,
    at: datetime = AT,
    mode: Any = "binary",
) -> Event:
    """The event of one numbered part."""
    missing = (MissingView("cam", required=True, cause=Cause.DEADLINE),)
    name = part_id or f"part-{number}"
    part = Part(f"s{number % 4}", name, "trigger", "tray", at, 0.0, 1.0, meas_id="1", epoch=epoch)
    verdict = PartVerdict(part, number, judgement, ("deadline",), (), missing, 1.0)
    place = Place("site", "area", "l1", worker=worker, budget_ms=1000)
    *_, event = Encoder(place, mode).part(verdict, decided_at=at)
    return event


def rows(database: psycopg.Connection[Any], columns: str, table: str = "verdict") -> list[Any]:
    return database.execute(f"SELECT {columns} FROM {table} ORDER BY 1, 2, 3").fetchall()  # noqa: S608 (the test's own)


POISON = [
    None,
    b"",
    b"\xff\xfe not JSON",
    b"[1, 2]",
    b"{}",
    b"[" * 100_000,
    b'{"specversion": "1.0"}',
    replace(told(1), value=b'{"partId": "half", "verdict": "OK"}'),
    replace(told(1), value=told(1).value.replace(b'"UNINSPECTED"', b'"GOOD"')),
    replace(told(1), value=told(1).value.replace(b'"part-1"', b'"part\\u0000"')),
    replace(told(1), value=told(1).value.replace(b'"part-1"', b'{"nested": 1}')),
    replace(told(1), value=told(1).value.replace(b'"budgetMs":1000.0', b'"budgetMs":NaN')),
    replace(told(1), value=told(1).value.replace(b'"sequence":1', b'"sequence":99999999999999999999')),
    replace(told(1), headers=tuple((name, b"noon" if name == "ce_time" else text) for name, text in told(1).headers)),
    replace(told(1), headers=tuple((name, text) for name, text in told(1).headers if name != "ce_id")),
]


def test_poison_never_stops_the_line(mes, send, database):
    """Every record that is no verdict lies in `refused` with its bytes and a reason; the verdicts are kept."""
    send(told(1))
    for poison in POISON:
        send(poison)
    send(told(5), told(9, mode="structured"))
    with mes:
        wait_until(lambda: len(rows(database, "part_id, id, verdict")) == 3, 60, "three verdicts")
    assert [row[0] for row in rows(database, "part_id, id, verdict")] == ["part-1", "part-5", "part-9"]
    refused = rows(database, 'partition, "offset", topic, value, error', "refused")
    values = [poison.value if isinstance(poison, Event) else poison for poison in POISON]
    assert sorted(bytes(row[3] or b"") for row in refused) == sorted(value or b"" for value in values)
    assert all(row[4] for row in refused)


def test_of_two_workers_on_one_camera_the_higher_epoch_counts(mes, send, database):
    """Same id: first told stays within an epoch, a higher epoch of about the same time wins, whichever came first;
    epochs that were counted anew long after change nothing. Other ids: the view shows the higher epoch's alone."""
    late = AT + timedelta(days=1)
    send(told(1, Judgement.NG, epoch=4), told(1, Judgement.OK, epoch=4))
    send(told(2, Judgement.NG, epoch=4), told(2, Judgement.OK, epoch=5))
    send(told(3, Judgement.OK, epoch=5), told(3, Judgement.NG, epoch=4))
    send(told(4, Judgement.NG, epoch=4), told(4, Judgement.OK, epoch=9, at=late))
    send(told(11, part_id="a-run1-1", epoch=4), told(11, part_id="a-run2-1", epoch=5, worker="w2"))
    send(
        told(11, part_id="a-run1-2", epoch=4, at=AT + timedelta(seconds=1)),
        told(11, part_id="a-run3-1", epoch=1, at=late),
    )
    with mes:
        wait_until(lambda: len(rows(database, "part_id, id, verdict")) == 8, 60, "eight parts")
    kept = {row[0]: row[1:] for row in rows(database, "part_id, verdict, epoch")}
    assert [kept[f"part-{number}"] for number in (1, 2, 3, 4)] == [("NG", 4), ("OK", 5), ("OK", 5), ("NG", 4)]
    outdated = kept.keys() - {row[0] for row in rows(database, "part_id, verdict, epoch", "verdict_in_force")}
    assert outdated == {"a-run1-1", "a-run1-2"}


def test_a_second_process_waits_for_the_first(mes, stack, postgres, topic, tmp_path, send, database):
    """Only one reads at a time; the other one takes over when it is killed."""
    second = Mes(stack, postgres, topic, tmp_path / "second.log")
    with mes:
        wait_until(lambda: mes.said("reading"), 60, "the first one reading")
        with second:
            time.sleep(2)
            assert not second.said("reading")
            mes.kill()
            wait_until(lambda: second.said("reading"), 60, "the second one reading")
            send(told(1))
            wait_until(lambda: rows(database, "part_id, id, verdict"), 60, "its verdict")


def test_tables_that_are_not_there_are_named(mes, database):
    """Exit 3 and a remedy, instead of a table of refused verdicts that could not be written either."""
    database.execute("DROP TABLE place, refused")
    mes.start()
    assert mes._process.wait(60) == 3
    assert mes.said("schema.sql") == 1


@pytest.mark.timeout(400)
def test_killed_at_any_point_every_part_is_one_row(mes, send, postgres, database):
    """26 kills -9 at random moments, 2 crashes of the database, every third verdict delivered twice, poison between
    them: at the end every part has exactly one row, with its own verdict, and every poison record one."""
    sys.stdout.write(f"seed {SEED}\n")
    dice = random.Random(SEED)
    kinds = list(Judgement)
    count, poison = 0, 0
    mes.start()
    try:
        for turn in range(28):
            batch: list[Event | bytes] = [told(number, kinds[number % 4]) for number in range(count, count + 60)]
            count += len(batch)
            batch += dice.sample(batch, 20)
            batch.insert(dice.randrange(len(batch)), f"poison {poison}".encode())
            poison += 1
            send(*batch)
            time.sleep(dice.uniform(0.0, 1.5))
            if turn % 10 == 9:
                postgres.crash()
                time.sleep(dice.uniform(0.0, 0.5))
                postgres.start()
            else:
                mes.kill()
                mes.start()
        database = psycopg.connect(postgres.address(), autocommit=True)
        with database:
            wait_until(lambda: len(rows(database, "part_id, id, verdict")) >= count, 150, "every part")
            found = {row[0]: row[1] for row in rows(database, "part_id, verdict, id")}
            assert found == {f"part-{number}": kinds[number % 4].value for number in range(count)}
            assert database.execute("SELECT count(*) FROM verdict").fetchone() == (count,)
            refused = sorted(row[0].decode() for row in database.execute("SELECT value FROM refused"))
            assert refused == sorted(f"poison {number}" for number in range(poison))
    finally:
        mes.__exit__()
