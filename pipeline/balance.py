"""Which replica of Triton gets the next batch, and which ones get none for now: the decision, and nothing else.

No clock, no network, no lock: the caller brings the time and takes care of threads. A replica is used once a probe has
found it good; it is set aside when it is gone, and asked again after a pause that grows until it answers a batch.
Called by `replicas`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, StrEnum

FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 2.0
"""A line whose replicas are all down judges nothing until the next probe, so even the longest pause is short."""
MANY = 1 << 20
"""Room for any batch."""
SUSPICION_PERIOD_S = 5.0
"""Least time between two probes of a replica in use: a picture that no replica can judge must not flood them."""

# Triton's words for a request that it refused or gave up in a full queue. The status is that of a fault, UNAVAILABLE.
_BUSY = ("maximum queue size", "timeout expired", "request timeout")


class Standing(StrEnum):
    """What is known of a replica."""

    NEW = "new"
    UP = "up"
    ASIDE = "set aside"
    REFUSED = "refused"


class Finding(Enum):
    """What a probe found: `LATE` answers, but not in time; `REFUSED` serves another network."""

    GOOD = "good"
    LATE = "late"
    FAILED = "failed"
    REFUSED = "refused"


class Fault(Enum):
    """Why a batch got no scores: no room, no time, no server, or an answer that is none."""

    BUSY = "busy"
    LATE = "late"
    GONE = "gone"
    SICK = "sick"


@dataclass(slots=True, eq=False)
class Replica:
    """One server, by its address `ip:port`. `fault` says why it is not in use.

    `window` is how many frames it may have under way: halved by a batch that came too late, one more with each that was
    answered, as TCP does it (RFC 5681). More than a server finishes in time would all be late, for good: those that are
    given up cost it as much as the others.
    """

    address: str
    standing: Standing = Standing.NEW
    fault: str = "has not answered yet"
    in_flight: int = 0
    frames: int = 0
    window: int = MANY
    turn: int = 0
    failures: int = 0
    probed_s: float = -math.inf
    probe_due_s: float = -math.inf


class Balance:
    """The replicas of one service, each with at most `max_in_flight` batches; not safe from several threads."""

    def __init__(self, max_in_flight: int) -> None:
        self._max_in_flight = max_in_flight
        self._replicas: dict[str, Replica] = {}
        self._turn = 0

    @property
    def replicas(self) -> list[Replica]:
        """Every replica that the name stands for, in use or not."""
        return list(self._replicas.values())

    @property
    def up(self) -> list[Replica]:
        """The replicas in use."""
        return [replica for replica in self._replicas.values() if replica.standing is Standing.UP]

    def see(self, addresses: Iterable[str]) -> tuple[list[Replica], list[Replica]]:
        """Take the addresses that the name stands for now; gives the replicas that joined and those that left."""
        seen = dict.fromkeys(addresses)
        left = [replica for address, replica in self._replicas.items() if address not in seen]
        joined = [Replica(address) for address in seen if address not in self._replicas]
        for replica in left:
            del self._replicas[replica.address]
        self._replicas |= {replica.address: replica for replica in joined}
        return joined, left

    def room(self) -> int:
        """Say how many frames the next batch may have; 0 when all replicas are full, and any number when none is in
        use."""
        return max(map(self._room_of, self.up), default=MANY)

    def take(self, avoid: Replica | None = None, *, frames: int = 1) -> Replica | None:
        """Give the replica for the next batch, of so many frames, and count it; None when none is in use.

        The one with the fewest batches under way, in turn where they are equal; `avoid`, one without room for the batch
        (see `room`), and one under suspicion only when there is no other. Room counts for more than suspicion: the
        others would be flooded for as long as a suspect has room.
        """
        if not (up := self.up):
            return None

        def rank(each: Replica) -> tuple[bool, bool, bool, int, int]:
            return each is avoid, self._room_of(each) < frames, each.probe_due_s < math.inf, each.in_flight, each.turn

        chosen = min(up, key=rank)
        self._turn += 1
        chosen.turn = self._turn
        chosen.in_flight += 1
        chosen.frames += frames
        return chosen

    def give_back(
        self, replica: Replica, fault: Fault | None, words: str, now_s: float, *, first_try: bool, frames: int = 1
    ) -> bool:
        """Note how a batch ended; gives whether to send it once more.

        A replica that is gone is set aside, unless the batch has no other one to go to: then it goes there again, on a
        new connection. An answer that is none is asked for again from another replica only: the same would repeat it.
        """
        if fault is None:
            replica.window = min(MANY, replica.window + 1)
        elif fault is Fault.LATE:
            replica.window = max(1, min(replica.window, replica.frames) // 2)
        replica.in_flight -= 1
        replica.frames -= frames
        others = self._others_up(replica)
        again = first_try and (fault in (Fault.GONE, Fault.BUSY) or (fault is Fault.SICK and others))
        if replica.standing is Standing.UP:
            if fault is None:
                replica.failures = 0
            elif fault is Fault.GONE and (others or not again):
                self._set_aside(replica, Standing.ASIDE, words, now_s)
            elif fault in (Fault.LATE, Fault.SICK):
                replica.probe_due_s = max(now_s, replica.probed_s + SUSPICION_PERIOD_S)
        return again

    def suspect_all(self, now_s: float) -> None:
        """Put every replica in use under suspicion: it stays in use until a probe says otherwise."""
        for replica in self.up:
            replica.probe_due_s = now_s

    def due(self, now_s: float) -> list[Replica]:
        """List the replicas to probe now."""
        return [replica for replica in self._replicas.values() if replica.probe_due_s <= now_s]

    def found(self, replica: Replica, finding: Finding, words: str, now_s: float) -> None:
        """Note what a probe found. The last replica in use is kept when it is only slow: slow is better than none."""
        replica.probed_s = now_s
        slow = finding is Finding.LATE and replica.standing is Standing.UP and not self._others_up(replica)
        if finding is Finding.GOOD or slow:
            replica.standing, replica.fault, replica.probe_due_s = Standing.UP, "", math.inf
        else:
            refused = finding is Finding.REFUSED
            self._set_aside(replica, Standing.REFUSED if refused else Standing.ASIDE, words, now_s)

    def _room_of(self, replica: Replica) -> int:
        """Say how many more frames a replica may have under way; none while less than half of its window is free, for
        small batches cost a server more than they bring (the silly window of RFC 1122)."""
        free = replica.window - replica.frames
        return free if replica.in_flight < self._max_in_flight and 2 * free >= replica.window else 0

    def _others_up(self, replica: Replica) -> bool:
        return any(other is not replica for other in self.up)

    def _set_aside(self, replica: Replica, standing: Standing, words: str, now_s: float) -> None:
        replica.standing, replica.fault = standing, words
        replica.probe_due_s = now_s + pause_s(replica.failures)
        replica.failures += 1


def pause_s(failures: int) -> float:
    """Give the time until the next probe after so many failures in a row, in seconds."""
    return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(failures, 16))


def fault_of(status: str, words: str) -> Fault:
    """Tell faults apart by gRPC's status and Triton's words; a full queue and a lost server have the same status."""
    if status == "DEADLINE_EXCEEDED":
        return Fault.LATE
    if any(busy in words.lower() for busy in _BUSY):
        return Fault.BUSY
    if is_unknown(words):  # a model that was unloaded may have the status of a lost server
        return Fault.SICK
    return Fault.GONE if status in ("UNAVAILABLE", "CANCELLED") else Fault.SICK


def is_unknown(words: str) -> bool:
    """Whether Triton's words say that it does not serve what it was asked for."""
    return "unknown model" in words.lower()
