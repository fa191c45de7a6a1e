"""Keeps two commands apart that work on one place in S3: an object that says who holds it, replaced on condition alone.

The holder renews it every few seconds. One that does so no more, killed, cut off or asleep, has lost it after
`LEASE_S`, and knows it by its own clock before another takes it by its own; no two clocks are compared. Called by
`s3_store`.
"""

from __future__ import annotations

import getpass
import json
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime

import structlog

from pipeline.errors import CheckError, LineError
from pipeline.s3_bucket import Bucket

LEASE_S = 30.0
_RENEW_S = 5.0
_LOOK_S = 1.0
_NAME = "lock"
_FREE = b"{}"
_NO_ETAG = f'"{"0" * 32}"'  # of no claim

log = structlog.get_logger(__name__)


class S3Lock:
    """One holder at a time; its own thread renews."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._etag = ""
        self._until_s: float | None = None  # None while it is not held
        self._stop = threading.Event()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold it. Blocks for `LEASE_S` at most. Raises CheckError when another command does."""
        before = self._free()
        began_s = _now_s()
        self._etag = self._bucket.put(_NAME, _claim(), before)
        self._extend(began_s)
        self._try_conditions()
        self._stop.clear()
        thread = threading.Thread(target=self._renew, name="s3 lock", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join(LEASE_S)
            held, self._until_s = self._is_held(), None
            if held:
                with suppress(LineError):  # it ends by itself
                    self._bucket.put(_NAME, _FREE, self._etag)

    def require(self) -> None:
        """Raise CheckError when it was held and is lost."""
        if self._until_s is not None and not self._is_held():
            raise CheckError(
                f"the lock {self._bucket.path(_NAME)} could not be renewed: another command may be at work",
                hint="give this command again",
            )

    def _is_held(self) -> bool:
        return self._until_s is not None and _now_s() < self._until_s

    def _free(self) -> str | None:
        """Wait until nobody holds it; gives its ETag, None when it was never there."""
        found = self._bucket.get(_NAME)
        began_s = _now_s()
        if found is not None and found.content != _FREE:
            log.warning(
                "waiting for a command that may have been killed", lock=_told(self._bucket.path(), found.content)
            )
        while found is not None and found.content != _FREE and _now_s() < began_s + LEASE_S:
            time.sleep(_LOOK_S)
            before, found = found, self._bucket.get(_NAME)
            if found is not None and found.content != _FREE and found.etag != before.etag:
                raise CheckError(_told(self._bucket.path(), found.content), hint="try again when it ends")
        return None if found is None else found.etag

    def _try_conditions(self) -> None:
        """Say so when the server takes a put whose condition does not hold; some know one of the two alone."""
        for condition in (None, _NO_ETAG):
            with suppress(CheckError):  # as it should be: there is one, and another
                self._etag = self._bucket.put(_NAME, _claim(), condition)
                self._bucket.has_conditions = False
        if not self._bucket.has_conditions:
            log.warning("this store knows no conditional writes: see that no two commands work on it at once")

    def _renew(self) -> None:
        while not self._stop.wait(_RENEW_S):
            began_s = _now_s()
            try:
                self._etag = self._bucket.put(_NAME, _claim(), self._etag)
            except CheckError:
                self._until_s = 0.0
                return
            except LineError as error:
                log.warning("lock not renewed", error=str(error))
            else:
                self._extend(began_s)

    def _extend(self, began_s: float) -> None:
        # Counted from before the call: others count from when they saw it.
        self._until_s = began_s + LEASE_S - _RENEW_S


def _now_s() -> float:
    # Unlike the monotonic clock it goes on while the machine sleeps.
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _claim() -> bytes:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = "somebody"
    at = datetime.now(UTC).isoformat(timespec="seconds")
    # No two claims are the same bytes: the ETag of a renewed one must differ.
    return json.dumps({"by": f"{user}@{socket.gethostname()}", "at": at, "token": secrets.token_hex(8)}).encode()


def _told(path: str, claim: bytes) -> str:
    try:
        by, at = (str(json.loads(claim).get(key, "?")) for key in ("by", "at"))
    except (ValueError, AttributeError):
        return f"{path}: another command is at work"
    return f"{path}: another command is at work: {by}, at {at}"
