"""The choice of a replica, with replicas and a clock made up here: turns, shares, setting aside, growing pauses."""

from __future__ import annotations

from collections import Counter

import pytest

from pipeline.balance import (
    LONGEST_PAUSE_S,
    MANY,
    SUSPICION_PERIOD_S,
    Balance,
    Fault,
    Finding,
    Standing,
    fault_of,
    pause_s,
)


def balance_of(*addresses):
    """Give a balance whose replicas have all been found good at 0 s, and its replicas."""
    balance = Balance(3)
    joined, _ = balance.see(addresses)
    for replica in joined:
        balance.found(replica, Finding.GOOD, "", 0.0)
    return balance, *joined


def served(balance, count):
    """Count which addresses answered so many batches, one after the other."""
    counts = Counter()
    for _ in range(count):
        replica = balance.take()
        balance.give_back(replica, None, "", 1.0, first_try=True)
        counts[replica.address] += 1
    return counts


def test_replicas_take_turns():
    """Three replicas that are equally fast get the same number of batches."""
    balance, *_ = balance_of("a", "b", "c")
    assert served(balance, 30) == {"a": 10, "b": 10, "c": 10}


def test_a_slow_replica_gets_what_it_can_answer():
    """A replica that holds on to its batch gets no second one while another has none."""
    balance, slow, fast = balance_of("slow", "fast")
    assert balance.take() is slow
    assert served(balance, 5) == {"fast": 5}
    assert [balance.take(), balance.take()] == [fast, slow]


def test_a_replica_that_is_late_gets_fewer_frames():
    """Half of those under way when a batch was late, one more with each that is answered; never none, and what was sent
    before counts."""
    balance, replica = balance_of("a")
    assert balance.room() == MANY
    for _ in range(3):
        balance.take(frames=8)
    assert balance.room() == 0
    balance.give_back(replica, Fault.LATE, "Deadline Exceeded", 1.0, first_try=True, frames=8)
    assert (replica.window, replica.frames, balance.room()) == (12, 16, 0)
    for window in (6, 3):
        balance.give_back(replica, Fault.LATE, "Deadline Exceeded", 1.0, first_try=True, frames=8)
        assert replica.window == window
    assert balance.room() == 3
    balance.take(frames=3)
    balance.give_back(replica, None, "", 2.0, first_try=True, frames=3)
    assert balance.room() == 4
    for _ in range(9):
        size = balance.room()
        balance.take(frames=size)
        balance.give_back(replica, Fault.LATE, "Deadline Exceeded", 3.0, first_try=True, frames=size)
    assert balance.room() == 1
    balance.take(frames=8)  # tried again here for want of another replica
    balance.give_back(replica, Fault.LATE, "Deadline Exceeded", 3.0, first_try=False, frames=8)
    assert replica.window == 1


def test_a_replica_that_was_late_waits_until_half_of_its_window_is_free():
    """A stream of small batches would cost it more than it brings."""
    balance, replica = balance_of("a")
    replica.window = 8
    balance.take(frames=4)
    assert balance.room() == 4
    balance.take(frames=1)
    assert balance.room() == 0


def test_a_batch_that_a_window_has_no_room_for_goes_elsewhere():
    """A replica comes after one that has room for the whole batch, however many more batches that holds."""
    balance, slow, fast = balance_of("slow", "fast")
    slow.window = 4
    assert [balance.take(frames=frames) for frames in (2, 4, 4)] == [slow, fast, fast]


def test_a_replica_is_not_flooded_while_another_one_is_suspected():
    """The room of one that was late is used, small as it is; a healthy one gets no more than it may hold."""
    balance, well, late = balance_of("well", "late")
    for _ in range(2):
        balance.take(frames=8)
    balance.give_back(late, Fault.LATE, "Deadline Exceeded", 1.0, first_try=True, frames=8)
    while room := balance.room():
        balance.take(frames=min(8, room))
    assert well.in_flight == 3
    assert late.frames == late.window == 4


def test_nothing_goes_to_a_replica_before_it_is_proved():
    """New, set aside or refused: such a replica gets no batch; without another one there is none to give."""
    balance = Balance(3)
    (new, aside, refused), _ = balance.see(["new", "aside", "refused"])
    balance.found(aside, Finding.FAILED, "refused the connection", 0.0)
    balance.found(refused, Finding.REFUSED, "version 2 is loaded, not 1", 0.0)
    assert balance.take() is None
    assert [each.standing for each in (new, aside, refused)] == [Standing.NEW, Standing.ASIDE, Standing.REFUSED]
    balance.found(new, Finding.GOOD, "", 0.0)
    assert served(balance, 4) == {"new": 4}


def test_a_replica_that_joins_gets_its_share_and_one_that_left_gets_nothing():
    """The set follows the name: two replicas, then another two with one in common."""
    balance, a, b = balance_of("a", "b")
    (c,), left = balance.see(["b", "c"])
    assert left == [a]
    balance.found(c, Finding.GOOD, "", 5.0)
    assert balance.replicas == [b, c]
    counts = served(balance, 20)
    assert counts["b"] == counts["c"] == 10


@pytest.mark.parametrize("fault", [Fault.GONE, Fault.BUSY, Fault.SICK])
def test_the_second_try_goes_to_another_replica(fault):
    """A batch that a replica did not judge goes to another one, once; only one that is gone is set aside at once."""
    balance, a, b = balance_of("a", "b")
    assert balance.take() is a
    assert balance.give_back(a, fault, "words", 1.0, first_try=True)
    assert balance.take(avoid=a) is b
    assert not balance.give_back(b, fault, "words", 1.0, first_try=False)
    assert (a.standing is Standing.ASIDE) == (fault is Fault.GONE)


def test_a_batch_without_time_is_not_sent_again():
    """A deadline that has passed leaves nothing to try, and puts the replica under suspicion."""
    balance, a, b = balance_of("a", "b")
    assert not balance.give_back(balance.take(), Fault.LATE, "Deadline Exceeded", 9.0, first_try=True)
    assert balance.due(9.0) == [a]
    assert [balance.take(), balance.take()] == [b, b]


def test_the_only_replica_is_tried_again_and_then_set_aside():
    """A broken connection to the only replica is worth a new one; a second failure in a row sets it aside."""
    balance, a = balance_of("a")
    assert balance.give_back(balance.take(), Fault.GONE, "Socket closed", 1.0, first_try=True)
    assert balance.take(avoid=a) is a
    assert not balance.give_back(a, Fault.GONE, "Connection refused", 1.0, first_try=False)
    assert (a.standing, a.fault, balance.take()) == (Standing.ASIDE, "Connection refused", None)


def test_an_answer_that_is_none_is_not_asked_for_again_from_the_same_replica():
    """An error of the model would only be repeated by the only replica, which stays in use."""
    balance, a = balance_of("a")
    assert not balance.give_back(balance.take(), Fault.SICK, "stub is not healthy", 9.0, first_try=True)
    assert a.standing is Standing.UP
    assert balance.due(9.0) == [a]


def test_pauses_grow_until_a_batch_is_answered():
    """Each failed probe doubles the pause up to its limit; a good probe alone does not make it short again."""
    balance, a = balance_of("a")
    now_s, pauses = 100.0, []
    balance.give_back(balance.take(), Fault.GONE, "gone", now_s, first_try=False)
    for _ in range(6):
        assert balance.due(a.probe_due_s - 0.01) == []
        assert balance.due(a.probe_due_s) == [a]
        pauses.append(a.probe_due_s - now_s)
        now_s = a.probe_due_s
        balance.found(a, Finding.FAILED, "refused", now_s)
    assert pauses == [0.25, 0.5, 1.0, 2.0, 2.0, 2.0]
    balance.found(a, Finding.GOOD, "", now_s)
    balance.give_back(balance.take(), Fault.GONE, "gone", now_s, first_try=False)
    assert a.probe_due_s == now_s + LONGEST_PAUSE_S
    balance.found(a, Finding.GOOD, "", now_s)
    balance.give_back(balance.take(), None, "", now_s, first_try=True)
    balance.give_back(balance.take(), Fault.GONE, "gone", now_s, first_try=False)
    assert a.probe_due_s == now_s + pause_s(0)


def test_pauses_stay_finite():
    """A replica that has been away for a week is still asked at the longest pause."""
    assert pause_s(1_000_000) == LONGEST_PAUSE_S


def test_suspicion_asks_once_in_a_while():
    """A picture that fails everywhere costs one probe in five seconds and no replica."""
    balance, a, b = balance_of("a", "b")
    probes = 0
    for tenth in range(200):
        now_s = tenth / 10
        balance.give_back(balance.take(), Fault.SICK, "bad picture", now_s, first_try=True)
        for replica in balance.due(now_s):
            balance.found(replica, Finding.GOOD, "", now_s)
            probes += 1
    assert balance.up == [a, b]
    assert probes <= 2 * 20 / SUSPICION_PERIOD_S


def test_all_under_suspicion_stay_in_use_until_they_are_probed():
    """Each replica in use is due, and gets batches meanwhile; what is found then holds."""
    balance, a, b = balance_of("a", "b")
    balance.suspect_all(3.0)
    assert balance.due(3.0) == balance.up == [a, b]
    assert served(balance, 4) == {"a": 2, "b": 2}
    balance.found(a, Finding.FAILED, "lacks a product", 3.1)
    balance.found(b, Finding.GOOD, "", 3.1)
    assert (balance.up, balance.due(3.1)) == ([b], [])


@pytest.mark.parametrize(("others", "standing"), [(["b"], Standing.ASIDE), ([], Standing.UP)])
def test_slow_is_better_than_none(others, standing):
    """A replica whose canary is late is set aside when there is another one, and kept when it is the last."""
    balance, a, *_ = balance_of("a", *others)
    balance.found(a, Finding.LATE, "Deadline Exceeded", 10.0)
    assert a.standing is standing


def test_answers_of_a_replica_that_is_aside_change_nothing():
    """Batches that were under way when their replica was set aside neither bring it back nor make the pause longer."""
    balance, a, _b = balance_of("a", "b")
    for _ in range(4):
        balance.take()
    balance.give_back(a, Fault.GONE, "gone", 1.0, first_try=True)
    due_s = a.probe_due_s
    balance.give_back(a, Fault.GONE, "gone", 1.2, first_try=True)
    assert (a.standing, a.probe_due_s, a.failures, a.in_flight) == (Standing.ASIDE, due_s, 1, 0)


@pytest.mark.parametrize(
    ("status", "words", "fault"),
    [
        ("UNAVAILABLE", "failed to connect to all addresses", Fault.GONE),
        ("UNAVAILABLE", "GRPC server is shutting down and has stopped accepting new requests.", Fault.GONE),
        ("CANCELLED", "", Fault.GONE),
        ("UNAVAILABLE", "[request id: <id_unknown>] Exceeds maximum queue size", Fault.BUSY),
        ("UNAVAILABLE", "Request timeout expired", Fault.BUSY),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", Fault.LATE),
        ("INTERNAL", "Stub process 'tray.mahalanobis_0_0' is not healthy.", Fault.SICK),
        ("INVALID_ARGUMENT", "unexpected shape for input 'image'", Fault.SICK),
        ("None", "", Fault.SICK),
    ],
)
def test_a_full_queue_is_told_from_a_lost_server(status, words, fault):
    """Both are UNAVAILABLE, but setting a full replica aside would only fill the next one."""
    assert fault_of(status, words) is fault
