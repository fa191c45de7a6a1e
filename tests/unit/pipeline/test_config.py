"""The line file: what is refused, and in which words."""

import re
from pathlib import Path

import pytest
import yaml

from pipeline import config
from pipeline.errors import ConfigError

CAMERA = {"id": "c1", "type": "folder", "product": "tray", "path": "pictures"}
RTSP = {"id": "c1", "type": "rtsp", "product": "tray", "url": "rtsp://127.0.0.1:8554/c1"}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"bugdet_ms": 5}, ["bugdet_ms: unknown key", "`budget_ms`"]),
        ({"kafka": {"bootstap": ["a:1"]}}, ["kafka.bootstap: unknown key", "`bootstrap`"]),
        ({"cameras": [CAMERA | {"ovrflow": "wait"}]}, ["cameras[0].ovrflow: unknown key", "`overflow`"]),
        ({"cameras": [RTSP | {"pasword_file": "x"}]}, ["cameras[0].pasword_file: unknown key", "`password_file`"]),
        ({"zzz": 1}, ["zzz: unknown key"]),
        ({"video": "a.mp4"}, ["video: unknown key"]),
        ({"cameras": [CAMERA | {"folder": "pictures"}]}, ["cameras[0].folder: unknown key"]),
        ({"_env_file": "x"}, ["_env_file: unknown key"]),
        ({"budget_ms": "fast"}, ["budget_ms:", "number"]),
        ({"budget_ms": float("nan")}, ["budget_ms:", "finite"]),
        ({"cameras": [CAMERA | {"queue_frames": "many"}]}, ["cameras[0].queue_frames:", "integer"]),
        ({"cameras": [CAMERA | {"product": "Tray 1"}]}, ["cameras[0].product:"]),
        ({"cameras": [CAMERA | {"type": "rtps"}]}, ["cameras[0]:", "rtps", "rtsp", "video", "folder"]),
        ({"cameras": []}, ["cameras:"]),
        ({"cameras": [CAMERA, CAMERA]}, ["two cameras are called 'c1'"]),
        ({"evidence": True}, ["evidence:", "dictionary"]),
        ({"monitoring": {"host": "everywhere"}}, ["monitoring.host:", "everywhere"]),
    ],
)
def test_a_wrong_entry_is_refused_with_its_place(line_file, keys, words):
    """A wrong entry of the file is a ConfigError that says where it stands and what was meant."""
    with pytest.raises(ConfigError) as caught:
        config.load(line_file(**keys))
    assert all(word in str(caught.value) for word in ["line.yaml", *words])


def test_every_fault_is_told_at_once(line_file):
    """A file with three faults is refused with three lines."""
    with pytest.raises(ConfigError) as caught:
        config.load(line_file(budget_ms="x", bugdet_ms=1, cameras=[CAMERA | {"queue_frames": 0}]))
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize("text", ["[1, 2]", "", "a: [\n", "\x00", "5", "1: 2"])
def test_what_is_no_mapping_of_words_is_refused(tmp_path, text):
    """A file that is not a YAML mapping of words is a ConfigError that names it."""
    path = tmp_path / "line.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"line\.yaml"):
        config.load(path)


def test_a_missing_file_is_refused(tmp_path):
    """A line file that is not there is named."""
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        config.load(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("place", "keys"),
    [
        ("cameras[0].url", {"cameras": [RTSP | {"url": "rtsp://eve:s3cret@127.0.0.1/c1"}]}),
        ("redis.url", {"redis": {"url": "redis://eve:s3cret@127.0.0.1:6379/0"}}),
    ],
)
def test_credentials_in_an_address_are_refused_and_not_repeated(line_file, place, keys):
    """An address with a password in it is refused, and the message does not spread the password."""
    with pytest.raises(ConfigError) as caught:
        config.load(line_file(**keys))
    text = str(caught.value) + caught.value.hint
    assert place in text
    assert "password_file" in text
    assert "s3cret" not in text


def test_a_password_reaches_the_decoder_and_nothing_else(line_file, tmp_path):
    """The password is read from its file, escaped into the address, and absent from what the line file shows."""
    (tmp_path / "secret").write_text("p@ss/1\n")
    settings = config.load(line_file(cameras=[RTSP | {"user": "eve", "password_file": "secret"}]))
    assert settings.cameras[0].address() == "rtsp://eve:p%40ss%2F1@127.0.0.1:8554/c1"
    assert "p@ss" not in settings.model_dump_json()


def test_a_missing_secret_file_is_named(line_file, tmp_path):
    """A secret that cannot be read is refused with its file, as soon as the line file is read."""
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path / "secret"))):
        config.load(line_file(cameras=[RTSP | {"user": "eve", "password_file": "secret"}]))


def test_the_environment_stands_above_the_file(line_file, monkeypatch):
    """A variable of the environment overrides the file, two underscores a level, and leaves the rest of its block."""
    monkeypatch.setenv("LOGICRD_BUDGET_MS", "500")
    monkeypatch.setenv("LOGICRD_KAFKA__BOOTSTRAP", '["broker:9092"]')
    settings = config.load(line_file(budget_ms=1000))
    assert settings.budget_ms == 500
    assert settings.kafka.bootstrap == ["broker:9092"]
    assert settings.kafka.startup_timeout_s == 0.01


@pytest.mark.parametrize("value", ["broker:9092", "{", ""])
def test_an_unreadable_variable_is_a_fault_of_configuration(line_file, monkeypatch, value):
    """A variable whose value cannot be read is a ConfigError that names it, not a fault of ours."""
    monkeypatch.setenv("LOGICRD_KAFKA__BOOTSTRAP", value)
    with pytest.raises(ConfigError, match=r"(?i)kafka"):
        config.load(line_file())


def test_paths_are_relative_to_the_file(line_file, tmp_path):
    """Relative paths of the file start at its folder; absolute ones stay."""
    settings = config.load(line_file(evidence={"dir": "kept"}, redis={"snapshot": "/var/limits.json"}))
    assert settings.cameras[0].path == tmp_path / "pictures"
    assert settings.triton.models_repo == tmp_path / "models_repo"
    assert settings.evidence.dir == tmp_path / "kept"
    assert settings.redis.snapshot == Path("/var/limits.json")


def test_a_worker_of_a_pool_needs_no_cameras_of_its_own(line_file, tmp_path):
    """With `pool` the list may be missing; without it there is nothing to read."""
    assert config.load(line_file(cameras=[], pool={"root": "pool"})).pool.root == tmp_path / "pool"
    assert config.load(line_file(cameras=[], pool={})).pool.root == tmp_path
    with pytest.raises(ConfigError, match="list at least one, or let this worker read a `pool`"):
        config.load(line_file(cameras=[]))


def test_a_shown_line_file_reads_back_equal(line_file, tmp_path):
    """What `config show` prints is a line file that means the same."""
    settings = config.load(line_file(cameras=[CAMERA | {"picture_size": [640, 480]}, RTSP | {"id": "c2"}]))
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    assert config.load(again) == settings


def test_files_wait_and_live_cameras_drop(line_file):
    """What cannot be read again drops its oldest frame; what can be read at any pace waits."""
    settings = config.load(line_file(cameras=[CAMERA, RTSP | {"id": "c2"}, CAMERA | {"id": "c3", "type": "video"}]))
    assert [camera.overflow for camera in settings.cameras] == ["wait", "drop_oldest", "wait"]
    assert settings.products == ["tray"]
