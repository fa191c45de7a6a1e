"""Log set-up: JSON lines for machines, short coloured lines on a terminal, always on stderr.

One line per change of state and one per NG, REVIEW or UNINSPECTED part, or per part (`part_log`); nothing else per
frame above debug. Called once by the command line; every other module takes `structlog.get_logger()`.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from typing import TextIO, cast

import structlog


class _Stderr:
    """Standard error, whose failure (a full disk, a reader that is gone) costs log lines and never a thread."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()


_STDERR = cast(TextIO, _Stderr())


def write_line(text: str) -> None:
    """Write a line that is made already, whatever the level; never into the middle of another one."""
    structlog.PrintLogger(_STDERR).msg(text)


def configure(*, level: str = "info", colour: bool = True) -> None:
    """Send all logs, the libraries' included, to stderr. `level` is debug, info, warning or error."""
    number = logging.getLevelNamesMapping()[level.upper()]
    terminal = sys.stderr.isatty()
    renderer: structlog.types.Processor = (
        structlog.dev.ConsoleRenderer(colors=colour) if terminal else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso" if not terminal else "%H:%M:%S", utc=not terminal),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(file=_STDERR),
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(level=max(number, logging.WARNING), stream=sys.stderr, format="%(name)s: %(message)s")
    # The Kafka, FFmpeg and OpenTelemetry libraries report every retry; the line reports the state change itself.
    for name in ("kafka", "libav", "opentelemetry"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
