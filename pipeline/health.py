"""Liveness and readiness from the stages' own progress, and the small HTTP page that shows them.

A stage beats once before its thread starts, so that one that never comes round is seen too, then in its loop; a stage
that has not beaten for its limit makes the worker not alive. Two waits are no stage's: a camera that is being opened
(it is `lost` or `connecting`), and the asking for names, which the system's resolver may hold up for a minute.
Readiness is a second set of facts: Triton answered, thresholds are known. `/metrics` is served from the same port.
"""

from __future__ import annotations

import json
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

STALL_S = 10.0
"""A stage that has not come round for this long is stuck: every wait in the line is shorter."""


class Health:
    """Heartbeats and readiness; safe from every thread."""

    def __init__(self) -> None:
        self._beats: dict[str, float] = {}
        self._ready: dict[str, bool] = {}

    def beat(self, stage: str) -> None:
        """Say that a stage's loop came round."""
        self._beats[stage] = time.monotonic()

    def retire(self, stage: str) -> None:
        """Say that a stage has ended on purpose."""
        self._beats.pop(stage, None)

    def ready(self, what: str, state: bool) -> None:
        """Note a fact on which readiness depends."""
        self._ready[what] = state

    def stalled(self) -> list[str]:
        """List the stages without a heartbeat for `STALL_S`."""
        now = time.monotonic()
        return sorted(stage for stage, at in dict(self._beats).items() if now - at > STALL_S)

    def ages_s(self) -> dict[str, float]:
        """Give the time since each stage's last heartbeat, in seconds, by name."""
        now = time.monotonic()
        return {stage: now - at for stage, at in sorted(dict(self._beats).items())}

    def missing(self) -> list[str]:
        """List what readiness still waits for."""
        return sorted(what for what, state in dict(self._ready).items() if not state)


class HealthPage:
    """`/livez`, `/readyz` and `/metrics` over HTTP."""

    def __init__(self, health: Health, registry: CollectorRegistry, host: str, port: int) -> None:
        self._health = health
        self._registry = registry
        self._address = (host, port)
        self._server: ThreadingHTTPServer | None = None

    @property
    def port(self) -> int:
        """The port in use, once entered."""
        return self._server.server_port if self._server is not None else self._address[1]

    def __enter__(self) -> HealthPage:
        handler = type("Handler", (_Handler,), {"health": self._health, "registry": self._registry})
        self._server = ThreadingHTTPServer(self._address, handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, name="health-page", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    health: Health
    registry: CollectorRegistry

    def do_GET(self) -> None:
        if self.path == "/metrics":
            self._answer(HTTPStatus.OK, generate_latest(self.registry), CONTENT_TYPE_LATEST)
        elif self.path == "/livez":
            self._facts("stalled", self.health.stalled())
        elif self.path == "/readyz":
            self._facts("missing", self.health.missing())
        else:
            self._answer(HTTPStatus.NOT_FOUND, b"see /metrics, /livez, /readyz\n", "text/plain")

    def log_message(self, format: str, *args: Any) -> None:  # noqa: ANN401 (the library's signature)
        """Keep scrapes out of the log."""

    def _facts(self, name: str, faults: list[str]) -> None:
        status = HTTPStatus.SERVICE_UNAVAILABLE if faults else HTTPStatus.OK
        self._answer(status, json.dumps({name: faults}).encode(), "application/json")

    def _answer(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
