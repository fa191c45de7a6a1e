"""The command `logicrd reconcile`: one period of a line, every part accounted for. Called by `cli`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from pipeline import config as configuration
from pipeline import logs
from pipeline.errors import CheckError, ConfigError
from pipeline.events import decode
from pipeline.ledger import Account, PartKey
from pipeline.outbox import read_stored
from pipeline.reconcile import Reconciler, Reconciliation
from pipeline.terminal import CONFIG_FILE, Config, Json, answer, stdout, table_of

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SHOWN = 100  # faults in the table for people; --json has all
_JUDGEMENTS = ("OK", "NG", "REVIEW", "UNINSPECTED")


def reconcile(
    since: Annotated[
        str, typer.Option("--from", help="Begin: a time (ISO 8601, local without a zone), or 2h, 30m, 1d.")
    ],
    until: Annotated[str, typer.Option("--to", help="End, in the same way. Default: now.")] = "0s",
    config: Config = CONFIG_FILE,
    as_json: Json = False,
) -> None:
    """Compare triggers, views, outbox and verdicts: every part has one verdict; exit 5 when one has none, or two."""
    logs.configure(level="error")
    now = datetime.now(UTC)
    start, end = moment(since, now), moment(until, now)
    if start >= end:
        raise typer.BadParameter(f"--from {since} is not before --to {until}")
    settings = configuration.load(config)
    found = Reconciler(settings, start, end, stored=_stored(settings.outbox.dir)).run()
    document = {"from": start.isoformat(), "to": end.isoformat(), "line": settings.line, **as_document(found)}
    rows = _station_rows(found.account)
    answer(document, as_json, table_of(rows, list(rows[0])) if rows else "no part in this period")
    faults = list(_fault_rows(found.account))
    if faults and not as_json:
        stdout.print(_faults_table(faults))
    if not found.account.good:
        count = len(found.account.missing), len(found.account.conflicts), len(found.account.gaps)
        words = "{} parts without a verdict, {} with two, {} gaps in the sequence numbers".format(*count)
        raise CheckError(words, hint="see `Reconcile` in README.md")


def _stored(folder: Path | None) -> Iterator[str]:
    """Give the inspection ids of the verdicts in this machine's outbox. Raises ConfigError."""
    try:
        for event in read_stored(folder) if folder is not None and folder.is_dir() else ():
            if event.is_part:
                yield str(decode(event.value, dict(event.headers))["attributes"]["id"])
    except OSError as error:
        raise ConfigError(f"outbox.dir {folder}: {error.strerror}", hint="run this as the user of the line") from None


def moment(text: str, now: datetime) -> datetime:
    """Read a time, or how long ago it was; the result has a zone. Raises BadParameter."""
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip()):
        try:
            return now - timedelta(seconds=float(match[1]) * _UNITS[match[2]])
        except OverflowError:
            raise typer.BadParameter(f"{text!r} is before the calendar begins") from None
    try:
        return datetime.fromisoformat(text.strip()).astimezone()
    except (ValueError, OverflowError):
        raise typer.BadParameter(f"{text!r} is no time: write 2026-11-25T06:00, or 2h, 30m, 1d") from None


def as_document(found: Reconciliation) -> dict[str, Any]:
    """Give all that was found, for --json."""
    account = found.account
    return {
        "ok": account.good,
        "stations": _station_rows(account),
        "missing": [
            {**_named(each.part), "seen_as": each.due.witness.value, "at": _time(each.due.at_ms), "why": each.why}
            for each in account.missing
        ],
        "conflicts": [
            {
                **_named(each.part),
                "verdicts": [
                    {"id": told.inspection, "verdict": told.verdict, "worker": told.worker, "at": _time(told.at_ms)}
                    for told in (each.first, each.other)
                ],
            }
            for each in account.conflicts
        ],
        "gaps": [each._asdict() for each in account.gaps],
        "unreadable": found.unreadable,
        "refused_triggers": found.refused_triggers,
    }


def _station_rows(account: Account) -> list[dict[str, Any]]:
    """Give each station's sums: due = the four verdicts + open + stored + missing."""
    missing = [each.part.station for each in account.missing]
    conflicts = [each.part.station for each in account.conflicts]
    gaps = [each.station for each in account.gaps]
    return [
        {
            "station": station,
            "due": account.due[station],
            **{name: account.told[station, name] for name in _JUDGEMENTS},
            "open": account.open[station],
            "in outbox": account.stored[station],
            "missing": missing.count(station),
            "conflicts": conflicts.count(station),
            "gaps": gaps.count(station),
            "repeated": account.repeated[station],
            "settled by epoch": account.settled[station],
        }
        for station in sorted({*account.due, *gaps})
    ]


def _fault_rows(account: Account) -> list[tuple[str, str, str, str]]:
    rows = [
        (
            "missing",
            each.part.station,
            _part_name(each.part),
            f"{each.due.witness.value} {_time(each.due.at_ms)} {each.why}",
        )
        for each in account.missing
    ]
    for clash in account.conflicts:
        first, other = clash.first, clash.other
        told = [f"{each.verdict} {each.inspection} by {each.worker}" for each in (first, other)]
        rows.append(("conflict", clash.part.station, _part_name(clash.part), ", ".join(told)))
    rows += [("gap", gap.station, f"{gap.first} to {gap.last}", f"run {gap.worker}") for gap in account.gaps]
    return rows


def _faults_table(faults: list[tuple[str, str, str, str]]) -> Table:
    beyond = len(faults) - _SHOWN
    table = Table(header_style="bold", pad_edge=False, caption=f"and {beyond} more: --json" if beyond > 0 else None)
    for column in ("fault", "station", "part or numbers", "what is known"):
        table.add_column(column, overflow="fold")
    for row in faults[:_SHOWN]:
        table.add_row(*row)
    return table


def _named(part: PartKey) -> dict[str, str | None]:
    return part._asdict()


def _part_name(part: PartKey) -> str:
    extra = [f"meas {part.meas_id}" if part.meas_id else "", f"camera {part.camera_id}" if part.camera_id else ""]
    return " ".join([part.part_id, *(word for word in extra if word)])


def _time(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1e3, UTC).isoformat(timespec="milliseconds")
