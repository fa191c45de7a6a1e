"""The checker on made-up histories: each breach of each rule is found, and a faultless history has none."""

from __future__ import annotations

from dataclasses import replace

import pytest
from integration.faults.checker import Part, Verdict, View, check

KEY, SOURCE = "line/trays", "/site/area/line"
GOOD = View("OK", 1.0, 2.0)
PARTS = [Part(KEY, number, scores=(1.0, 9.0), triggered_at=100.0 + number) for number in range(5)]


def told(number: int, **changes) -> Verdict:
    """What a good line says of a part."""
    verdict = Verdict(
        KEY, SOURCE, f"id-{number}", number, "OK", (GOOD,), worker="w", sequence=number + 1, decided_at=100.5 + number
    )
    return replace(verdict, **changes)


def history(*changed: Verdict) -> list[Verdict]:
    """All five parts, some of them told otherwise."""
    by_number = {verdict.number: verdict for verdict in changed}
    return [by_number.get(number, told(number)) for number in range(5)]


def test_a_faultless_history_has_no_breach():
    """One verdict a part, in order; what is told twice under one id counts once."""
    verdicts = [*history(told(3, verdict="UNINSPECTED", views=())), told(1), told(2)]
    account = check(PARTS, verdicts, dark=[(10.0, 20.0)])
    assert account.breaches == []
    assert (account.parts, account.judged, account.uninspected, account.retold) == (5, 4, 1, 2)


def test_a_lost_part_is_named():
    """No verdict for part 4."""
    account = check(PARTS, history()[:4])
    assert account.breaches == [f"lost: part 4 of {KEY} has no verdict"]


def test_a_lost_part_in_the_middle_is_a_gap_as_well():
    """The sequence of its worker tells of it."""
    account = check(PARTS, [told(number) for number in (0, 1, 3, 4)])
    assert account.rules() == {"lost", "gap"}


def test_a_lost_beginning_is_a_gap():
    """A worker's sequence starts at 1."""
    assert check(PARTS[2:], history()[2:]).rules() == {"gap"}


def test_a_second_verdict_under_another_id_is_found():
    """Dedupe by source and id does not see that it is the same part."""
    assert check(PARTS, [*history(), told(2, id="another", sequence=6)]).rules() == {"doubled", "order"}
    assert check(PARTS, [*history(), told(4, id="another", sequence=6)]).rules() == {"doubled"}


def test_the_same_id_from_another_source_is_another_event():
    """Only source and id together make a repeat."""
    assert check(PARTS, [*history(), told(4, source="/other/area/line")]).rules() == {"doubled"}


def test_two_parts_under_one_id_are_found():
    """The dedupe would drop a part."""
    account = check(PARTS, history(told(3, id="id-2")))
    assert account.rules() == {"lost", "shared id"}


def test_a_verdict_of_no_part_is_found():
    """Nobody triggered part 9."""
    assert check(PARTS, [*history(), told(9, sequence=6)]).rules() == {"invented"}


def test_the_order_of_first_appearance_counts():
    """Part 2 before part 1; a repeat of an early one later is none."""
    swapped = [told(number) for number in (0, 2, 1, 3, 4)]
    assert "order" in check(PARTS, swapped).rules()
    assert check(PARTS, [*history(), told(0)]).breaches == []


def test_keys_have_orders_of_their_own():
    """Parts of another station may come at any time."""
    other = [Part("line/other", 10, scores=(1.0,))]
    verdicts = [told(10, key="line/other", sequence=1), *history()]
    assert check([*PARTS, *other], verdicts).breaches == []


@pytest.mark.parametrize(
    "changes",
    [
        {"views": ()},
        {"lacks_view": True},
        {"views": (GOOD, View("UNINSPECTED", None, 2.0))},
        {"views": (View("OK", None, 2.0),)},
        {"views": (View("OK", float("nan"), 2.0),)},
        {"views": (View("OK", 2.0, 2.0),)},
        {"views": (View("OK", 1.0, None),)},
        {"views": (View("OK", 1.3, 2.0),)},
    ],
    ids=["no view", "view missing", "view not judged", "no score", "nan", "at the limit", "no limit", "other picture"],
)
def test_an_ok_that_was_not_judged_is_found(changes):
    """An OK stands on a finite score of the part's own picture below the limit, for every view."""
    assert check(PARTS, history(told(2, **changes))).rules() == {"unfounded OK"}


def test_an_unfounded_ok_is_found_among_repeats_as_well():
    """A consumer that keeps the last word would believe it."""
    assert check(PARTS, [*history(), told(2, views=())]).rules() == {"unfounded OK"}


def test_an_ok_while_nothing_could_be_judged_is_found():
    """Triggered and decided between 101.9 and 102.6: part 2; one that was decided later is none."""
    assert check(PARTS, history(), dark=[(101.9, 102.6)]).breaches == [
        f"unfounded OK: part 2 of {KEY} was triggered and decided while nothing could be judged"
    ]
    assert check(PARTS, history(), dark=[(101.9, 102.4)]).breaches == []


def test_a_verdict_other_than_the_worker_said_is_found():
    """It said NG, and was sure of it; the consumer's first word on the part is another."""
    words = {(KEY, 2): "NG", (KEY, 3): "OK", (KEY, 9): "NG"}
    account = check(PARTS, history(), words=words)
    assert account.breaches == [f"changed: the worker said NG of part 2 of {KEY}, not OK"]
    assert check(PARTS, [*history(told(2, verdict="NG")), told(2, verdict="UNINSPECTED")], words=words).breaches == []


def test_what_was_in_a_killed_workers_memory_may_be_missing():
    """It is counted apart, and keeps the other rules where it comes after all."""
    parts = [*PARTS[:3], replace(PARTS[3], certain=False), replace(PARTS[4], certain=False)]
    account = check(parts, history()[:3])
    assert (account.breaches, account.uncertain_without) == ([], 2)
    assert check(parts, history(told(4, views=()))).rules() == {"unfounded OK"}


def test_an_uninspected_part_needs_no_picture():
    """It says that it was not judged."""
    assert check(PARTS, history(told(2, verdict="UNINSPECTED", views=(), lacks_view=True))).breaches == []
