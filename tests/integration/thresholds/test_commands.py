"""The commands `logicrd thresholds` on the real Redis."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import yaml
from exported import PRODUCT, tiny
from integration.thresholds.watched import MODELS, change, spoil
from line_process import LineProcess, received
from signers import make_keys

from pipeline import limits
from pipeline.cli_thresholds import threshold_doubts
from pipeline.manifest import read_manifest
from pipeline.model_repository import ModelRepository
from pipeline.threshold_store import KEY


def test_limits_travel_in_a_file(server, store_of, manifest):
    """An export imported on what it came from changes nothing; what a backup lost comes back above its own version."""
    product, anna = manifest.product, store_of("anna")
    anna.write([change(manifest, 7.5, 5.0, reason="ünïcode: yes")], author="Anna")
    anna.write([change(manifest, 8.5, 5.0)], author="Anna")
    document = yaml.safe_load(yaml.safe_dump(limits.to_document({product: anna.get(product)})))
    manifests = {product: manifest}
    assert limits.plan(document, "file", {product: anna.get(product)}, manifests) == []
    server.admin().delete(KEY + product, f"{KEY}{product}:history")
    (lost,) = limits.plan(document, "file", {product: anna.get(product)}, manifests)
    assert anna.write([lost], author="Anna", action="import")[0].version == 3
    assert anna.get(product)["ng"] == "8.5"


def test_the_commands_tell_the_story_of_a_limit(server, line_of, logicrd, answered, tmp_path):
    """Set, rolled back, exported, lost, imported: each step has an author and a version, and none is given twice."""
    path = line_of("anna")
    told = ("-c", path, "--author", "Anna", "--reason")
    answered("thresholds", "set", "cable-set", "--ng", "7.5", "--review", "5", *told, "first")
    answered("thresholds", "set", "cable-set", "--ng", "8.5", *told, "second")
    row = answered("thresholds", "rollback", "cable-set", *told, "overkill was better")["after"]
    assert (row["ng"], row["review"], row["version"]) == ("7.5", "5.0", "3")
    assert row["reason"] == "rollback to version 1: overkill was better"
    assert logicrd("thresholds", "export", "-c", path, "--out", tmp_path / "limits.yaml")[0] == 0
    again = ("thresholds", "import", tmp_path / "limits.yaml", "-c", path, "--author", "Ben")
    assert answered(*again)["changes"] == []
    server.admin().flushall()
    assert len(answered(*again, "--dry-run")["changes"]) == 1
    assert answered("thresholds", "get", "cable-set", "-c", path)["source"] == "manifest"
    assert answered(*again)["changes"][0]["version"] == "4"
    answered("thresholds", "set", "cable-set", "--ng", "9", *told, "third")
    code, _, err = logicrd(*again)
    assert (code, "version 3, Redis has version 5" in err) == (5, True)
    history = answered("thresholds", "history", "cable-set", "-c", path)
    assert [(each["version"], each["action"], each["updated_by"]) for each in history] == [
        ("5", "set", "Anna"),
        ("4", "import", "Ben"),
    ]


def test_the_commands_keep_the_two_person_rule(line_of, logicrd, answered):
    """`set` says that it only proposes and how to approve; the proposer is refused with exit 5, a second person not."""
    anna, ben, quinn = (line_of(user) for user in ("anna", "ben", "quinn"))
    code, _, err = logicrd("thresholds", "policy", "--one-person", "-c", anna)
    assert (code, "lacks a right" in err) == (4, True)
    rule = answered("thresholds", "policy", "--two-person", "--people", "users", "--expiry-h", "2", "-c", quinn)
    assert rule == {"approvals": 2, "expiry_s": 7200, "people": "users"}
    _, out, _ = logicrd("thresholds", "set", "cable-set", "--ng", "7.5", "--author", "Anna", "-c", anna)
    (waiting,) = answered("thresholds", "proposals", "-c", ben)
    assert f"logicrd thresholds approve cable-set {waiting['id']}" in out
    approve = ("thresholds", "approve", "cable-set", waiting["id"], "--author")
    assert logicrd(*approve, "Ben", "-c", anna)[0] == 5
    assert logicrd(*approve, "Anna", "-c", ben)[0] == 5
    row = answered(*approve, "Ben", "-c", ben)
    assert (row["ng"], row["updated_by"], row["approved_by"], row["version"]) == ("7.5", "Anna", "Ben", "1")
    assert answered("thresholds", "proposals", "-c", ben) == []


def test_a_record_that_is_not_used_is_shown_as_such(server, line_of, store_of, manifest, answered):
    """`get`, `list` and `check` say what a line would take, and why it is not what Redis holds."""
    path = line_of("anna")
    answered("thresholds", "set", "cable-set", "--ng", "7.5", "-c", path)
    spoil(server, f"{KEY}cable-set", {"ng": "nan"})
    (row,) = answered("thresholds", "list", "-c", path)
    assert (row["source"], row["version"]) == ("manifest", 0)
    assert "ng='nan'" in row["reason"]
    (doubt,) = threshold_doubts(store_of("line"), [manifest])
    assert "threshold of cable-set: not a threshold: ng='nan'" in doubt
    answered("thresholds", "rollback", "cable-set", "--to", "1", "-c", path)
    assert threshold_doubts(store_of("line"), [manifest]) == []
    assert answered("thresholds", "get", "cable-set", "-c", path)["ng"] == "7.5"


def test_the_commands_set_limits_of_a_version_that_is_not_served(line_of, logicrd, answered, tmp_path):
    """By the version's number, pushed or on trial; shown beside the served one's, and in force with its promotion."""
    tiny(tmp_path / "models", 3)
    repository = ModelRepository(tmp_path / "models", tmp_path / "models.versions")
    with repository.locked():
        repository.adopt(PRODUCT)
        repository.push(tiny(tmp_path / "export", 4))
    path = line_of("anna", triton={"models_repo": str(tmp_path / "models")}, product=PRODUCT)
    told = ("thresholds", "set", PRODUCT, "-c", path, "--ng")
    answered(*told, "7.5")
    row = answered(*told, "8.5", "--model-version", "4")["after"]
    assert (row["model_version"], row["ng"], row["version"]) == (4, "8.5", "2")
    shown = {row["model_version"]: row["ng"] for row in answered("thresholds", "list", "-c", path)}
    assert shown == {3: "7.5", 4: "8.5"}
    code, _, err = logicrd(*told, "9", "--model-version", "9")
    assert (code, "no version 9" in err) == (3, True)
    (repository.models / PRODUCT / "manifest.json").write_bytes(
        (repository.tree(PRODUCT, 4) / "manifest.json").read_bytes()
    )
    get = ("thresholds", "get", PRODUCT, "-c", path)
    assert (answered(*get)["ng"], answered(*get, "--model-version", "3")["ng"]) == ("8.5", "7.5")
    answered("thresholds", "set", PRODUCT, "-c", path, "--ng", "9", "--version", "2")
    back = answered("thresholds", "rollback", PRODUCT, "-c", path)["after"]
    assert (back["ng"], back["version"], answered(*get, "--model-version", "3")["ng"]) == ("8.5", "4", "7.5")


def test_a_proposal_is_of_the_version_for_which_it_was_made(line_of, answered, tmp_path):
    """Also where another one has been promoted since: it is listed so, and approved for that one alone."""
    models = tmp_path / "models"
    tiny(models, 3)
    repository = ModelRepository(models, tmp_path / "models.versions")
    with repository.locked():
        repository.adopt(PRODUCT)
        repository.push(tiny(tmp_path / "export", 4))
    anna, ben, quinn = (
        line_of(user, triton={"models_repo": str(models)}, product=PRODUCT) for user in ("anna", "ben", "quinn")
    )
    answered("thresholds", "policy", "--two-person", "-c", quinn)
    answered("thresholds", "set", PRODUCT, "--ng", "7.5", "--author", "Anna", "-c", anna)
    answered("thresholds", "set", PRODUCT, "--ng", "8.5", "--author", "Anna", "--model-version", "4", "-c", anna)
    (models / PRODUCT / "manifest.json").write_bytes((repository.tree(PRODUCT, 4) / "manifest.json").read_bytes())
    waiting = {row["model_version"]: row for row in answered("thresholds", "proposals", "-c", ben)}
    assert {version: row["ng"] for version, row in waiting.items()} == {3: "7.5", 4: "8.5"}
    approve = ("thresholds", "approve", PRODUCT, "--author", "Ben", "-c", ben)
    answered(*approve, waiting[3]["id"], "--model-version", "3")
    answered(*approve, waiting[4]["id"])
    shown = {row["model_version"]: row["ng"] for row in answered("thresholds", "list", "-c", ben)}
    assert shown == {3: "7.5", 4: "8.5"}


def test_no_limits_are_set_for_a_version_that_no_worker_takes(line_of, logicrd, answered, tmp_path):
    """Where the line names a signer and what is promoted has no signature, `set`, `suggest` and `import` say so instead
    of an OK; the limits of the version that workers go on with can be set by its number."""
    repository = ModelRepository(tmp_path / "models", tmp_path / "models.versions")
    repository.models.mkdir()
    with repository.locked():
        repository.push(tiny(tmp_path / "export", 4))
    tiny(repository.models, 5)
    triton = {"models_repo": str(repository.models), "signer_file": str(make_keys(tmp_path, "site")[1])}
    path = line_of("anna", triton=triton, product=PRODUCT)
    file = tmp_path / "limits.yaml"
    file.write_text(f"schema_version: 1\nthresholds: {{{PRODUCT}: {{ng: 8, review: 8}}}}\n")
    for told in (("set", PRODUCT, "--ng", "8"), ("suggest", PRODUCT), ("import", file)):
        code, _, err = logicrd("thresholds", *told, "-c", path)
        assert (code, "not signed" in err) == (3, True), told
    answered("thresholds", "set", PRODUCT, "--ng", "8", "--model-version", "4", "-c", path)


@pytest.mark.stack
def test_a_preview_and_a_suggestion_know_the_parts_of_the_past(stack, line_file, answered, tmp_path):
    """Of parts that a real line judged: `--dry-run` names exactly those that flip, `suggest` takes their scores."""
    made = line_file(stack)
    rng = np.random.default_rng(3)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(16):
        grain = rng.integers(0, 255, (4 + number, 16, 3), dtype=np.uint8)
        cv2.imwrite(str(pictures / f"part-{number:02}.png"), cv2.resize(grain, (256, 256)))
    path = made.camera(type="folder", path=str(pictures), product="cable-set").write()
    with LineProcess(path) as line:
        line.wait()
    events = received(stack.endpoints["kafka"], made.name, at_least=16).events
    scores = {event["data"]["partId"]: event["data"]["views"][0]["scores"]["fused"] for event in events}
    ordered = sorted(scores.values())
    middle = (ordered[9] + ordered[10]) / 2
    found = answered("thresholds", "set", "cable-set", "--ng", middle, "--dry-run", "-c", path)
    own = read_manifest(MODELS, "cable-set").calibration.thresholds

    def said(score, ng, review):
        return "NG" if score >= ng else "REVIEW" if score >= review else "OK"

    flips = {part: (said(score, own.ng, own.review), said(score, middle, middle)) for part, score in scores.items()}
    expected = {part: pair for part, pair in flips.items() if pair[0] != pair[1]}
    assert {flip["part_id"]: (flip["before"], flip["after"]) for flip in found["flips"]} == expected
    assert (found["parts"], found["flipped"], found["incomparable"]) == (16, len(expected), 0)
    assert expected
    assert answered("thresholds", "get", "cable-set", "-c", path)["source"] == "manifest"
    truth = [f"{part},{'good' if score < middle else 'bad'}" for part, score in scores.items()]
    (tmp_path / "truth.csv").write_text("\n".join(["partId,truth", *truth, "unknown-part,good"]))
    told = answered("thresholds", "suggest", "cable-set", "--reviewed", tmp_path / "truth.csv", "-c", path)
    assert (told["parts"], told["without_score"]) == (16, 1)
    assert ordered[9] < told["ng"] <= ordered[10]
    assert told["forecast"]["misses"]["count"] == 0
