"""The embedded stack: the real Triton, Kafka and Redis on this machine, for development, the demo and the tests.

`stack.py up` leaves a detached supervisor that owns them; `down` stops it; `status` reads its state file. Run as a
script in `.venv` by make, by `logicrd stack` and by tests. It never serves anything but loopback. Exit codes: 0 good,
2 usage, 3 something needed is not there or a port is taken, 4 a component does not run, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from brokers import Kafka, Redis
from processes import StackError, free_ports, is_free, last_lines
from supervisor import Component, Interrupted, Supervisor, become_supervisor_of, is_running
from triton_server import Triton, TritonPorts, remove_shared_memory

ROOT = Path(__file__).resolve().parents[2]
# Component: {option of a port: (default, what listens there)}
PORTS: dict[str, dict[str, tuple[int, str]]] = {
    "triton": {
        "triton_port": (18001, "gRPC"),
        "triton_http_port": (18000, "HTTP"),
        "triton_metrics_port": (18002, "metrics"),
    },
    "kafka": {"kafka_port": (19092, "clients"), "kafka_controller_port": (19093, "controller")},
    "redis": {"redis_port": (16379, "clients")},
}
STOP_TIMEOUT_S = 20.0


def main(argv: list[str]) -> int:
    """Run one command; the exit code."""
    arguments = _parser().parse_args(argv)
    arguments.state_dir = arguments.state_dir.resolve()
    try:
        return int(arguments.run(arguments))
    except StackError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except (KeyboardInterrupt, Interrupted):
        print("interrupted; nothing is left running", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="logicrd stack", description="The embedded Triton, Kafka and Redis.")
    commands = parser.add_subparsers(required=True, metavar="up|down|status")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--state-dir", type=Path, default=ROOT / ".stack", help="data, logs, state (default: .stack)")
    shared.add_argument("--json", action="store_true", help="print one JSON document")
    up = commands.add_parser("up", parents=[shared], help="start what is not running and wait until it answers")
    up.set_defaults(run=_up)
    up.add_argument("--models", type=Path, default=ROOT / "models_repo", help="model repository (default: models_repo)")
    up.add_argument("--only", type=_names, default=list(PORTS), metavar="LIST", help="of triton,kafka,redis")
    key = "file of a key: whoever has it may load and unload models (logicrd models); default: nobody"
    up.add_argument("--control-key-file", type=Path, metavar="FILE", help=key)
    trace = "let Triton send spans of traced requests there (OTLP over HTTP), `http://127.0.0.1:4318/v1/traces`"
    up.add_argument("--trace-url", default="", metavar="URL", help=trace)
    up.add_argument("--free-ports", action="store_true", help="take any free ports instead of the defaults")
    up.add_argument("--foreground", action="store_true", help="stay in the foreground; Ctrl-C stops everything")
    up.add_argument("--triton-env", type=Path, default=ROOT / ".venv-triton", help=argparse.SUPPRESS)
    up.add_argument("--kafka-libs", type=Path, default=ROOT / ".stack/kafka/libs", help=argparse.SUPPRESS)
    up.add_argument("--report-fd", type=int, help=argparse.SUPPRESS)
    for component, options in PORTS.items():
        for option, (default, use) in options.items():
            text = f"{component}, {use} (default: {default})"
            up.add_argument(f"--{option.replace('_', '-')}", type=int, metavar="PORT", help=text)
    commands.add_parser("down", parents=[shared], help="stop everything").set_defaults(run=_down)
    commands.add_parser("status", parents=[shared], help="what runs where").set_defaults(run=_status)
    return parser


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in PORTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no component '{unknown[0]}'; there are {', '.join(PORTS)}")
    return [name for name in PORTS if name in names]


# --- up --------------------------------------------------------------------------------------------------------------


def _up(arguments: argparse.Namespace) -> int:
    if arguments.report_fd is not None:
        return _supervise_detached(arguments)
    if is_running(arguments.state_dir):
        print("the stack is already up", file=sys.stderr)
        _print_state(_read_state(arguments.state_dir), arguments.json)
        return 0
    _choose_ports(arguments)
    for component in _components(arguments):
        component.require()
    return _supervise_in_foreground(arguments) if arguments.foreground else _start_detached(arguments)


def _choose_ports(arguments: argparse.Namespace) -> None:
    """Fill in every port that was not given. Raises StackError for the first one that is in use."""
    wanted = [(name, option, *spec) for name in arguments.only for option, spec in PORTS[name].items()]
    spare = free_ports(len(wanted))
    for name, option, default, use in wanted:
        port = getattr(arguments, option)
        if port is None:
            port = spare.pop() if arguments.free_ports else default
            setattr(arguments, option, port)
        if not is_free(port):
            flag = f"--{option.replace('_', '-')}"
            remedy = f"choose another with {flag}, or any with --free-ports"
            raise StackError(f"{name}: port {port} ({use}) is in use; {remedy}", 3)


def _components(arguments: argparse.Namespace) -> list[Component]:
    state_dir: Path = arguments.state_dir
    components: list[Component] = []
    if "redis" in arguments.only:
        components.append(Redis(state_dir, arguments.redis_port))
    if "triton" in arguments.only:
        ports = TritonPorts(arguments.triton_port, arguments.triton_http_port, arguments.triton_metrics_port)
        # Not resolved: the last part of a virtual environment's python is a link that must stay one.
        environment = Path(os.path.abspath(arguments.triton_env))  # noqa: PTH100
        key = _control_key(arguments.control_key_file)
        models = arguments.models.resolve()
        components.append(Triton(state_dir, models, environment, ports, key, arguments.trace_url))
    if "kafka" in arguments.only:
        libs = arguments.kafka_libs.resolve()
        components.append(Kafka(state_dir, libs, arguments.kafka_port, arguments.kafka_controller_port))
    return components


def _control_key(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise StackError(f"triton: the key in '{path}' cannot be read: {error}", 3) from None
    if not key.isalnum():
        raise StackError(f"triton: the key in '{path}' must be of letters and digits alone", 3)
    return key


def _start_detached(arguments: argparse.Namespace) -> int:
    """Start the supervisor as a process of its own, and wait for its word on how the start went."""
    logs = arguments.state_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    reader, writer = os.pipe()
    with (logs / "supervisor.log").open("wb") as output:
        supervisor = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), *_same_arguments(arguments), "--report-fd", str(writer)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(writer,),
        )
    os.close(writer)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with os.fdopen(reader) as pipe:
            word = pipe.read()
    except KeyboardInterrupt:
        _stop_process(supervisor.pid, arguments.state_dir)
        raise
    if not word.startswith('{"state"'):
        # It has said why it failed and is about to go; who is told of a failed start finds nothing left.
        with suppress(subprocess.TimeoutExpired):
            supervisor.wait(STOP_TIMEOUT_S)
    return _conclude_start(arguments, word)


def _conclude_start(arguments: argparse.Namespace, word: str) -> int:
    if not word:
        lines = last_lines(arguments.state_dir / "logs/supervisor.log")
        raise StackError("\n".join(["the supervisor ended without a word; the last lines of its log:", *lines]), 4)
    report = json.loads(word)
    if "error" in report:
        raise StackError(report["error"], report["exit_code"])
    _print_state(report["state"], arguments.json)
    return 0


def _same_arguments(arguments: argparse.Namespace) -> list[str]:
    """The command line of `up` again, with every port decided."""
    line = ["up", "--state-dir", str(arguments.state_dir), "--models", str(arguments.models.resolve())]
    line += ["--only", ",".join(arguments.only), "--triton-env", str(arguments.triton_env)]
    line += ["--kafka-libs", str(arguments.kafka_libs)]
    if arguments.control_key_file is not None:
        line += ["--control-key-file", str(arguments.control_key_file)]
    if arguments.trace_url:
        line += ["--trace-url", arguments.trace_url]
    for name in arguments.only:
        for option in PORTS[name]:
            line += [f"--{option.replace('_', '-')}", str(getattr(arguments, option))]
    return line


def _supervise_detached(arguments: argparse.Namespace) -> int:
    """The detached supervisor's whole life. Its caller reads one JSON document from the pipe, then it is alone."""
    with os.fdopen(arguments.report_fd, "w") as pipe:
        try:
            supervisor = _start_here(arguments)
        except StackError as error:
            pipe.write(json.dumps({"error": str(error), "exit_code": error.exit_code}))
            raise
        try:
            pipe.write(json.dumps({"state": supervisor.state()}))
            pipe.flush()
        except BrokenPipeError:
            # Whoever asked for the stack is gone and cannot know of it: leave nothing.
            supervisor.stop()
            raise
    supervisor.watch()
    return 0


def _supervise_in_foreground(arguments: argparse.Namespace) -> int:
    supervisor = _start_here(arguments)
    _print_state(supervisor.state(), arguments.json)
    sys.stdout.flush()
    supervisor.watch()
    return 0


def _start_here(arguments: argparse.Namespace) -> Supervisor:
    """Start every component as this process's own. Raises StackError or Interrupted; nothing is left then."""
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    if not become_supervisor_of(arguments.state_dir):
        raise StackError("another `stack up` was faster; see `stack status`", 4)
    supervisor = Supervisor(_components(arguments), arguments.state_dir)
    supervisor.start()
    return supervisor


# --- down and status -------------------------------------------------------------------------------------------------


def _down(arguments: argparse.Namespace) -> int:
    state = _read_state(arguments.state_dir)
    if not is_running(arguments.state_dir):
        # After a SIGKILL these are all that is left; its processes have ended with the supervisor.
        (arguments.state_dir / "state.json").unlink(missing_ok=True)
        remove_shared_memory(arguments.state_dir)
        print("the stack is not running", file=sys.stderr)
        return 0
    _stop_process(int(state["supervisor_pid"]), arguments.state_dir)
    print("the stack is down", file=sys.stderr)
    return 0


def _stop_process(supervisor_pid: int, state_dir: Path) -> None:
    """SIGTERM; wait until the supervisor lets go of its folder; past the limit SIGKILL: its children die with it."""
    deadline = time.monotonic() + STOP_TIMEOUT_S
    with suppress(ProcessLookupError):
        os.kill(supervisor_pid, signal.SIGTERM)
        while is_running(state_dir):
            if time.monotonic() > deadline:
                os.kill(supervisor_pid, signal.SIGKILL)
                deadline += STOP_TIMEOUT_S
            time.sleep(0.05)
    (state_dir / "state.json").unlink(missing_ok=True)


def _status(arguments: argparse.Namespace) -> int:
    """0 when every component is ready, else 4."""
    state = _read_state(arguments.state_dir) if is_running(arguments.state_dir) else EMPTY_STATE
    _print_state(state, arguments.json)
    states = [component["state"] for component in state["components"].values()]
    return 0 if states and all(name == "ready" for name in states) else 4


EMPTY_STATE: dict[str, Any] = {"supervisor_pid": None, "endpoints": {}, "components": {}}


def _read_state(state_dir: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads((state_dir / "state.json").read_text())
    except FileNotFoundError:
        return EMPTY_STATE
    return state


def _print_state(state: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(state, indent=2))
        return
    if not state["components"]:
        print("the stack is not running")
    for name, component in state["components"].items():
        places = ", ".join(f"{key} {place}" for key, place in state["endpoints"].items() if key.startswith(name))
        restarts = f", restarted {component['restarts']} times" if component["restarts"] else ""
        print(f"{name:<8}{component['state']:<10}{places}{restarts}  log {component['log']}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
