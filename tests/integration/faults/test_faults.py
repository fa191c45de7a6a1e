"""No verdict is lost, doubled, out of order or an unfounded OK, whatever happens to the line: the named cases."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from integration.faults.cases import CASES, QUICK
from integration.faults.run import Bench, Case, Run
from integration.faults.table import Row

pytestmark = [
    pytest.mark.stack,
    pytest.mark.timeout(900),
    # kafka-python leaves the socket of a refused connection to the garbage collector.
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
]
_MOST_BREACHES_SHOWN = 20
_SERVERS_AWAY = (3, 4)
"""Exit codes of a worker that cannot start yet: no disk to write to, a server that does not answer."""


@pytest.fixture(autouse=True)
def refused_sockets() -> Iterator[None]:
    """Collect the sockets that kafka-python left while their warnings are ignored, not in a later test."""
    yield
    gc.collect()


def _parameter(case: Case) -> Any:
    marks = [pytest.mark.fault_case] + ([] if case.name in QUICK else [pytest.mark.long])
    return pytest.param(case, id=case.name, marks=marks)


@pytest.mark.parametrize("case", [_parameter(case) for case in CASES])
def test_every_part_has_one_verdict(
    case: Case, bench: Bench, seed: int, note: Callable[[Row], None], tmp_path: Path
) -> None:
    """A consumer that knows every part finds one verdict of each, in order, no unfounded OK; and the line recovers."""
    if case.disk and not bench.can_mount:
        pytest.skip("needs root, to mount a small disk")
    if case.clock and bench.clock is None:
        pytest.skip("needs a C compiler: `make test` and `make faults` install one")
    began_s = time.monotonic()
    run = Run(bench, case, tmp_path, f"{seed}:{case.name}")
    account, failure = None, "did not come to its end"
    try:
        account = run.go()
        failure = "; ".join(sorted(account.rules()))
        if crashes := [code for code in run.worker.ended_with if code not in _SERVERS_AWAY]:
            failure = f"{failure}; the worker ended by itself with exit code {crashes[0]}".lstrip("; ")
        if run.exit_code != 0:
            failure = f"{failure}; the worker drained with exit code {run.exit_code}".lstrip("; ")
    finally:
        bench.servers.heal()
        note(Row(case.name, case.tells, account, run.worker.lives, time.monotonic() - began_s, failure))
    assert not failure, "\n".join([failure, *account.breaches[:_MOST_BREACHES_SHOWN], f"log: {tmp_path}/worker.log"])
    assert account.parts > 0
    assert account.judged > 0


def test_the_suite_sees_a_line_without_an_outbox_lose_parts(
    bench: Bench, seed: int, note: Callable[[Row], None], tmp_path: Path
) -> None:
    """The worker is killed while Kafka is cut, with the outbox switched off: the checker names parts as lost."""
    (case,) = (case for case in CASES if case.name == "free-run-worker-killed-without-kafka")
    began_s = time.monotonic()
    run = Run(bench, case, tmp_path, f"{seed}:{case.name}", line="without-outbox", outbox=False)
    account = run.go()
    bench.servers.heal()
    lost = sum(breach.startswith("lost") for breach in account.breaches)
    result = f"{lost} parts lost, as must be"
    tells = f"{case.tells}; and the outbox is switched off"
    note(Row("without-outbox", tells, account, run.worker.lives, time.monotonic() - began_s, result=result))
    assert lost > 0
    assert account.rules() == {"lost"}
