"""The demo: four simulated cameras, two products, one minute, and an account of every part at the end.

Starts the embedded stack when it is not up, serves pictures as H.264 over RTSP, runs the real `logicrd run` in a
process of its own, and counts what reached Kafka with a consumer that never asks the worker. With `--source` and
`--product` the same line looks at your own camera, video or folder. Run by `make demo`. Exit code 5 when a verdict was
lost; else the worker's own, which says when a camera gave nothing.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from pipeline.errors import DependencyError
from pipeline.servers import Kafka
from pipeline.tail import VerdictReader

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PARTS = HERE / "parts"
STATE_DIR = ROOT / ".stack"
LOGICRD = [sys.executable, "-m", "pipeline.cli"]
CAMERAS = 4
# Of ten parts seven are good, as nobody would wish a line to be; the demo has to show something within a minute.
SHARE_GOOD = 0.7
KINDS = ("good", "logical", "structural")

console = Console()


class DemoError(Exception):
    """What went wrong, and the exit code that says so."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def main(argv: list[str]) -> int:
    """Run the demo; the exit code."""
    arguments = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return run(arguments)
    except (DemoError, DependencyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def run(arguments: argparse.Namespace) -> int:
    """Build the line, let it run, and account for every part."""
    folder: Path = arguments.out.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with stack() as endpoints:
        seed_thresholds(folder, endpoints)
        if arguments.source is not None:
            return own_pictures(arguments, folder, endpoints)
        playlists = make_playlists(folder, int(arguments.seconds * arguments.rate), arguments.seed)
        with simulated_cameras(playlists, arguments.rate, folder) as (cameras, server):
            path = write_line(folder, endpoints, [_rtsp(name, *cameras[name]) for name in cameras])
            line, events, code = run_line(path, endpoints, until=lambda: server.poll() is not None, log_level="error")
        sent = json.loads((folder / "sent.json").read_text())["cameras"]
    truth = {entry["part_id"]: entry["kind"] for playlist in playlists.values() for entry in playlist}
    expected = [part for camera in sent.values() for part in camera["sent"]]
    return report(folder, line, events, expected, truth) or code


def own_pictures(arguments: argparse.Namespace, folder: Path, endpoints: dict[str, str]) -> int:
    """Run the line on the user's own camera, video or folder."""
    source, product = arguments.source, arguments.product
    if product is None:
        raise DemoError("PRODUCT is missing: name the product that the pictures show", 2)
    if source.startswith(("rtsp://", "rtsps://")):
        camera = {"id": "cam-1", "type": "rtsp", "url": source}
    elif Path(source).is_dir():
        camera = {"id": "cam-1", "type": "folder", "path": str(Path(source).resolve())}
    elif Path(source).is_file():
        camera = {"id": "cam-1", "type": "video", "path": str(Path(source).resolve())}
    else:
        raise DemoError(f"SOURCE={source}: no file, no folder, and no rtsp:// address", 3)
    path = write_line(folder, endpoints, [{**camera, "product": product, "station": "station-1"}])
    deadline = time.monotonic() + arguments.seconds
    line, events, code = run_line(path, endpoints, until=lambda: time.monotonic() > deadline, log_level="warning")
    return report(folder, line, events, None, {}) or code


@contextmanager
def stack() -> Iterator[dict[str, str]]:
    """Give the stack's addresses; starts it when it is not up, and stops it then at the end."""
    script = [sys.executable, str(HERE / "stack.py")]
    was_up = (
        _endpoints() is not None
        and subprocess.run(
            [*script, "status", "--json"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False
        ).returncode
        == 0
    )
    if not was_up:
        console.print("starting Triton, Kafka and Redis ...")
        started = subprocess.run([*script, "up", "--free-ports"], stdout=subprocess.DEVNULL, check=False)
        if started.returncode != 0:
            raise DemoError("the stack does not start; the reason is above", started.returncode)
    try:
        endpoints = _endpoints()
        if endpoints is None:
            raise DemoError(f"{STATE_DIR}/state.json is missing: `logicrd stack down`, then try again", 4)
        yield endpoints
    finally:
        if not was_up:
            subprocess.run([*script, "down"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)


def _endpoints() -> dict[str, str] | None:
    try:
        endpoints: dict[str, str] = json.loads((STATE_DIR / "state.json").read_text())["endpoints"]
    except (FileNotFoundError, KeyError, ValueError):
        return None
    return endpoints


def products() -> list[str]:
    """List the products that the model repository holds."""
    return sorted(path.parent.name for path in (ROOT / "models_repo").glob("*/manifest.json"))


def seed_thresholds(folder: Path, endpoints: dict[str, str]) -> None:
    """Put the suggested limits into Redis for products that have none, as an engineer would before a first run."""
    cameras = [{"id": name, "type": "folder", "path": ".", "product": name} for name in products()]
    config = ["-c", str(write_line(folder, endpoints, cameras))]
    for row in json.loads(_logicrd("thresholds", "list", "--json", *config)):
        if row["source"] == "manifest":
            limits = json.loads(_logicrd("thresholds", "suggest", row["product"], "--json", *config))
            _logicrd(
                *("thresholds", "set", row["product"], "--ng", str(limits["ng"]), "--review", str(limits["review"])),
                *("--author", "demo", "--reason", "suggested by the validation normals", *config),
            )


def _logicrd(*arguments: str) -> str:
    answer = subprocess.run([*LOGICRD, *arguments], capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        raise DemoError(answer.stderr.strip(), answer.returncode)
    return answer.stdout


def make_playlists(folder: Path, length: int, seed: int) -> dict[str, list[dict[str, str]]]:
    """Choose the parts of each camera at random, anomalies of both kinds among good ones; each showing is a part."""
    names = products()
    playlists = {}
    for number in range(CAMERAS):
        product = names[number % len(names)]
        pictures = {kind: sorted((PARTS / product).glob(f"{kind}-*.jpg")) for kind in KINDS}
        if not all(pictures.values()):
            raise DemoError(f"{PARTS / product}: no pictures; `deploy/local/make_parts.py` renders them", 3)
        chooser = random.Random(seed * 100 + number)  # noqa: S311 (which parts are shown is no secret)
        playlist = []
        for position in range(length):
            kind = "good" if chooser.random() < SHARE_GOOD else chooser.choice(KINDS[1:])
            path = str(chooser.choice(pictures[kind]))
            playlist.append(
                {"path": path, "part_id": f"c{number + 1}-{position:04d}", "kind": kind, "product": product}
            )
        playlists[f"cam-{number + 1}"] = playlist
        (folder / f"cam-{number + 1}.json").write_text(json.dumps(playlist))
    return playlists


@contextmanager
def simulated_cameras(
    playlists: dict[str, list[dict[str, str]]], rate: float, folder: Path
) -> Iterator[tuple[dict[str, tuple[str, str]], subprocess.Popen[str]]]:
    """Serve the playlists over RTSP; gives (address, product) by camera and the server, which ends after the last."""
    console.print(f"encoding {sum(map(len, playlists.values()))} frames for {len(playlists)} cameras ...")
    command = [sys.executable, str(HERE / "simulate.py"), "--rate", str(rate), "--report", str(folder / "sent.json")]
    for name in playlists:
        command += ["--camera", f"{name}={folder / name}.json"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        text = server.stdout.readline() if server.stdout is not None else ""
        if not text:
            raise DemoError("the simulated cameras do not start; the reason is above", server.wait())
        addresses = json.loads(text)["cameras"]
        yield {name: (addresses[name], playlists[name][0]["product"]) for name in playlists}, server
    finally:
        server.terminate()
        server.wait(10)


def _rtsp(name: str, address: str, product: str) -> dict[str, Any]:
    return {
        "id": name,
        "type": "rtsp",
        "url": address,
        "product": product,
        "station": name.replace("cam", "station"),
        "picture_size": [640, 480],
    }


def write_line(folder: Path, endpoints: dict[str, str], cameras: list[dict[str, Any]]) -> Path:
    """Write the line file that is run; it stays in the folder for a look."""
    document = {
        "site": "demo",
        "line": f"demo-{time.strftime('%H%M%S')}",
        "budget_ms": 5000,
        "cameras": cameras,
        "triton": {"address": endpoints["triton"], "models_repo": str(ROOT / "models_repo")},
        "kafka": {"bootstrap": [endpoints["kafka"]]},
        "redis": {"url": endpoints["redis"]},
        "evidence": {"dir": str(folder / "pictures"), "keep": "ng"},
    }
    path = folder / "line.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def run_line(
    path: Path, endpoints: dict[str, str], *, until: Callable[[], bool], log_level: str
) -> tuple[dict[str, Any], list[dict[str, Any]], int]:
    """Run the worker until its own end or `until()`; gives its summary, the events a consumer received, its code."""
    summary_path = path.with_name("worker.json")
    with VerdictReader(Kafka(bootstrap=[endpoints["kafka"]]), start="now") as reader:
        worker = subprocess.Popen(
            [*LOGICRD, "run", "-c", str(path), "--summary", str(summary_path), "--log-level", log_level]
        )
        try:
            while worker.poll() is None and not until():
                time.sleep(0.1)
            if worker.poll() is None:
                worker.send_signal(signal.SIGTERM)
            code = worker.wait(60)
        finally:
            if worker.poll() is None:
                worker.kill()
        line_name = yaml.safe_load(path.read_text())["line"]
        events = [event for event in reader.read_to_end() if (event["key"] or "").startswith(f"{line_name}/")]
    if not summary_path.is_file():
        raise DemoError("the line did not run; the reason is above", code or 1)
    return json.loads(summary_path.read_text()), events, code


def report(
    folder: Path,
    line: dict[str, Any],
    events: list[dict[str, Any]],
    expected: list[str] | None,
    truth: dict[str, str],
) -> int:
    """Print and write the account; 5 when a verdict was lost, else 0. Without `expected` the worker's count stands."""
    ids = Counter(event["attributes"]["id"] for event in events)
    judged = {event["data"]["partId"]: event["data"]["verdict"] for event in events}
    lost = len(set(expected) - set(judged)) if expected is not None else line["triggered"] - len(ids)
    rows = {
        "frames sent by the cameras": line["triggered"] if expected is None else len(expected),
        "verdicts acknowledged by Kafka": line["acknowledged"],
        "verdicts read back": len(events),
        "lost": lost,
        "duplicated": sum(ids.values()) - len(ids),
    }
    kinds = {
        kind: Counter(judged[part] for part, its_kind in truth.items() if its_kind == kind and part in judged)
        for kind in KINDS
    }
    for name, value in rows.items():
        console.print(f"{name:32} {value}", highlight=False)
    if truth:
        console.print(_agreement(kinds))
    pictures = sorted((folder / "pictures").glob("*/*.NG.jpg"))
    where = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    console.print(f"{len(pictures)} heat-map pictures of NG parts in {where}/pictures", highlight=False)
    summary = {**rows, "p50_ms": line["p50_ms"], "p99_ms": line["p99_ms"], "agreement": kinds}
    (folder / "summary.json").write_text(json.dumps(summary, indent=1))
    if lost or line["undelivered"]:
        print(f"error: {lost} parts have no verdict", file=sys.stderr)
        return 5
    return 0


def _agreement(kinds: dict[str, Counter[str]]) -> Table:
    table = Table("truth", title="verdicts against the truth of the simulated parts", title_justify="left")
    for column in ("parts", "OK", "REVIEW", "NG", "UNINSPECTED", "agreement"):
        table.add_column(column, justify="right")
    for kind, verdicts in kinds.items():
        total = verdicts.total()
        right = verdicts["OK"] if kind == "good" else verdicts["NG"]
        shown = [str(verdicts[name]) for name in ("OK", "REVIEW", "NG", "UNINSPECTED")]
        table.add_row(kind, str(total), *shown, f"{right / total:.0%}" if total else "-")
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--source", help="your own RTSP address, video file or folder of pictures")
    parser.add_argument("--product", help="the product that your pictures show")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rate", type=float, default=3.0, help="frames a second of each simulated camera")
    parser.add_argument("--seed", type=int, default=1, help="which parts come in which order")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "demo", help="folder for pictures and summary; emptied first"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
