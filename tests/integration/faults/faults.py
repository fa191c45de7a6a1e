"""What can be done to a line: each function makes a fault, which does it once, for a time drawn from the run's seed.

A fault leaves nothing to be undone but what a run's end heals: servers that are starting, a disk to be freed.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from integration.faults.run import Fault, Run
from integration.faults.servers import children, send

Name = Literal["triton", "kafka", "redis"]
Seconds = tuple[float, float]
A_MOMENT: Seconds = (1.0, 3.0)


@contextmanager
def _away(run: Run, name: Name) -> Iterator[None]:
    """While Triton is away no part of that time can be judged."""
    if name == "triton":
        with run.nothing_judged():
            yield
    else:
        yield


def killed(name: Name, down_s: Seconds = A_MOMENT) -> Fault:
    """SIGKILL; started again after a time."""

    def fault(run: Run) -> None:
        run.servers[name].kill()
        with _away(run, name):
            run.pause(*down_s)
        run.servers[name].start()

    return fault


def stopped(name: Name, seconds: Seconds = A_MOMENT) -> Fault:
    """SIGSTOP, SIGCONT after a time."""

    def fault(run: Run) -> None:
        with run.servers[name].stopped(), _away(run, name):
            run.pause(*seconds)

    return fault


def slowed(name: Name, seconds: Seconds = A_MOMENT, share: float = 0.3) -> Fault:
    """Nothing but a share of the processor's time."""

    def fault(run: Run) -> None:
        run.servers[name].slow(run.rng.uniform(*seconds), share)

    return fault


def cut(name: Name, seconds: Seconds = A_MOMENT) -> Fault:
    """The network: connections reset, new ones refused."""

    def fault(run: Run) -> None:
        run.servers[name].proxy.cut()
        with _away(run, name):
            run.pause(*seconds)
        run.servers[name].proxy.heal()

    return fault


def reset(name: Name, seconds: Seconds = A_MOMENT) -> Fault:
    """The network: every connection reset as soon as it is made."""

    def fault(run: Run) -> None:
        run.servers[name].proxy.reset()
        with _away(run, name):
            run.pause(*seconds)
        run.servers[name].proxy.heal()

    return fault


def stalled(name: Name, *ways: str, seconds: Seconds = A_MOMENT) -> Fault:
    """The network: holds still, both ways or the one that `ways` names, then carries on where it was."""

    def fault(run: Run) -> None:
        run.servers[name].proxy.stall(*ways)
        with _away(run, name):
            run.pause(*seconds)
        run.servers[name].proxy.heal()

    return fault


def half_open(name: Name, seconds: Seconds = A_MOMENT) -> Fault:
    """The network: connections that look alive and carry nothing, reset at the end."""

    def fault(run: Run) -> None:
        run.servers[name].proxy.half_open()
        with _away(run, name):
            run.pause(*seconds)
        run.servers[name].proxy.heal()

    return fault


def answers_lost(name: Name, seconds: Seconds = A_MOMENT) -> Fault:
    """The network: the server gets everything and does it; its answers never arrive, then the connections are reset."""

    def fault(run: Run) -> None:
        run.servers[name].proxy.stall("down")
        with _away(run, name):
            run.pause(*seconds)
        run.servers[name].proxy.reset()
        run.servers[name].proxy.heal()

    return fault


def latency(name: Name, milliseconds: int, seconds: Seconds = (2.0, 4.0)) -> Fault:
    """The network: every byte late, either way."""

    def fault(run: Run) -> None:
        run.servers[name].proxy.slow(latency_s=milliseconds / 1e3)
        run.pause(*seconds)
        run.servers[name].proxy.heal()

    return fault


def throttled(name: Name, bytes_per_s: int, seconds: Seconds = (2.0, 4.0)) -> Fault:
    """The network: few bytes a second."""

    def fault(run: Run) -> None:
        run.servers[name].proxy.slow(bytes_per_s=bytes_per_s)
        run.pause(*seconds)
        run.servers[name].proxy.heal()

    return fault


def flapping(name: Name, times: int = 6) -> Fault:
    """The network: cut and back, many times within seconds."""

    def fault(run: Run) -> None:
        for _ in range(times):
            run.servers[name].proxy.cut()
            run.pause(0.05, 0.5)
            run.servers[name].proxy.heal()
            run.pause(0.05, 0.5)

    return fault


def backend_killed() -> Fault:
    """A process of Triton's Python backend dies: the server calls itself ready and errs; it is started again."""

    def fault(run: Run) -> None:
        server = run.servers["triton"]
        send(signal.SIGKILL, *children(server.pid)[:1])
        run.pause(1.0, 3.0)
        killed("triton", (0.0, 0.5))(run)

    return fault


def during(outer: Fault, inner: Fault, after_s: Seconds = (0.2, 1.0)) -> Fault:
    """One fault while another one is on: `inner` is done where `outer` would wait for the first time."""

    def fault(run: Run) -> None:
        pause, done = run.pause, False

        def meanwhile(shortest_s: float, longest_s: float) -> None:
            nonlocal done
            run.pause = pause  # type: ignore[method-assign]
            if not done:
                done = True
                pause(*after_s)
                inner(run)
            pause(shortest_s, longest_s)

        run.pause = meanwhile  # type: ignore[method-assign]
        try:
            outer(run)
        finally:
            run.pause = pause  # type: ignore[method-assign]

    return fault


def waits(seconds: Seconds) -> Fault:
    """Nothing, for a time."""

    def fault(run: Run) -> None:
        run.pause(*seconds)

    return fault


# The worker


def worker_killed(down_s: Seconds = (0.0, 2.0)) -> Fault:
    """SIGKILL; started again after a time, and at work before the fault is over unless its servers are away."""

    def fault(run: Run) -> None:
        if not run.worker.is_down:
            run.worker.kill()
        run.pause(*down_s)
        run.worker.start()

    return fault


def worker_at_work() -> Fault:
    """Wait until the worker that was started has opened its cameras; its servers must be there."""

    def fault(run: Run) -> None:
        run.worker.wait()

    return fault


def worker_stopped(seconds: Seconds = A_MOMENT) -> Fault:
    """SIGSTOP, SIGCONT after a time."""

    def fault(run: Run) -> None:
        with run.worker.stopped():
            time.sleep(run.rng.uniform(*seconds))

    return fault


def worker_slowed(seconds: Seconds = A_MOMENT, share: float = 0.3) -> Fault:
    """Nothing but a share of the processor's time."""

    def fault(run: Run) -> None:
        until = time.monotonic() + run.rng.uniform(*seconds)
        while time.monotonic() < until:
            with run.worker.stopped():
                time.sleep(0.1 * (1 - share))
            time.sleep(0.1 * share)

    return fault


def worker_drained(down_s: Seconds = (0.0, 2.0)) -> Fault:
    """SIGTERM, and another one started after its end."""

    def fault(run: Run) -> None:
        run.worker.drain()
        run.pause(*down_s)
        run.worker.start()

    return fault


def worker_killed_while_draining(after_s: Seconds = (0.05, 1.0)) -> Fault:
    """SIGTERM, and SIGKILL before it could finish."""

    def fault(run: Run) -> None:
        run.worker.ask_to_stop()
        time.sleep(run.rng.uniform(*after_s))
        run.worker.kill()
        run.pause(0.0, 1.0)
        run.worker.start()

    return fault


# Its disk and its clock


def disk_full(seconds: Seconds = A_MOMENT) -> Fault:
    """No byte left."""

    def fault(run: Run) -> None:
        run.disk.fill()
        run.pause(*seconds)
        run.disk.heal()

    return fault


def disk_read_only_at_start(seconds: Seconds = A_MOMENT) -> Fault:
    """SIGKILL, and a worker that finds its disk read-only, as the kernel makes one that errs; then it is good again."""

    def fault(run: Run) -> None:
        run.worker.kill()
        run.disk.remount("ro")
        run.worker.start()
        run.pause(*seconds)
        run.disk.heal()

    return fault


def clock_moved(*offsets_s: int, seconds: Seconds = A_MOMENT) -> Fault:
    """The worker's clock jumps to each of these offsets in turn, and stays at the last."""

    def fault(run: Run) -> None:
        for offset_s in offsets_s:
            run.worker.set_clock(offset_s)
            run.pause(*seconds)

    return fault
