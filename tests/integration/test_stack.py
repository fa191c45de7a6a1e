"""The embedded stack under real faults: processes killed, ports taken, models broken, starts interrupted.

Runs the command as a person does, on free ports, with a small model repository made here: an ensemble of one ONNX model
and one Python model. A mark in the environment, inherited by every process of a stack, finds what is left over.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from kafka import KafkaAdminClient
from tritonclient import grpc as triton
from tritonclient.utils import InferenceServerException

ROOT = Path(__file__).parents[2]
STACK = ROOT / "deploy/local/stack.py"
TRAINING_PYTHON = ROOT / ".venv-training/bin/python"

pytestmark = pytest.mark.stack

# The mean of each row, twice: its answers tell rows and requests apart.
MAKE_ONNX = """
import sys
import onnx
from onnx import TensorProto, helper

x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 1])
two = helper.make_tensor("two", TensorProto.FLOAT, [], [2.0])
nodes = [
    helper.make_node("ReduceMean", ["x"], ["m"], axes=[1], keepdims=1),
    helper.make_node("Mul", ["m", "two"], ["y"]),
]
model = helper.make_model(
    helper.make_graph(nodes, "g", [x], [y], [two]), opset_imports=[helper.make_opsetid("", 17)], ir_version=9
)
onnx.save(model, sys.argv[1])
"""
PYTHON_MODEL = """
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        answers = []
        for request in requests:
            y = pb_utils.get_input_tensor_by_name(request, "y").as_numpy()
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor("score", y + 1)]))
        return answers
"""
X = 'input { name: "x" data_type: TYPE_FP32 dims: 4 }'
OUTPUT = 'output { name: "%s" data_type: TYPE_FP32 dims: 1 }'
BATCHER = "instance_group { count: 1 kind: KIND_CPU } dynamic_batching { max_queue_delay_microseconds: 20000 }"
CONFIGS = {
    "p.mean": f'backend: "onnxruntime" {X} {OUTPUT % "y"} {BATCHER}',
    "p.plus": f'backend: "python" input {{ name: "y" data_type: TYPE_FP32 dims: 1 }} {OUTPUT % "score"}',
    "p": f"""platform: "ensemble" {X} {OUTPUT % "score"} ensemble_scheduling {{
        step {{ model_name: "p.mean" model_version: -1 input_map {{ key: "x" value: "x" }}
               output_map {{ key: "y" value: "y" }} }}
        step {{ model_name: "p.plus" model_version: -1 input_map {{ key: "y" value: "y" }}
               output_map {{ key: "score" value: "score" }} }} }}""",
}


@dataclass
class EmbeddedStack:
    """One stack in a folder of its own, and every process that it ever started."""

    folder: Path
    models: Path
    mark: str = field(default_factory=lambda: f"LOGICRD_TEST_STACK={uuid.uuid4()}")

    def command(self, verb: str, *options: str) -> list[str]:
        return ["env", self.mark, sys.executable, str(STACK), verb, "--state-dir", str(self.folder), *options]

    def run(self, verb: str, *options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(verb, *options),
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )

    def up(self, *options: str) -> dict[str, Any]:
        done = self.run("up", "--models", str(self.models), "--free-ports", "--json", *options)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def state(self) -> dict[str, Any]:
        return json.loads(self.run("status", "--json").stdout)

    def processes(self) -> list[str]:
        """Command lines of its living processes."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.append((folder / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
        return found

    def processes_after(self, seconds: float) -> list[str]:
        """The same, once there is none or the time is over."""
        deadline = time.monotonic() + seconds
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.1)
        return self.processes()

    def wait_for_restart(self, component: str, seconds: float) -> dict[str, Any]:
        """The component's state once it has been restarted and is ready."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            state = self.state()["components"][component]
            if state["restarts"] and state["state"] == "ready":
                return state
            time.sleep(0.3)
        raise AssertionError(f"no restart of {component}; {(self.folder / 'logs/supervisor.log').read_text()}")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository with one ensemble."""
    folder = tmp_path_factory.mktemp("models")
    for name, config in CONFIGS.items():
        (folder / name / "1").mkdir(parents=True)
        (folder / name / "config.pbtxt").write_text(f'name: "{name}" max_batch_size: 8 {config}')
    (folder / "p.plus/1/model.py").write_text(PYTHON_MODEL)
    subprocess.run([str(TRAINING_PYTHON), "-c", MAKE_ONNX, str(folder / "p.mean/1/model.onnx")], check=True, timeout=60)
    return folder


@pytest.fixture
def embedded(tmp_path: Path, models: Path) -> Iterator[EmbeddedStack]:
    """A stack that is not up yet; down at the end."""
    stack = EmbeddedStack(tmp_path / "state", models)
    yield stack
    stack.run("down")
    assert stack.processes_after(5) == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[EmbeddedStack]:
    """All three components, up."""
    stack = EmbeddedStack(tmp_path_factory.mktemp("whole"), models)
    stack.up()
    yield stack
    start = time.monotonic()
    done = stack.run("down")
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 20
    assert stack.processes() == []
    assert not (stack.folder / "state.json").exists()
    assert stack.run("status").returncode == 4


def infer(address: str, rows: np.ndarray) -> np.ndarray:
    """The ensemble's score of each row."""
    with triton.InferenceServerClient(address) as client:
        tensor = triton.InferInput("x", list(rows.shape), "FP32").set_data_from_numpy(rows)
        return client.infer("p", [tensor], client_timeout=20).as_numpy("score")[:, 0]


def test_every_component_answers_where_the_state_says(whole: EmbeddedStack) -> None:
    """Triton infers, Kafka has the line's topics, Redis keeps a key; the state names process, state and log of each."""
    state = whole.state()
    assert state == json.loads((whole.folder / "state.json").read_text())
    endpoints = state["endpoints"]
    assert infer(endpoints["triton"], np.full((3, 4), 5, np.float32)).tolist() == [11, 11, 11]
    admin = KafkaAdminClient(bootstrap_servers=endpoints["kafka"])
    topics = {topic["name"]: len(topic["partitions"]) for topic in admin.describe_topics()}
    admin.close()
    assert topics["inspection.verdict.v1"] == topics["inspection.view.v1"] == 6
    assert topics["inspection.cameras.v1"] == 32
    with redis.Redis.from_url(endpoints["redis"]) as client:
        assert client.ping()
    for component in state["components"].values():
        assert component["state"] == "ready"
        assert Path(f"/proc/{component['pid']}").exists()
        assert Path(component["log"]).exists()


def test_up_again_says_that_it_is_up(whole: EmbeddedStack) -> None:
    """Exit code 0, and the same processes as before."""
    before = whole.state()
    done = whole.run("up", "--models", str(whole.models), "--json")
    assert done.returncode == 0
    assert "already up" in done.stderr
    assert json.loads(done.stdout) == before


def test_requests_that_are_joined_get_their_own_answers(whole: EmbeddedStack) -> None:
    """Twelve clients at once, batches of 1 to 3 rows: the onnxruntime backend joins them and takes them apart again."""
    address = whole.state()["endpoints"]["triton"]
    sizes = [1 + number % 3 for number in range(12)]
    answers: dict[int, list[float]] = {}

    def ask(number: int) -> None:
        answers[number] = infer(address, np.full((sizes[number], 4), number, np.float32)).tolist()

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert answers == {number: [2 * number + 1] * size for number, size in enumerate(sizes)}


def test_a_killed_redis_is_restarted_with_its_data(whole: EmbeddedStack) -> None:
    """Its append-only file brings the threshold back; the others are left alone."""
    before = whole.state()
    with redis.Redis.from_url(before["endpoints"]["redis"]) as client:
        client.set("kept", "yes")
        time.sleep(1.1)  # the file is synchronised every second
        os.kill(before["components"]["redis"]["pid"], signal.SIGKILL)
        assert whole.wait_for_restart("redis", 15)["pid"] != before["components"]["redis"]["pid"]
        assert client.get("kept") == b"yes"
    assert whole.state()["components"]["triton"]["pid"] == before["components"]["triton"]["pid"]


def test_a_dead_backend_process_restarts_the_server(whole: EmbeddedStack) -> None:
    """Triton itself still calls itself ready then; the canary inference finds it."""
    state = whole.state()
    server = state["components"]["triton"]["pid"]
    stubs = [
        int(pid)
        for task in Path(f"/proc/{server}/task").iterdir()
        for pid in (task / "children").read_text().split()
        if "p.mean" in Path(f"/proc/{pid}/cmdline").read_text()
    ]
    os.kill(stubs[0], signal.SIGKILL)
    with pytest.raises(InferenceServerException, match="not healthy"):
        infer(state["endpoints"]["triton"], np.ones((1, 4), np.float32))
    whole.wait_for_restart("triton", 40)
    assert infer(state["endpoints"]["triton"], np.ones((1, 4), np.float32)).tolist() == [3]


def test_a_killed_supervisor_leaves_nothing(embedded: EmbeddedStack) -> None:
    """Servers, and the backend processes of a server, end with it; `status` and `down` know that nothing runs."""
    state = embedded.up("--only", "triton,redis")
    os.kill(state["supervisor_pid"], signal.SIGKILL)
    assert embedded.processes_after(10) == []
    assert embedded.run("status").returncode == 4
    assert embedded.run("down").returncode == 0
    assert embedded.up("--only", "redis")["components"]["redis"]["state"] == "ready"


def test_a_port_in_use_is_named_before_anything_starts(embedded: EmbeddedStack) -> None:
    """Component, port, and the option to change it; exit code 3."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = embedded.run("up", "--models", str(embedded.models), "--free-ports", "--triton-http-port", str(port))
    assert done.returncode == 3
    assert f"triton: port {port} (HTTP) is in use" in done.stderr
    assert "--triton-http-port" in done.stderr
    assert embedded.processes() == []


def test_a_failed_start_names_the_cause_and_leaves_nothing(embedded: EmbeddedStack, tmp_path: Path) -> None:
    """A model that does not load: the component, the model's error, the end of the log; exit code 4."""
    broken = tmp_path / "broken/p.mean"
    (broken / "1").mkdir(parents=True)
    (broken / "config.pbtxt").write_text((embedded.models / "p.mean/config.pbtxt").read_text())
    (broken / "1/model.onnx").write_bytes(b"not a model")
    done = embedded.run("up", "--models", str(broken.parent), "--free-ports", "--only", "triton,redis")
    assert done.returncode == 4
    assert "triton: exited with 1" in done.stderr
    assert "failed to load 'p.mean'" in done.stderr
    assert f"last lines of {embedded.folder}/logs/triton.log" in done.stderr
    assert embedded.processes() == []


def test_ctrl_c_while_starting_leaves_nothing(embedded: EmbeddedStack) -> None:
    """Exit code 130."""
    with subprocess.Popen(
        embedded.command("up", "--models", str(embedded.models), "--free-ports"),
        stderr=subprocess.PIPE,
        text=True,
    ) as starting:
        while len(embedded.processes()) < 3:  # the command, the supervisor and the first server: far from ready
            assert starting.poll() is None
            time.sleep(0.02)
        starting.send_signal(signal.SIGINT)
        _, words = starting.communicate(timeout=30)
    assert starting.returncode == 130
    assert "nothing is left running" in words
    assert embedded.processes() == []


def test_data_is_kept_and_stacks_stand_side_by_side(embedded: EmbeddedStack, whole: EmbeddedStack) -> None:
    """A key of Redis is there again after down and up, and the other stack never saw it."""
    with redis.Redis.from_url(embedded.up("--only", "redis")["endpoints"]["redis"]) as client:
        client.set("mine", "1")
    embedded.run("down")
    with redis.Redis.from_url(embedded.up("--only", "redis")["endpoints"]["redis"]) as client:
        assert client.get("mine") == b"1"
    with redis.Redis.from_url(whole.state()["endpoints"]["redis"]) as client:
        assert client.get("mine") is None


@pytest.mark.parametrize(
    ("options", "exit_code", "words"),
    [
        (["--only", "tritn"], 2, "no component 'tritn'"),
        (["--models", "/nowhere", "--only", "triton"], 3, "no model repository '/nowhere'"),
        (["--kafka-libs", "/nowhere", "--only", "kafka"], 3, "run `make setup`"),
    ],
)
def test_what_is_not_there_is_named(embedded: EmbeddedStack, options: list[str], exit_code: int, words: str) -> None:
    """Usage is 2, something missing is 3."""
    done = embedded.run("up", "--free-ports", *options)
    assert done.returncode == exit_code
    assert words in done.stderr
