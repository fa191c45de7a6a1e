"""The command's own part: how a period is written, and how faults are shown."""

from datetime import UTC, datetime, timedelta

import pytest
import typer

from pipeline import cli_reconcile
from pipeline.cli_reconcile import as_document, moment
from pipeline.ledger import Due, Ledger, PartKey, Told, Witness
from pipeline.reconcile import Reconciliation

NOW = datetime(2026, 11, 25, 12, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "ago"),
    [("2h", timedelta(hours=2)), ("90s", timedelta(seconds=90)), ("1.5d", timedelta(days=1.5)), ("0s", timedelta())],
)
def test_a_duration_is_so_long_ago(text, ago):
    """2h, 90s, 1.5d: counted back from now."""
    assert moment(text, NOW) == NOW - ago


def test_a_time_has_a_zone():
    """An ISO time with a zone is that moment; without one it is this machine's own time."""
    assert moment("2026-11-25T06:00:00Z", NOW) == datetime(2026, 11, 25, 6, 0, tzinfo=UTC)
    assert moment("2026-11-25T06:00", NOW) == datetime(2026, 11, 25, 6, 0).astimezone()


@pytest.mark.parametrize("text", ["", "yesterday", "2w", "-1h", "2026-13-01", "9e9d", "99999999999d"])
def test_what_is_no_time_is_refused(text):
    """Named with what may be written instead."""
    with pytest.raises(typer.BadParameter):
        moment(text, NOW)


def test_sums_of_a_station_add_up():
    """due = OK + NG + REVIEW + UNINSPECTED + open + in outbox + missing, and the document names what is missing."""
    ledger = Ledger()
    for number in range(8):
        ledger.due(PartKey("s1", f"p{number}", ""), Due(f"i{number}", Witness.VIEW, 100 * number))
    for number, verdict in enumerate(["OK", "NG", "REVIEW", "UNINSPECTED"]):
        ledger.told(Told(PartKey("s1", f"p{number}", ""), f"i{number}", verdict, None, "w", number + 1, 0))
    account = ledger.account(open_after_ms=700, stored=["i6"])
    document = as_document(Reconciliation(account, unreadable=0, refused_triggers=0))
    (row,) = document["stations"]
    parts = ("OK", "NG", "REVIEW", "UNINSPECTED", "open", "in outbox", "missing")
    assert [row[name] for name in parts] == [1, 1, 1, 1, 1, 1, 2]
    assert row["due"] == sum(row[name] for name in parts)
    assert [each["part_id"] for each in document["missing"]] == ["p4", "p5"]
    assert len(list(cli_reconcile._fault_rows(account))) == 2
