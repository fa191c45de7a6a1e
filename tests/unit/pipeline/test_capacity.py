"""The simulated queue against answers that are known without it."""

import math

import pytest

from pipeline.capacity import HEADROOM, Load, Outcome, Service, replicas_for, simulate

SERVICE = Service(single_ms=25.0, full_ms=160.0, full_batch=8)


def test_service_time_is_a_line_through_both_measured_points():
    """One image and a full batch take what was measured; between them it is proportional."""
    assert SERVICE.time_ms(1) == 25.0
    assert SERVICE.time_ms(8) == 160.0
    assert SERVICE.images_per_s(8) == pytest.approx(50.0)


def test_lone_camera_waits_for_others_and_is_served_alone():
    """With one slow camera nobody joins: the latency is the longest wait plus the time for one image."""
    outcome = simulate(Load(1, 1.0, 2000, max_age_ms=30), SERVICE, 1)
    assert outcome.p50_ms == outcome.p99_ms == pytest.approx(55.0)
    assert outcome.mean_batch == 1
    assert outcome.late_share == 0


def test_overload_gives_the_capacity_and_gives_up_the_rest():
    """At twice the capacity half of the frames are late, and no answer is older than the budget."""
    outcome = simulate(Load(100, 1.0, 2000), SERVICE, 1, seconds=120)
    assert outcome.images_per_s == pytest.approx(50, rel=0.05)
    assert outcome.late_share == pytest.approx(0.5, abs=0.05)
    assert outcome.p99_ms <= 2000


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_replicas_add_their_capacity(replicas):
    """Under overload, throughput grows with the replicas."""
    outcome = simulate(Load(400, 1.0, 1000), SERVICE, replicas, seconds=60)
    assert outcome.images_per_s == pytest.approx(50 * replicas, rel=0.05)


@pytest.mark.parametrize("cameras", [4, 64, 300])
def test_plan_answers_all_in_time_with_headroom(cameras):
    """What is planned loses nothing and is loaded no more than the headroom allows; one fewer would be."""
    load = Load(cameras, 1.0, 2000)
    replicas = replicas_for(load, SERVICE)
    outcome = simulate(load, SERVICE, replicas)
    assert outcome.late_share == 0
    assert load.images_per_s <= HEADROOM * replicas * SERVICE.images_per_s(8)
    assert replicas == 1 or load.images_per_s > HEADROOM * (replicas - 1) * SERVICE.images_per_s(8)


def test_budget_below_a_batch_is_refused():
    """No number of replicas makes a batch faster; the sentence says what would."""
    with pytest.raises(ValueError, match="smaller batch"):
        replicas_for(Load(4, 1.0, 100), SERVICE)


def test_scaler_is_asked_and_its_replicas_start_late():
    """A replica that is wanted takes frames only once it has started."""
    asked = []

    def scaler(now_s: float, wait_ms: float, busy: float, wanted: int) -> int:
        asked.append((now_s, wait_ms, busy))
        assert wanted in {1, 2}
        return 2

    load = Load(80, 1.0, 1000)
    slow = simulate(load, SERVICE, 1, seconds=60, scaler=scaler, startup_s=30)
    assert [round(now) for now, _, _ in asked] == [15, 30, 45, 60][: len(asked)]
    assert asked[0][1] > 500  # the only replica is behind
    assert asked[0][2] == pytest.approx(1, abs=0.1)  # and never idle
    assert [count for _, count in slow.replicas] == [1, 2]
    at_once = simulate(load, SERVICE, 1, seconds=60, scaler=scaler, startup_s=0)
    assert at_once.late_share < slow.late_share


def test_stopped_replicas_answer_what_they_hold():
    """Scaling down loses no frame."""
    load = Load(20, 1.0, 2000)
    outcome = simulate(load, SERVICE, 4, seconds=60, scaler=lambda *_: 1)
    assert outcome.replicas[-1][1] == 1
    assert outcome.late_share == 0


def test_load_follows_the_shift():
    """A share of the rate gives that share of the frames; no frames give no figures."""
    half = simulate(Load(40, 1.0, 2000), SERVICE, 2, rate_at=lambda _: 0.5)
    assert half.images_per_s == pytest.approx(20, rel=0.1)
    none: Outcome = simulate(Load(1, 1.0, 2000), SERVICE, 1, rate_at=lambda _: 0.0)
    assert math.isnan(none.p50_ms)
