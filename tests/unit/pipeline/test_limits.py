"""Threshold records: which one is older, what a rollback finds, and how records travel in a file."""

from __future__ import annotations

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipeline import limits
from pipeline.errors import CheckError, ConfigError
from pipeline.limits import Change, of_model, parse, plan, to_document, to_roll_back_to

SHA, OTHER_SHA = "ab" * 32, "cd" * 32
EARLY, LATE = "2026-11-20T10:00:00.000+00:00", "2026-11-21T10:00:00.000+00:00"


def record(version="7", ng="3.5", review="2.5", sha=SHA, at=EARLY, **more):
    return {"ng": ng, "review": review, "version": version, "model_sha256": sha, "updated_at": at, **more}


@pytest.mark.parametrize(
    ("found", "known", "older"),
    [
        (record("6", at=EARLY), record("7", at=LATE), True),
        (record("6", at=LATE), record("7", at=EARLY), False),
        (record("6", at=EARLY), record("7", at=EARLY), True),
        (record("8", at=EARLY), record("7", at=LATE), False),
        (record("7", at=EARLY, ng="4"), record("7", at=LATE), False),
        (record("6", at="yesterday"), record("7", at=LATE), True),
        (record("6", at="2026-11-21T10:00:00"), record("7", at=LATE), True),
        (record("6", at=EARLY), record("7", at=""), False),
        (record("6", at="2026-11-21T11:30:00+01:00"), record("7", at=LATE), False),
    ],
    ids=[
        *("restored", "set-after-restoring", "same-time", "newer", "same-version", "no-time", "no-zone"),
        *("known-without-time", "other-zone"),
    ],
)
def test_what_is_from_before_is_known_as_such(found, known, older):
    """A lower version is older unless it was set later; where the known one tells no time, Redis is believed."""
    assert limits.is_older(parse(found), parse(known)) is older


def test_a_rollback_finds_the_version_before(make_manifest):
    """The version before the one in force, or the one asked for; proposals and nonsense are passed over."""
    history = [
        record("9", "9.0"),
        {"action": "proposed", "ng": "1", "review": "1"},
        record("8", "nan"),
        record("7", "7.0"),
        record("5", "5.0"),
    ]
    find = lambda current, version=None: to_roll_back_to(history, current, version, make_manifest()).ng  # noqa: E731
    assert find("9") == 7.0
    assert find("9", 5) == 5.0
    assert find("7") == 5.0
    assert find("0") == find("text") == find(str(2**70)) == 9.0
    for current, version in (("5", None), ("9", 6), ("9", 8)):
        with pytest.raises(ConfigError, match="history"):
            find(current, version)
    with pytest.raises(ConfigError, match="another model"):
        to_roll_back_to([record("9"), record("8", sha=OTHER_SHA)], "9", None, make_manifest())
    between = [record("9"), record("8", sha=OTHER_SHA), record("7", "7.0")]
    assert to_roll_back_to(between, "9", None, make_manifest()).ng == 7.0


@pytest.mark.parametrize(
    ("products", "own", "counts"),
    [
        (record("3"), {}, "products"),
        (record("3"), record("5"), "own"),
        (record("7"), record("5"), "products"),
        (record("7", sha=OTHER_SHA), record("5"), "own"),
        (record("7", sha=OTHER_SHA), {}, "products"),
        ({}, record("5"), "own"),
        ({}, {}, "products"),
        (record("-3"), record("5"), "own"),
        (record("3"), record("5", sha=OTHER_SHA), "products"),
    ],
)
def test_the_later_record_of_a_network_counts(products, own, counts):
    """Limits that were set before a promotion hold until others are set; those of another network never do."""
    assert of_model(products, own, SHA) is (own if counts == "own" else products)


words = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=20)


@given(st.floats(-1e9, 1e9), st.floats(-1e9, 1e9), st.integers(1, 10**14 - 1), words, st.sampled_from(["yaml", "json"]))
def test_an_export_imported_again_changes_nothing(make_manifest, one, other, version, reason, kind):
    """Over all limits and words, in YAML and in JSON: what comes back is what went out, so that nothing differs."""
    review, ng = sorted((one, other))
    fields = record(str(version), repr(ng), repr(review), reason=reason, updated_by=reason)
    document = to_document({"tray": fields})
    text = yaml.safe_dump(document, allow_unicode=True) if kind == "yaml" else json.dumps(document, ensure_ascii=False)
    assert plan(yaml.safe_load(text), "file", {"tray": fields}, {"tray": make_manifest()}) == []


@pytest.mark.parametrize(
    ("held", "entry", "expected"),
    [
        ({}, {"ng": 4.0, "review": 3.0}, ("0", 0)),
        ({}, {"ng": 4.0, "review": 3.0, "version": 9}, ("0", 9)),
        (record("7"), {"ng": 4.0, "review": 3.0, "version": 7}, ("7", 7)),
        (record("7"), {"ng": 3.5, "review": 2.5, "version": 9}, ("7", 9)),
        (record("7", sha=OTHER_SHA), {"ng": 3.5, "review": 2.5, "version": 7, "model_sha256": SHA}, ("7", 7)),
        (record("text"), {"ng": 3.5, "review": 2.5}, ("text", 0)),
    ],
    ids=["new", "lost", "edited", "restored-too-old", "of-another-model", "spoilt"],
)
def test_an_import_is_founded_on_what_was_read(make_manifest, held, entry, expected):
    """Each change names the version that Redis had, and ends above that of the file."""
    document = {"schema_version": 1, "thresholds": {"tray": entry}}
    (change,) = plan(document, "file", {"tray": held}, {"tray": make_manifest()})
    assert (change.expected, change.floor) == expected
    assert change == Change("tray", entry["ng"], entry["review"], SHA, "", *expected)


@pytest.mark.parametrize(
    ("document", "told"),
    [
        (None, "file"),
        ([], "file"),
        ({"schema_version": 2, "thresholds": {}}, "schema_version"),
        ({"schema_version": 1, "thresholds": {"tray": {"ng": float("nan"), "review": 1}}}, "thresholds.tray.ng"),
        ({"schema_version": 1, "thresholds": {"tray": {"ng": 1, "review": 2}}}, "`review` lies above `ng`"),
        ({"schema_version": 1, "thresholds": {"tray": {"ng": 2, "review": 1, "nG": 1}}}, "thresholds.tray.nG"),
        ({"schema_version": 1, "thresholds": {"tray": {"ng": 2, "review": 1, "version": -1}}}, "version"),
        ({"schema_version": 1, "thresholds": {"Tray:history": {"ng": 2, "review": 1}}}, "thresholds.Tray"),
        ({"schema_version": 1, "thresholds": {"tray": {"ng": 2, "review": 1, "model_sha256": OTHER_SHA}}}, "another"),
    ],
)
def test_a_wrong_file_is_refused_with_its_place(make_manifest, document, told):
    """Nothing of a file is believed: what is wrong in it is named, and nothing is planned."""
    with pytest.raises(ConfigError, match=told):
        plan(document, "file", {"tray": record()}, {"tray": make_manifest()})


def test_an_import_never_undoes_a_later_change(make_manifest):
    """A file from before somebody's change is refused as such."""
    document = {"schema_version": 1, "thresholds": {"tray": {"ng": 9.0, "review": 1.0, "version": 6}}}
    with pytest.raises(CheckError, match="version 6, Redis has version 7"):
        plan(document, "file", {"tray": record("7")}, {"tray": make_manifest()})


@pytest.mark.parametrize(
    ("author", "reason"),
    [("", ""), ("  ", ""), ("a" * 129, ""), ("a\nb", ""), ("\ud800", ""), ("a", "b\n"), ("a", "\x1b")],
)
def test_words_that_would_spoil_a_table_are_refused(author, reason):
    """An author is a name and a reason one line: no control characters, nothing that cannot be written as UTF-8."""
    with pytest.raises(ConfigError):
        limits.check_words(author, reason)
    limits.check_words("Ännä Müller-Lüdenscheidt", "größer als früher: ok")
