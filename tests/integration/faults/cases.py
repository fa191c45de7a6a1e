"""The named cases: what is done to which line. The order in which they run, and every time in them, is the seed's."""

from __future__ import annotations

import sys

from integration.faults.faults import (
    Name,
    answers_lost,
    backend_killed,
    clock_moved,
    cut,
    disk_full,
    disk_read_only_at_start,
    during,
    flapping,
    half_open,
    killed,
    latency,
    reset,
    slowed,
    stalled,
    stopped,
    throttled,
    waits,
    worker_at_work,
    worker_drained,
    worker_killed,
    worker_killed_while_draining,
    worker_slowed,
    worker_stopped,
)
from integration.faults.run import Case, Fault, Run

_HOUR_S = 3600
_NETWORK = [
    ("cut", "connections are reset and new ones refused", cut),
    ("reset", "every connection is reset as soon as it is made", reset),
    ("half-open", "connections look alive and carry nothing, then are reset", half_open),
    ("answers-lost", "requests arrive, answers do not, then connections are reset", answers_lost),
]
_TO_SERVERS = (stopped, cut, reset, half_open, answers_lost)
_SERVERS: dict[Name, str] = {"triton": "Triton", "kafka": "Kafka", "redis": "Redis"}


def _of_each_server() -> list[Case]:
    cases = []
    for name, title in _SERVERS.items():
        cases += [
            Case(f"{name}-killed", f"{title} is killed (SIGKILL) and started again", (killed(name),)),
            Case(f"{name}-stopped", f"{title} hangs (SIGSTOP) and goes on", (stopped(name),)),
            Case(f"{name}-slowed", f"{title} has 30 % of the processor's time", (slowed(name),)),
            Case(f"{name}-stalled", f"network to {title}: holds still, then carries on", (stalled(name),)),
            Case(f"{name}-flapping", f"network to {title}: cut and back six times", (flapping(name),)),
            Case(f"{name}-latency", f"network to {title}: every byte 150 ms late", (latency(name, 150),)),
            *(
                Case(f"{name}-{kind}", f"network to {title}: {tells}", (fault(name),))
                for kind, tells, fault in _NETWORK
            ),
        ]
    return cases


def _storm(run: Run) -> None:
    """Four faults, any of them, one after the other or two at once; says which, should the run fail."""
    anything: dict[tuple[str, str], Fault] = {
        **{(name, fault.__name__): fault(name) for name in _SERVERS for fault in _TO_SERVERS},
        ("kafka", "killed"): killed("kafka"),
        ("redis", "killed"): killed("redis"),
        ("worker", "killed"): worker_killed(),
        ("worker", "stopped"): worker_stopped(),
    }
    if run.disk.mounted and not run.is_free_run:
        anything["disk", "full"] = disk_full()
    for first, second in (run.rng.sample(sorted(anything), 2) for _ in range(2)):
        at_once = first[0] != second[0] and run.rng.random() < 0.5
        sys.stdout.write(f"{' '.join(first)} {'with' if at_once else 'then'} {' '.join(second)}\n")
        if at_once:
            during(anything[first], anything[second])(run)
        else:
            anything[first](run)
            run.pause(0.2, 1.0)
            anything[second](run)


CASES = [
    Case("quiet", "nothing is done", (waits((2.0, 3.0)),)),
    *_of_each_server(),
    Case(
        "triton-throttled",
        "network to Triton: 200 KB/s, less than the load",
        (throttled("triton", 200_000, (5.0, 7.0)),),
    ),
    Case("kafka-throttled", "network to Kafka: 4 KB/s, less than the load", (throttled("kafka", 4_000, (5.0, 7.0)),)),
    Case("triton-backend-killed", "a process of Triton's Python backend dies, then the server", (backend_killed(),)),
    Case(
        "kafka-killed-twice", "Kafka is killed, started, and killed while it starts", (killed("kafka"), killed("kafka"))
    ),
    Case(
        "kafka-long-outage",
        "network to Kafka: cut for 15 s, longer than a request's timeout",
        (cut("kafka", (15, 16)),),
    ),
    Case(
        "all-servers-killed",
        "Triton, Kafka and Redis are killed at once",
        (during(killed("triton"), during(killed("kafka"), killed("redis"), (0, 0)), (0, 0)),),
    ),
    Case("worker-killed", "the worker is killed (SIGKILL) and started again", (worker_killed(),)),
    Case(
        "worker-killed-twice",
        "the worker is killed, and again as soon as it is at work",
        (
            worker_killed(),
            worker_at_work(),
            worker_killed(),
        ),
    ),
    Case(
        "worker-killed-while-starting",
        "the worker is killed, and again while it starts",
        (
            worker_killed((0, 0)),
            worker_killed((0, 1)),
        ),
    ),
    Case("worker-stopped", "the worker hangs (SIGSTOP) and goes on", (worker_stopped(),)),
    Case("worker-stopped-long", "the worker hangs for longer than the parts' budget", (worker_stopped((6, 8)),)),
    Case("worker-slowed", "the worker has 30 % of the processor's time", (worker_slowed(),)),
    Case("worker-drained", "the worker is ended (SIGTERM), and another one started", (worker_drained(),)),
    Case(
        "worker-drained-without-kafka",
        "the worker is ended while Kafka is away",
        (during(cut("kafka", (1, 2)), worker_drained()),),
    ),
    Case("worker-killed-while-draining", "SIGTERM, and SIGKILL before the end", (worker_killed_while_draining(),)),
    Case(
        "worker-killed-without-kafka",
        "network to Kafka cut; the worker is killed and started meanwhile",
        (during(cut("kafka"), worker_killed(), (1, 2)),),
    ),
    Case(
        "worker-killed-kafka-hangs",
        "Kafka hangs; the worker is killed and started meanwhile",
        (during(stopped("kafka"), worker_killed(), (1, 2)),),
    ),
    Case(
        "worker-killed-kafka-killed",
        "Kafka is killed, then the worker; both are started",
        (during(killed("kafka"), worker_killed(), (1, 2)),),
    ),
    Case(
        "worker-killed-acks-lost",
        "Kafka has the verdicts, its answers are lost, and the worker is killed",
        (during(stalled("kafka", "down"), worker_killed(), (1, 2)),),
    ),
    Case(
        "worker-killed-without-triton",
        "network to Triton cut; the worker is killed and started meanwhile",
        (during(cut("triton"), worker_killed(), (1, 2)),),
    ),
    Case(
        "worker-killed-without-redis",
        "Redis is killed, then the worker, which starts with its own copy",
        (during(killed("redis", (3, 4)), worker_killed(), (1, 2)),),
    ),
    Case("disk-full", "no byte is left on the worker's disk, then there is room", (disk_full(),), disk=True),
    Case(
        "disk-full-without-kafka",
        "network to Kafka cut, and no byte left on the disk",
        (during(cut("kafka", (3, 4)), disk_full((1, 2))),),
        disk=True,
    ),
    Case(
        "disk-full-worker-killed",
        "no byte left on the disk; the worker is killed and started meanwhile",
        (during(disk_full(), worker_killed(), (1, 2)),),
        disk=True,
    ),
    Case(
        "disk-read-only-at-start",
        "the worker is killed and finds a read-only disk",
        (disk_read_only_at_start(),),
        disk=True,
    ),
    Case("clock-forward", "the worker's clock jumps an hour ahead", (clock_moved(_HOUR_S),), clock=True),
    Case("clock-back", "the worker's clock jumps an hour back", (clock_moved(-_HOUR_S),), clock=True),
    Case(
        "clock-back-worker-killed",
        "the worker's clock jumps a day back, then it is killed and started",
        (
            clock_moved(-24 * _HOUR_S),
            worker_killed(),
        ),
        clock=True,
    ),
    Case(
        "clock-back-without-kafka",
        "network to Kafka cut; the clock jumps back, ahead, and back",
        (during(cut("kafka", (1, 2)), clock_moved(-60, _HOUR_S, -_HOUR_S, seconds=(1, 1.5))),),
        clock=True,
    ),
    Case("two-views-triton-killed", "parts of two views; Triton is killed", (killed("triton"),), shape="two views"),
    Case("two-views-worker-killed", "parts of two views; the worker is killed", (worker_killed(),), shape="two views"),
    Case("two-stations-kafka-killed", "two stations; Kafka is killed", (killed("kafka"),), shape="two stations"),
    Case(
        "two-stations-worker-killed-without-kafka",
        "two stations; the worker is killed while Kafka is cut",
        (during(cut("kafka"), worker_killed(), (1, 2)),),
        shape="two stations",
    ),
    Case("free-run-triton-killed", "no triggers; Triton is killed", (killed("triton"),), shape="free run"),
    Case("free-run-kafka-killed", "no triggers; Kafka is killed", (killed("kafka"),), shape="free run"),
    Case("free-run-worker-killed", "no triggers; the worker is killed", (worker_killed(),), shape="free run"),
    Case(
        "free-run-worker-killed-without-kafka",
        "no triggers; the worker is killed while Kafka is cut",
        (during(cut("kafka", (1, 2)), worker_killed(), (5, 6)),),
        shape="free run",
    ),
    Case(
        "free-run-worker-killed-acks-lost",
        "no triggers; Kafka's answers are lost, and the worker is killed",
        (during(stalled("kafka", "down", seconds=(1, 2)), worker_killed(), (5, 6)),),
        shape="free run",
    ),
    *(Case(f"storm-{number}", "four faults, drawn from the seed", (_storm,)) for number in range(1, 7)),
    Case("storm-two-stations", "two stations; four faults, drawn from the seed", (_storm,), shape="two stations"),
    Case("storm-free-run", "no triggers; four faults, drawn from the seed", (_storm,), shape="free run"),
]

# The most telling ones, with every `make test`.
QUICK = {
    "kafka-answers-lost",
    "triton-killed",
    "worker-killed-without-kafka",
    "disk-full",
    "clock-back",
    "free-run-worker-killed-without-kafka",
    "storm-1",
}
