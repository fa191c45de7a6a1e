"""The command `logicrd`: exit codes, and what goes to stdout."""

import json
import sys
from functools import partial
from pathlib import Path

import commands
import pytest

from pipeline import cli, deepstream


@pytest.fixture
def logicrd(monkeypatch, capsys):
    """Run the command, in this process, as a shell would; gives exit code, stdout and stderr."""
    return partial(commands.run, monkeypatch, capsys)


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["run", "--nonsense"],
        ["run", "--seconds", "0"],
        ["run", "--seconds", "soon"],
        ["run", "--log-level", "loud"],
        ["bench"],
        ["bench", "nonsense"],
        ["thresholds", "set"],
        ["thresholds", "approve", "tray"],
        ["thresholds", "suggest", "tray", "--false-alarms-per-hour", "1"],
        ["thresholds", "suggest", "tray", "--parts-per-hour", "nan"],
        ["thresholds", "policy", "--people", "everybody"],
        ["thresholds", "policy", "--two-person", "--expiry-h", "nan"],
        ["verdicts", "tail", "--verdict", "MAYBE"],
    ],
)
def test_wrong_usage_is_exit_2(logicrd, arguments):
    """What was typed wrong is named on stderr, with nothing on stdout, as exit 2."""
    code, out, err = logicrd(*arguments)
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    assert "rror" in err


@pytest.mark.parametrize(
    "command", [["run"], ["check"], ["config", "show"], ["cameras", "list"], ["thresholds", "list"]]
)
def test_a_wrong_line_file_is_exit_3(logicrd, line_file, command):
    """Every command that reads the line file refuses a wrong one with its place, and starts nothing."""
    code, out, err = logicrd(*command, "--config", line_file(bugdet_ms=5))
    assert (code, out) == (3, "")
    assert "bugdet_ms: unknown key; did you mean `budget_ms`?" in err


@pytest.mark.parametrize(
    "command", [["thresholds", "get"], ["thresholds", "set", "--ng", "1"], ["thresholds", "suggest"]]
)
def test_a_wrong_product_is_exit_3(logicrd, line_file, models_repo, command):
    """A product that the repository lacks is refused with those it has."""
    assert models_repo.is_dir()
    code, out, err = logicrd(*command, "trya", "--config", line_file())
    assert (code, out) == (3, "")
    assert "cable-set, tray" in err


def test_a_camera_of_a_wrong_product_is_exit_3(logicrd, line_file, models_repo):
    """A line file that names a product the repository lacks stops `run` before anything is started."""
    assert models_repo.is_dir()
    camera = {"id": "c1", "type": "folder", "product": "trya", "path": "x"}
    code, _, err = logicrd("run", "--config", line_file(cameras=[camera]))
    assert code == 3
    assert "'trya'" in err


@pytest.mark.parametrize(
    ("command", "server"),
    [
        (["run"], "Triton at 127.0.0.1:9"),
        (["check"], "Triton at 127.0.0.1:9"),
        (["thresholds", "get", "tray"], "Redis at redis://127.0.0.1:9/0"),
        (["thresholds", "set", "tray", "--ng", "1"], "Redis at redis://127.0.0.1:9/0"),
        (["thresholds", "history", "tray"], "Redis at redis://127.0.0.1:9/0"),
        (["thresholds", "rollback", "tray"], "Redis at redis://127.0.0.1:9/0"),
        (["thresholds", "set", "tray", "--ng", "1", "--dry-run"], "Redis at redis://127.0.0.1:9/0"),
        (["thresholds", "export"], "Redis at redis://127.0.0.1:9/0"),
        (["thresholds", "policy", "--two-person"], "Redis at redis://127.0.0.1:9/0"),
        (["thresholds", "proposals"], "Redis at redis://127.0.0.1:9/0"),
        (["thresholds", "approve", "tray", "0"], "Redis at redis://127.0.0.1:9/0"),
        (["verdicts", "tail"], "Kafka at 127.0.0.1:9"),
    ],
)
@pytest.mark.usefixtures("failed_start")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_server_that_is_not_there_is_exit_4(logicrd, line_file, models_repo, command, server):
    """A dependency that refuses is named with its address and what to do, within its time."""
    assert models_repo.is_dir()
    code, out, err = logicrd(*command, "--config", line_file())
    assert (code, out) == (4, ""), err
    assert server in err
    assert "hint:" in err


def test_a_machine_without_deepstream_is_exit_4_and_says_what_is_missing(logicrd, line_file, models_repo, monkeypatch):
    """`check` names the camera and the first thing that is missing, before it asks any server; without it, nothing."""
    assert models_repo.is_dir()
    camera = {"id": "c1", "type": "rtsp", "product": "tray", "url": "rtsp://127.0.0.1:9/x", "decoder": "deepstream"}
    monkeypatch.setattr(deepstream, "PYTHON", Path(sys.executable))  # which has none of it, GPU or not
    code, out, err = logicrd("check", "--config", line_file(cameras=[camera]))
    assert (code, out) == (4, ""), err
    assert "DeepStream cannot be used on this machine, and camera 'c1' asks for it: " in err
    assert any(name in err for name in ("libcuda.so.1", "CUDA error", "No module named"))
    assert "deploy/deepstream" in err
    assert deepstream.tried([]) == []


@pytest.mark.usefixtures("failed_start")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_json_is_one_document_on_stdout(logicrd, line_file, models_repo):
    """With `--json` stdout is one JSON document."""
    assert models_repo.is_dir()
    code, out, _ = logicrd("cameras", "list", "--json", "--config", line_file())
    assert code == 0
    assert [camera["id"] for camera in json.loads(out)] == ["c1"]
    code, out, _ = logicrd("thresholds", "suggest", "tray", "--json", "--config", line_file())
    assert code == 0
    assert json.loads(out)["ng"] == 3.0


def test_the_line_file_is_shown_as_understood(logicrd, line_file, tmp_path):
    """`config show` prints defaults and resolved paths as JSON."""
    code, out, _ = logicrd("config", "show", "--config", line_file())
    assert code == 0
    shown = json.loads(out)
    assert shown["cameras"][0]["path"] == str(tmp_path / "pictures")
    assert shown["batching"]["max_size"] == 8


def test_help_is_exit_0(logicrd):
    """Asking for help is no fault, and the answer is on stdout."""
    code, out, err = logicrd("--help")
    assert (code, err) == (0, "")
    assert "thresholds" in out


class Topic:
    """A reader of a topic on which these events lie."""

    def __init__(self, *events):
        self._events = events

    def __call__(self, *_args, **_kwargs):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def read(self, *, idle_s=None):
        del idle_s
        yield from self._events


PLACE = {"key": "l1/s1", "partition": 0, "offset": 5}


@pytest.mark.parametrize(
    "event",
    [
        {"error": "not an event of this line: no ce_id header", **PLACE},
        {"attributes": {"id": "1"}, "data": {}, **PLACE},
        {"attributes": {"id": "1"}, "data": {"verdict": "OK", "views": [{}]}, **PLACE},
    ],
)
def test_a_foreign_record_does_not_end_the_tail(logicrd, line_file, monkeypatch, event):
    """What somebody else put on the topic is shown in a line with its key, and the reader goes on."""
    monkeypatch.setattr(cli, "VerdictReader", Topic(event, event))
    code, out, err = logicrd("verdicts", "tail", "--config", line_file())
    assert (code, err) == (0, "")
    assert len(out.splitlines()) == 2
    assert all(line.strip() and "l1/s1" in line for line in out.splitlines())


@pytest.mark.parametrize(
    ("text", "told"), [("{}", "the cameras are a list"), ("[{id: c1}]", "[0]: type"), ("[", "YAML")]
)
def test_a_wrong_list_of_cameras_is_exit_3(logicrd, line_file, tmp_path, text, told):
    """`cameras apply` reads all of its file before it looks for Kafka."""
    cameras = tmp_path / "cameras.yaml"
    cameras.write_text(text)
    code, out, err = logicrd("cameras", "apply", cameras, "-c", line_file())
    assert (code, out) == (3, "")
    assert told in err
    code, _, err = logicrd("cameras", "apply", tmp_path / "none.yaml", "-c", line_file())
    assert (code, "none.yaml" in err) == (3, True)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.usefixtures("failed_start")
def test_cameras_apply_without_kafka_is_exit_4(logicrd, line_file, tmp_path):
    """A broker that is not there is named, with what to do."""
    cameras = tmp_path / "cameras.yaml"
    cameras.write_text("[]")
    code, out, err = logicrd("cameras", "apply", cameras, "-c", line_file())
    assert (code, out) == (4, ""), err
    assert "Kafka at 127.0.0.1:9" in err
    assert "hint:" in err


@pytest.mark.usefixtures("failed_start")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_cameras_are_listed_without_kafka(logicrd, line_file):
    """When Kafka does not answer the cameras are listed all the same, their state unknown, and stderr says why."""
    code, out, err = logicrd("cameras", "list", "--json", "--config", line_file())
    assert code == 0
    assert [camera["state"] for camera in json.loads(out)] == ["unknown"]
    assert "states are unknown: Kafka at 127.0.0.1:9" in err


def test_cameras_are_listed_with_their_last_state(logicrd, line_file, monkeypatch):
    """The last event of a camera of this line is its state; another line's camera of the same name is another one."""

    def event(source, camera, state, reason, second):
        data = {"cameraId": camera, "state": state, "reason": reason, "worker": "w1"}
        return {"attributes": {"source": source, "time": f"2026-11-25T00:00:{second:02}.000Z"}, "data": data}

    events = [
        event("/site/area/l1", "c1", "lost", "auth_failed", 9),
        event("/site/area/l1", "c1", "streaming", "", 3),
        event("/site/area/l2", "c1", "ended", "", 20),
        {"error": "not an event of this line"},
    ]
    topic = Topic()
    topic.read_to_end = lambda: iter(events)
    monkeypatch.setattr("pipeline.tail.VerdictReader", topic)
    code, out, _ = logicrd("cameras", "list", "--json", "--config", line_file())
    assert code == 0
    (camera,) = json.loads(out)
    assert (camera["state"], camera["reason"], camera["worker"]) == ("lost", "auth_failed", "w1")
    assert camera["since"] == "2026-11-25T00:00:09.000Z"


def test_the_state_of_the_worker_in_charge_is_listed(logicrd, line_file, monkeypatch):
    """What a worker says that has lost a camera and not heard of it does not count, until the pool is counted anew."""

    def event(camera, state, epoch, minute, pool="hall-1"):
        data = {"cameraId": camera, "state": state, "reason": "", "worker": "w1", "epoch": epoch, "pool": pool}
        return {"attributes": {"source": "/site/area/l1", "time": f"2026-11-25T00:{minute:02}:00.000Z"}, "data": data}

    events = [event("c1", "streaming", 7, 1), event("c1", "lost", 6, 2)]
    topic = Topic()
    topic.read_to_end = lambda: iter(events)
    monkeypatch.setattr("pipeline.tail.VerdictReader", topic)
    assert json.loads(logicrd("cameras", "list", "--json", "--config", line_file())[1])[0]["state"] == "streaming"
    events.append(event("c1", "ended", 1, 30))
    assert json.loads(logicrd("cameras", "list", "--json", "--config", line_file())[1])[0]["state"] == "ended"


def test_limits_are_suggested_from_reviewed_parts(logicrd, line_file, models_repo, tmp_path):
    """With scores in the file neither Kafka nor Redis is asked; false alarms an hour are those of the rate."""
    assert models_repo.is_dir()
    rows = [f"p{number},good,{number / 100}" for number in range(200)] + ["q1,bad,5", "q2,bad,1.5"]
    (tmp_path / "reviewed.csv").write_text("\n".join(["partId,truth,score", *rows]))
    command = ["thresholds", "suggest", "tray", "--reviewed", tmp_path / "reviewed.csv", "--parts-per-hour", "600"]
    code, out, _ = logicrd(*command, "--false-alarms-per-hour", "6", "--json", "-c", line_file())
    found = json.loads(out)
    assert (code, found["source"], found["parts"], found["without_score"]) == (0, "reviewed parts", 202, 0)
    assert (found["ng"], found["review"]) == (1.975, 1.895)
    alarms = found["forecast"]["false_alarms"]
    assert (alarms["count"], alarms["of"]) == (2, 200)
    assert alarms["expected_per_hour"] == pytest.approx(600 * 2.5 / 201)
    assert alarms["low_per_hour"] < alarms["expected_per_hour"] < alarms["high_per_hour"]
    assert (found["forecast"]["misses"]["count"], found["forecast"]["misses"]["of"]) == (1, 2)
    code, out, _ = logicrd(*command, "-c", line_file())
    assert code == 0
    assert "good parts that are NG" in out
    assert "an hour" in out


@pytest.mark.parametrize(
    ("text", "told"), [("", "no columns"), ("partId,truth\na,maybe\n", "line 2: truth"), (None, "No such file")]
)
def test_wrong_reviewed_parts_are_exit_3(logicrd, line_file, models_repo, tmp_path, text, told):
    """A file that is no list of parts is refused with its line."""
    assert models_repo.is_dir()
    path = tmp_path / "reviewed.csv"
    if text is not None:
        path.write_text(text)
    code, out, err = logicrd("thresholds", "suggest", "tray", "--reviewed", path, "-c", line_file())
    assert (code, out) == (3, "")
    assert told in err


@pytest.mark.parametrize(
    ("redis", "told"),
    [
        ({"url": "redis://h:1/0", "ca_file": "ca.pem"}, "rediss://"),
        ({"url": "rediss://h:1/0", "certificate_file": "c.pem"}, "go together"),
        ({"url": "redis://h:1/0?password=secret"}, "do not belong in the address"),
        ({"url": "rediss://h:1/0?ssl_cert_reqs=none"}, "do not belong in the address"),
        ({"url": "redis://me:secret@h:1/0"}, "credentials"),
        ({"url": "rediss://h:1/0", "ca_file": "none.pem"}, "none.pem is not there"),
        ({"url": "redis://h:1/0", "user": "a b"}, "redis.user"),
    ],
)
def test_settings_of_redis_that_cannot_be_meant_are_exit_3(logicrd, line_file, redis, told):
    """TLS files without TLS, half a pair, settings in the address: refused before a connection, no secret shown."""
    code, out, err = logicrd("config", "show", "-c", line_file(redis=redis))
    assert (code, out) == (3, "")
    assert told in err
    assert "secret" not in err


def test_a_camera_that_went_to_another_pool_is_listed_as_that_pool_tells(logicrd, line_file, monkeypatch):
    """Its epoch is counted by itself, and may be lower: the later word holds. Cameras of pools stand below the file's.

    A record that is no camera is listed by its name.
    """

    def event(state, epoch, minute, pool):
        data = {"cameraId": "p1", "state": state, "reason": "", "worker": f"w-{pool}", "epoch": epoch, "pool": pool}
        return {"attributes": {"source": "/site/area/l1", "time": f"2026-11-25T00:{minute:02}:00.000Z"}, "data": data}

    topic = Topic()
    topic.read_to_end = lambda: iter([event("ended", 7, 1, "hall-1"), event("streaming", 2, 2, "hall-2")])
    monkeypatch.setattr("pipeline.tail.VerdictReader", topic)
    record = {"pool": "hall-2", "id": "p1", "type": "folder", "product": "tray", "path": "/p", "station": "s"}
    table = {(3, "p1"): json.dumps(record).encode(), (1, "bad"): b"{"}
    monkeypatch.setattr("pipeline.pool.PoolTopic.read", lambda _: (table, 4))
    code, out, _ = logicrd("cameras", "list", "--json", "--config", line_file(pool={"name": "hall-1"}))
    assert code == 0
    told = [[camera.get(key) for key in ("id", "pool", "state", "worker")] for camera in json.loads(out)]
    assert told == [
        ["c1", None, "never reported", None],
        ["bad", "", "never reported", None],
        ["p1", "hall-2", "streaming", "w-hall-2"],
    ]
