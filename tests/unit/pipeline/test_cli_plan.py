"""`logicrd plan`: from figures on disk to an answer, and what it says when there are none."""

import json

import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.errors import ConfigError

MEASURED = {
    "machine": {"cores": 2, "cpu": "test"},
    "product": "tray",
    "image": [256, 256, 3],
    "ensemble": {"batch1_in_flight2": {"images_per_s": 40.0}, "batch8_in_flight2": {"images_per_s": 50.0}},
}


def ask(*arguments: str) -> dict:
    """The command's document; errors come as they are raised."""
    done = CliRunner().invoke(app, ["plan", *arguments, "--json"], catch_exceptions=False, standalone_mode=False)
    return json.loads(done.stdout)


@pytest.fixture
def bench(tmp_path):
    """A file as `bench serving --json` writes it."""
    path = tmp_path / "serving.json"
    path.write_text(json.dumps(MEASURED))
    return path


def test_answers_from_measured_figures(bench, tmp_path):
    """64 cameras at 1 a second on replicas of 50 images/s: two, one spare; 64 x 196608 bytes a second to Triton."""
    ingest = tmp_path / "ingest.json"
    ingest.write_text(json.dumps({"logicrd": {"cpu_ms_per_frame": 8.0}}))
    document = ask("--cameras", "64", "--bench", str(bench), "--ingest", str(ingest))
    assert document["triton_replicas"] == 2
    assert document["triton_replicas_with_one_lost"] == 3
    assert document["network_to_triton_mbps"] == pytest.approx(100.7)
    assert document["worker_cores"] == pytest.approx(0.6)
    assert document["wait_and_inference_p99_ms"] < 2000


def test_unmeasured_workers_are_not_guessed(bench):
    """Without the figures of ingest there is no number of cores."""
    assert ask("--cameras", "4", "--bench", str(bench))["worker_cores"] is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"ensemble": {}}'])
def test_other_files_are_refused_by_name(tmp_path, text):
    """What no bench printed is named, with the command that prints it."""
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"other\.json"):
        ask("--cameras", "4", "--bench", str(path))


def test_impossible_budget_is_a_sentence(bench):
    """A budget below one batch is a fault of the wish, not a crash."""
    with pytest.raises(ConfigError, match="budget of 50 ms"):
        ask("--cameras", "4", "--bench", str(bench), "--budget-ms", "50")
