"""What all commands share: their common options, and how an answer is printed. Called by `cli` and its parts."""

from __future__ import annotations

import getpass
import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import structlog
import typer
from rich.console import Console
from rich.table import Table

from pipeline.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
CONFIG_FILE = Path("deploy/config/line.yaml")

Config = Annotated[Path, typer.Option("--config", "-c", help="The line file.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Author = Annotated[str, typer.Option(help="Who; default: this machine's name of the user. Nobody checks it.")]
Reason = Annotated[str, typer.Option(help="Why; kept in the history.")]
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

_WIDE = 132  # columns of a table in a file or a pipe, where no terminal says how wide it is

stdout = Console(width=None if sys.stdout.isatty() else _WIDE)
stderr = Console(stderr=True, width=None if sys.stderr.isatty() else _WIDE)


def author_of(given: str) -> str:
    """Give who acts: as it was typed, else this machine's name of the user. Raises ConfigError where that has none."""
    try:
        return given or getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        raise ConfigError("this user has no name here", hint="give it with --author") from None


def run_script(path: str, arguments: list[str]) -> int:
    """Run one of the checkout's own scripts with this Python; Ctrl-C reaches it directly."""
    script = ROOT / path
    if not script.is_file():
        raise ConfigError(f"{script} is not there", hint="this command works from a checkout of the project")
    process = subprocess.Popen([sys.executable, str(script), *arguments])
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            structlog.get_logger(__name__).debug("interrupted; waiting for the script to end")


def answer(document: Any, as_json: bool, text: str | Table) -> None:  # noqa: ANN401
    """Print the answer: as JSON, or as text for people."""
    if as_json:
        sys.stdout.write(json.dumps(document) + "\n")
    elif isinstance(text, str):
        sys.stdout.write(text + "\n")
    else:
        stdout.print(text)


def table_of(rows: list[dict[str, Any]], columns: list[str]) -> Table:
    """Lay rows out as a table of these columns."""
    table = Table(header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(str(row.get(column, "")) for column in columns))
    return table
