"""Which parts a version on trial judges, and what is refused as a trial."""

import json

import pytest

from pipeline.errors import ConfigError
from pipeline.rollouts import Rollout, read_candidate, read_rollout

PARTS = [f"part-{number}" for number in range(2000)]


def rollout(**changes):
    words = {"mode": "canary", "version": 2, "model_sha256": "cd" * 32, "percent": 10.0, "at": "now", "by": "anna"}
    return Rollout.model_validate(words | changes)


def test_a_share_is_a_share_and_grows_by_addition():
    """Ten per cent of the parts are about that many, by their ids alone; with more, those stay among them."""
    tenth = {part for part in PARTS if rollout().takes(part)}
    assert 140 < len(tenth) < 260
    assert tenth == {part for part in PARTS if rollout().takes(part)}
    assert tenth < {part for part in PARTS if rollout(percent=50).takes(part)}
    assert all(rollout(percent=100).takes(part) for part in PARTS)
    assert rollout().takes("part-7") is rollout(mode="shadow", version=9).takes("part-7")


@pytest.mark.parametrize(
    "change", [{"percent": 0}, {"percent": 101}, {"percent": "nan"}, {"mode": "all"}, {"version": 0}]
)
def test_what_is_no_trial_is_refused_by_the_file(models_repo, change):
    """A file that makes no sense is named with what is wrong in it; no file is no trial."""
    assert read_rollout(models_repo, "tray") is None
    path = models_repo / "tray/rollout.json"
    path.write_text(json.dumps(rollout().model_dump() | change))
    with pytest.raises(ConfigError, match=rf"{path}: {next(iter(change))}"):
        read_rollout(models_repo, "tray")


def test_a_candidate_is_the_one_that_is_named(models_repo, manifest_document):
    """The manifest beside it has to be that of the version on trial."""
    path = models_repo / "tray/candidate.json"
    with pytest.raises(ConfigError, match="candidate"):
        read_candidate(models_repo, "tray", rollout())
    path.write_text(json.dumps(manifest_document("tray", version=2)))
    with pytest.raises(ConfigError, match="is not the manifest of version 2 of 'tray'"):
        read_candidate(models_repo, "tray", rollout())
    path.write_text(json.dumps(manifest_document("tray", version=2, model_sha256="cd" * 32)))
    assert read_candidate(models_repo, "tray", rollout()).version == 2
