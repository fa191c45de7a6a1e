"""The table of the cases and their results, as Markdown. Written by `make faults`, never by hand."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from integration.faults.checker import Account

_HEAD = """\
# The fault suite's last long run

Written by `make faults`; seed {seed}, {at:%Y-%m-%d}, {machine}.
{passed} of {count} cases passed, {parts} parts in all; {planned} cases were to be run.
`make faults SEED={seed}` does the same in the same order for the same times; how far each process has come when it is
hit is the machine's.

A case passes when a consumer that knows every part finds: exactly one verdict of each after dedupe by source and id, in
the order of the triggers per key, no gap in any worker's `sequence`, and no OK without a score of that part's own
picture below the limit, or decided while nothing could be judged; and when the line judges again at the end and the
worker drains. *Retold* are records that the dedupe drops. *Open* are parts without a verdict that were in a killed
worker's memory alone: pictures of a free-running camera, of which nothing else knows.

| case | what is done | parts | judged | UNINSPECTED | retold | open | lives | s | result |
|---|---|--:|--:|--:|--:|--:|--:|--:|---|
"""


@dataclass(frozen=True)
class Row:
    """One case's result; `account` is None for a run that did not come to its end."""

    name: str
    tells: str
    account: Account | None
    lives: int
    seconds: float
    failure: str = ""
    result: str = "passed"


def write(path: Path, rows: list[Row], *, planned: int, seed: int, at: datetime) -> None:
    """Write the table to a file."""
    path.write_text(text(rows, planned=planned, seed=seed, at=at))


def text(rows: list[Row], *, planned: int, seed: int, at: datetime) -> str:
    """Put the cases into Markdown, by name."""
    head = _HEAD.format(
        planned=planned,
        seed=seed,
        at=at,
        machine=_machine(),
        passed=sum(not row.failure for row in rows),
        count=len(rows),
        parts=sum(row.account.parts for row in rows if row.account is not None),
    )
    return head + "".join(_line(row) for row in sorted(rows, key=lambda row: row.name))


def _line(row: Row) -> str:
    account = row.account or Account()
    figures = (account.parts, account.judged, account.uninspected, account.retold, account.uncertain_without)
    cells = [row.name, row.tells, *figures, row.lives, f"{row.seconds:.0f}", row.failure or row.result]
    return f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |\n"


def _machine() -> str:
    """The processor's name and the number of its cores."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{os.cpu_count()} cores, {name}"
