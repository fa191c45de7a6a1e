"""The account of parts: every missing, doubled or contradicted part is named, and nothing else is."""

from __future__ import annotations

import random

import pytest

from pipeline.ledger import Conflict, Due, Gap, Ledger, PartKey, Told, Witness

VERDICTS = ("OK", "NG", "REVIEW", "UNINSPECTED")


def told(number, verdict="OK", *, inspection=None, epoch=None, worker="w1", sequence=None, at_ms=1000):
    part = PartKey("s1", f"p-{number}", "1")
    return Told(part, inspection or f"id-{number}", verdict, epoch, worker, sequence or number, at_ms)


def due(ledger, number, *, at_ms=0, witness=Witness.TRIGGER):
    ledger.due(PartKey("s1", f"p-{number}", "1"), Due(f"id-{number}", witness, at_ms))


@pytest.fixture
def ledger():
    """Three parts that were due, of which the first two have their verdicts."""
    ledger = Ledger()
    for number in (1, 2, 3):
        due(ledger, number)
    ledger.told(told(1))
    ledger.told(told(2, "NG"))
    return ledger


def test_a_part_without_a_verdict_is_named(ledger):
    """Missing with its witness; the others stand in the sums, and a part that two said was there is due once."""
    due(ledger, 3, witness=Witness.VIEW)
    account = ledger.account(open_after_ms=500)
    assert [(each.part.part_id, each.due.witness, each.why) for each in account.missing] == [("p-3", "trigger", "")]
    assert (account.due["s1"], account.told["s1", "OK"], account.told["s1", "NG"]) == (3, 1, 1)
    assert not account.good


@pytest.mark.parametrize(
    ("keywords", "counter"),
    [({"open_after_ms": 0}, "open"), ({"open_after_ms": 500, "stored": ["id-3"]}, "stored")],
)
def test_a_part_that_will_be_told_is_not_missing(ledger, keywords, counter):
    """One whose time is not over, and one whose verdict lies in the outbox, are counted apart."""
    account = ledger.account(**keywords)
    assert (getattr(account, counter)["s1"], account.good) == (1, True)


def test_a_dead_letter_says_where_the_verdict_is(ledger):
    """A verdict that was given up is missing to the consumer, and its place is told."""
    account = ledger.account(open_after_ms=500, dead=["id-3"])
    assert [each.why for each in account.missing] == ["on the dead-letter topic"]


def test_a_second_delivery_is_harmless(ledger):
    """The same id with the same verdict again is counted as repeated, and the part once."""
    ledger.told(told(3))
    for _ in range(2):
        ledger.told(told(2, "NG"))
    account = ledger.account(open_after_ms=500)
    assert (account.repeated["s1"], account.told["s1", "NG"], account.good) == (2, 1, True)


@pytest.mark.parametrize("other", [{"verdict": "NG"}, {"inspection": "another"}, {"inspection": "x", "verdict": "NG"}])
def test_two_words_on_one_part_are_a_conflict(ledger, other):
    """Another verdict, or another id, for the same station, part and measurement is named with both."""
    ledger.told(told(3))
    ledger.told(told(3, **other))
    ledger.told(told(3, **other))
    account = ledger.account(open_after_ms=500)
    assert account.conflicts == (Conflict(told(3).part, told(3), told(3, **other)),)
    assert not account.good


@pytest.mark.parametrize("order", [1, -1])
def test_the_higher_epoch_settles_it(ledger, order):
    """Of two verdicts under one id the higher epoch's counts, in whichever order they came."""
    for each in [told(3, "OK", epoch=4), told(3, "NG", epoch=5)][::order]:
        ledger.told(each)
    account = ledger.account(open_after_ms=500)
    assert (account.settled["s1"], account.told["s1", "NG"], account.told["s1", "OK"], account.good) == (1, 2, 1, True)


def test_another_measurement_is_another_part(ledger):
    """The same part id with another measId, or seen by another camera as a part of its own, is no conflict."""
    ledger.told(told(3))
    ledger.told(told(3, "NG", inspection="m2", sequence=4)._replace(part=PartKey("s1", "p-3", "2")))
    ledger.told(told(3, "NG", inspection="c1", sequence=5)._replace(part=PartKey("s1", "p-3", None, "c1")))
    assert ledger.account(open_after_ms=500).good


def test_gaps_are_told_by_worker_and_station():
    """Numbers that a run left out are named; a late second delivery fills them; where a period begins is no gap."""
    ledger = Ledger()
    for sequence in (7, 8, 12, 13, 20):
        ledger.told(told(sequence))
    ledger.told(told(100, worker="w2"))
    ledger.told(told(3))  # of before the period, delivered again
    ledger.told(told(10))
    assert ledger.account(open_after_ms=0).gaps == (
        Gap("w1", "s1", 9, 9),
        Gap("w1", "s1", 11, 11),
        Gap("w1", "s1", 14, 19),
    )


def test_what_comes_after_the_period_only_answers_it(ledger):
    """A verdict told after the end settles a part that was due, and opens neither a part nor a gap."""
    ledger.told(told(9), within=False)
    ledger.told(told(3), within=False)
    account = ledger.account(open_after_ms=500)
    assert (account.due["s1"], account.good) == (3, True)


def test_every_fault_of_a_shuffled_hour_is_found():
    """Of 20 000 parts with repeats, losses and contradictions at known numbers, exactly those come out."""
    dice = random.Random(7)
    numbers = list(range(1, 20_001))
    lost, twice, clash = (set(dice.sample(numbers[1:-1], 40)) for _ in range(3))
    ledger = Ledger()
    for number in numbers:
        due(ledger, number)
    for number in numbers:
        if number not in lost:
            ledger.told(told(number, VERDICTS[number % 4]))
    for number in twice - lost:
        ledger.told(told(number, VERDICTS[number % 4]))
    for number in clash - lost:
        ledger.told(told(number, VERDICTS[(number + 1) % 4]))
    account = ledger.account(open_after_ms=1)
    assert {each.part.part_id for each in account.missing} == {f"p-{number}" for number in lost}
    assert {each.part.part_id for each in account.conflicts} == {f"p-{number}" for number in clash - lost}
    assert account.repeated["s1"] == len(twice - lost)
    assert {number for gap in account.gaps for number in range(gap.first, gap.last + 1)} == lost
    assert account.due["s1"] == sum(account.told.values()) + len(lost) == len(numbers)
