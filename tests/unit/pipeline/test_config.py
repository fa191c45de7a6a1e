"""The line file: what is refused, and in which words."""

import json
import re
from pathlib import Path

import pytest
import yaml

from pipeline import config
from pipeline.errors import ConfigError

CAMERA = {"id": "c1", "type": "folder", "product": "tray", "path": "pictures"}
GENICAM = {"id": "c1", "type": "genicam", "product": "tray"}
USB = {"id": "c1", "type": "usb", "product": "tray", "device": 0}


def station_of(*views):
    return {"name": "station-1", "views": list(views)}


RTSP = {"id": "c1", "type": "rtsp", "product": "tray", "url": "rtsp://127.0.0.1:8554/c1"}
GRAPH = RTSP | {"decoder": "deepstream", "inference": "graph"}
REGION = {"picture_size": [640, 480], "crop": [0, 0, 64, 64]}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"bugdet_ms": 5}, ["bugdet_ms: unknown key", "`budget_ms`"]),
        ({"kafka": {"bootstap": ["a:1"]}}, ["kafka.bootstap: unknown key", "`bootstrap`"]),
        ({"kafka": {"sasl": {"usernam": "a"}}}, ["kafka.sasl.usernam: unknown key", "`username`"]),
        (
            {"kafka": {"sasl": {"username": "a", "password": "b"}}},
            ["kafka.sasl.password: unknown key", "`password_file`"],
        ),
        (
            {"kafka": {"sasl": {"username": "a", "password_file": "p", "mechanism": "PLAIN"}}},
            ["kafka:", "set `tls`"],
        ),
        ({"kafka": {"tls": {"key_file": "a"}}}, ["kafka.tls:", "go together"]),
        ({"kafka": {"required_at_start": False}, "pool": {}}, ["required_at_start", "a worker with a `pool`"]),
        ({"kafka": {"required_at_start": False}, "outbox": {"dir": None}}, ["required_at_start", "`outbox.dir`"]),
        (
            {"kafka": {"required_at_start": False}, "stations": [station_of() | {"trigger": "message"}]},
            ["required_at_start", "station-1", "`trigger: message`"],
        ),
        ({"kafka": {"tls": {"verify": False}}}, ["kafka.tls.verify: unknown key"]),
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
        ({"cameras": [GENICAM | {"exposre_us": 5}]}, ["cameras[0].exposre_us: unknown key", "`exposure_us`"]),
        ({"cameras": [GENICAM | {"trigger": "Software"}]}, ["cameras[0].trigger:", "software"]),
        ({"cameras": [GENICAM | {"trigger": "software"}]}, ["cameras[0]", "needs `rate`"]),
        ({"cameras": [GENICAM | {"packet_size": "big"}]}, ["cameras[0].packet_size"]),
        ({"cameras": [USB | {"device": "video0"}]}, ["cameras[0].device:"]),
        ({"cameras": [RTSP | {"inference": "graph"}]}, ["cameras[0]:", "`decoder: deepstream`"]),
        ({"cameras": [GRAPH | {"region": REGION}]}, ["cameras[0]:", "`region`", "whole pictures"]),
        ({"cameras": [GRAPH | {"frozen_after_s": 2}]}, ["cameras[0]:", "`frozen_after_s`", "on the GPU"]),
        ({"cameras": [GRAPH | {"overflow": "wait"}]}, ["cameras[0]:", "`overflow`", "a queue of its own"]),
        ({"cameras": [GRAPH, RTSP | {"id": "c2"}]}, ["'c2'", "'tray'", "cannot share a threshold"]),
        (
            {
                "cameras": [GRAPH, RTSP | {"id": "c2", "product": "cup", "station": "s2"}],
                "stations": [{"name": "s2", "views": [{"camera": "c2", "product": "tray"}]}],
            },
            ["s2: the view of camera 'c2'", "'tray'", "cannot share a threshold"],
        ),
        (
            {
                "cameras": [GRAPH, RTSP | {"id": "c2", "product": "cup", "station": "s2"}],
                "stations": [{"name": "s2", "trigger": "message", "recipes": ["tray"]}],
            },
            ["s2: what a trigger names", "'tray'", "cannot share a threshold"],
        ),
        ({"cameras": [GRAPH], "pool": {}}, ["pool:", "no cameras with `inference: graph`"]),
        (
            {"cameras": [GRAPH], "triton": {"address": ["a:1", "b:1"]}},
            ["triton: DeepStream asks one server", "one address"],
        ),
        ({"cameras": [GRAPH], "triton": {"address": "a:1", "tls": {}}}, ["triton:", "no `tls`"]),
        (
            {"cameras": [GRAPH], "stations": [station_of() | {"trigger": "message"}]},
            ["stations: station-1", "`trigger: message` is not for camera", "`inference: graph`"],
        ),
        ({"cameras": [GRAPH], "stations": [station_of() | {"trigger": "counter"}]}, ["`trigger: counter`"]),
        (
            {"cameras": [GRAPH], "stations": [station_of({"camera": GRAPH["id"], "product": "cup"})]},
            ["stations: station-1", "'cup'", "'tray'", "one product"],
        ),
        ({"cameras": []}, ["cameras:"]),
        ({"cameras": [CAMERA, CAMERA]}, ["two cameras are called 'c1'"]),
        ({"evidence": True}, ["evidence:", "dictionary"]),
        ({"monitoring": {"host": "everywhere"}}, ["monitoring.host:", "everywhere"]),
        ({"triton": {"address": "triton"}}, ["triton.address:", "'triton' is not `host:port`"]),
        ({"triton": {"address": ["a:1", "dns:///triton:8001"]}}, ["triton.address:", "'dns:///triton:8001'"]),
        ({"triton": {"address": "a:70000"}}, ["triton.address:", "'a:70000'"]),
        ({"triton": {"address": []}}, ["triton.address:", "at least one"]),
        ({"stations": [{"name": "station-1", "triger": "counter"}]}, ["stations[0].triger: unknown key", "`trigger`"]),
        ({"stations": [station_of({"camera": "c1", "need": True})]}, ["stations[0].views[0].need: unknown key"]),
        ({"stations": [{"name": "station-1", "trigger": "plc"}]}, ["stations[0].trigger:", "counter"]),
        ({"stations": [{"name": "nowhere"}]}, ["nowhere: no camera has this station"]),
        ({"stations": [station_of({"camera": "c9"})]}, ["no camera 'c9' has this station"]),
        ({"stations": [station_of({"camera": "c1"}, {"camera": "c1"})]}, ["listed twice"]),
        ({"stations": [station_of(), station_of()]}, ["two stations have the same name"]),
        (
            {"cameras": [CAMERA, CAMERA | {"id": "c2"}], "stations": [station_of({"camera": "c1"})]},
            ["camera 'c2' is not in `views`"],
        ),
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


@pytest.mark.parametrize(
    ("value", "addresses"),
    [
        ("triton:8001", ["triton:8001"]),
        ("[::1]:8001", ["[::1]:8001"]),
        (["a:1", "b:1", "a:1"], ["a:1", "b:1"]),
    ],
)
def test_triton_has_one_address_or_a_list(line_file, monkeypatch, value, addresses):
    """A word is one address and a list is several, each once; in the environment as in the file."""
    assert config.load(line_file(triton={"address": value})).triton.addresses == addresses
    monkeypatch.setenv("LOGICRD_TRITON__ADDRESS", value if isinstance(value, str) else json.dumps(value))
    assert config.load(line_file()).triton.addresses == addresses


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


def test_a_triggered_station_without_views_has_all_of_its_cameras(line_file):
    """Each of them required; in free run nothing is added, for there each frame is a part."""
    cameras = [CAMERA, CAMERA | {"id": "c2"}, CAMERA | {"id": "c3", "station": "other"}]
    for trigger, expected in [("message", ["c1", "c2"]), ("counter", ["c1", "c2"]), ("free_run", [])]:
        loaded = config.load(line_file(cameras=cameras, stations=[{"name": "station-1", "trigger": trigger}]))
        views = loaded.station_plans["station-1"].views
        assert [(view.camera, view.required) for view in views] == [(camera, True) for camera in expected]


def test_every_product_that_a_part_may_have_is_known_before_the_start(line_file):
    """Those of the cameras, of views with a product of their own, and the recipes of triggers, each once."""
    station = {"name": "station-1", "trigger": "message", "recipes": ["lid", "tray"]}
    station["views"] = [{"camera": "c1"}, {"camera": "c2", "product": "cap"}]
    loaded = config.load(line_file(cameras=[CAMERA, CAMERA | {"id": "c2"}], stations=[station]))
    assert loaded.products == ["tray", "cap", "lid"]


def test_a_triggered_camera_never_drops_unless_told_to(line_file):
    """A free running camera gives up its oldest frame, a triggered one none; what the file says holds."""
    blocks = [
        GENICAM,
        GENICAM | {"id": "c2", "trigger": "Line0"},
        GENICAM | {"id": "c3", "trigger": "Line1", "overflow": "drop_late"},
        USB | {"id": "c4"},
    ]
    cameras = config.load(line_file(cameras=blocks)).cameras
    assert [camera.overflow for camera in cameras] == ["drop_oldest", "wait", "drop_late", "drop_oldest"]
    assert cameras[3].device == "/dev/video0"


@pytest.mark.parametrize(
    ("station", "words"),
    [
        ({"views": [{"camera": "p1"}, {"camera": "p2"}]}, None),
        ({"views": [{"camera": "p1"}], "trigger": "counter"}, None),
        ({"views": [{"camera": "p1"}], "trigger": "message"}, "is not for cameras of a pool"),
        ({"trigger": "counter"}, "name those of the pool in `views`"),
        ({"views": [{"camera": "p1"}, {"camera": "p1"}]}, "listed twice"),
    ],
)
def test_a_station_may_have_cameras_of_the_pool(line_file, station, words):
    """They are known by name only; what needs all cameras of a station in one file is refused."""
    path = line_file(cameras=[], pool={}, stations=[{"name": "s1", **station}])
    if words is None:
        assert config.load(path).station_plans["s1"].views
    else:
        with pytest.raises(ConfigError, match=words):
            config.load(path)


def test_a_line_may_have_products_of_a_graph_and_of_the_line(line_file):
    """Each product is one or the other; stations in `free_run` fuse views of both."""
    cameras = [GRAPH, GRAPH | {"id": "c2"}, CAMERA | {"id": "c3", "product": "cup"}]
    views = [{"camera": camera["id"]} for camera in cameras]
    settings = config.load(line_file(cameras=cameras, stations=[station_of(*views)]))
    assert settings.graph_products == ["tray"]
