"""Shows how the line scales from 4 to 1000 cameras, on 1, 2 and 4 Triton servers and with an autoscaler.

MEASURED: the time that one server needs for a batch, read from what `logicrd bench serving --json` printed; and with
`--triton ADDRESS`, once a server that runs, throughput and p99 of 1, 2 and 4 real ones that are kept busy.
MODELLED: everything else, by the queue of `pipeline.capacity`: throughput, p99, frames too late, and what an autoscaler
that follows the mean wait per frame does when a shift starts (a step from 10 % to 100 % of the load). Servers share no
processor in the model. Prices come from the caller: `--server NAME=PRICE_PER_HOUR=FILE`, once a kind of machine on
which `bench serving` has run; nothing is assumed of a GPU that was not measured.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import scaling_servers
from serving import machine

from pipeline import logs
from pipeline.capacity import Load, Outcome, Service, replicas_for, simulate
from pipeline.cli_plan import service_of
from pipeline.errors import LineError
from pipeline.manifest import read_manifest

ROOT = Path(__file__).resolve().parents[2]
CAMERAS = (4, 16, 64, 256, 1000)
SERVERS = (1, 2, 4)
SHIFT_START_S = 120.0
SPELL_S = 900.0
# As in the chart: up at once, down one by one and late, within these bounds.
TARGET_WAIT_MS = 100.0
TARGET_BUSY = 0.7
DOWN_EVERY_S = 60.0
INTERVAL_S = 15.0
LOOK_BACK_S = 600.0


class Autoscaler:
    """Kubernetes' HPA on two metrics, of which the higher wish counts: the mean wait per frame and the busy share.

    wanted = ceil(present x metric / target), with its tolerance. The wait alone would not do: it says nothing while
    there are enough servers, so a slow way down would end below the need. Down one server a minute at most.
    """

    def __init__(self, least: int, most: int) -> None:
        self._least = least
        self._most = most
        self._wishes: list[tuple[float, int]] = []
        self._last_down_s = 0.0

    def __call__(self, now_s: float, wait_ms: float, busy: float, wanted: int) -> int:
        """Give the replicas to have from now on."""
        wish = max(self._wish(wanted, wait_ms / TARGET_WAIT_MS), self._wish(wanted, busy / TARGET_BUSY))
        wish = min(max(wish, self._least), self._most)
        self._wishes = [(at, each) for at, each in self._wishes if at > now_s - LOOK_BACK_S] + [(now_s, wish)]
        # Down only to the highest wish of the last minutes: a GPU pod that was stopped too early takes minutes to come.
        wish = max(wish, *(each for _, each in self._wishes)) if wish < wanted else wish
        if wish < wanted:
            if now_s - self._last_down_s < DOWN_EVERY_S:
                return wanted
            self._last_down_s = now_s
            return wanted - 1
        return wish

    @staticmethod
    def _wish(wanted: int, ratio: float) -> int:
        return wanted if abs(ratio - 1) <= 0.1 else math.ceil(wanted * min(ratio, 2.0))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Build the document from the figures of every kind of server."""
    document: dict[str, Any] = {"modelled": "pipeline.capacity", "rate_hz": arguments.rate, "servers": {}}
    if arguments.triton:
        counts = [count for count in SERVERS if count <= len(arguments.triton)]
        manifest = read_manifest(arguments.models, arguments.product)
        document["real_servers"] = {
            "machine": machine(),
            "product": arguments.product,
            "measured": scaling_servers.measure(arguments.triton, counts, manifest, arguments.seconds),
        }
    for name, price, path in arguments.server:
        measured = json.loads(path.read_text())
        service = service_of(measured)
        document["servers"][name] = {
            "measured": {
                "machine": measured["machine"],
                "product": measured["product"],
                "single_ms": round(service.single_ms, 1),
                "batch8_ms": round(service.full_ms, 1),
            },
            "grid": [row for cameras in CAMERAS for row in _grid(cameras, service, arguments)],
            "needed": [_needed(cameras, service, price, arguments) for cameras in CAMERAS],
            "autoscaler": [_shift(cameras, service, arguments) for cameras in CAMERAS[2:]],
        }
    return document


def _load(cameras: int, arguments: argparse.Namespace) -> Load:
    return Load(cameras, arguments.rate, arguments.budget_ms)


def _figures(outcome: Outcome) -> dict[str, float]:
    return {
        "images_per_s": round(outcome.images_per_s, 1),
        "p50_ms": outcome.p50_ms,
        "p99_ms": outcome.p99_ms,
        "late_share": round(outcome.late_share, 4),
    }


def _grid(cameras: int, service: Service, arguments: argparse.Namespace) -> list[dict[str, float]]:
    load = _load(cameras, arguments)
    return [{"cameras": cameras, "servers": n, **_figures(simulate(load, service, n))} for n in SERVERS]


def _needed(cameras: int, service: Service, price: float, arguments: argparse.Namespace) -> dict[str, float]:
    load = _load(cameras, arguments)
    replicas = replicas_for(load, service)
    cost = {"price_per_camera_hour": round(replicas * price / cameras, 4)} if price else {}
    return {"cameras": cameras, "servers": replicas, **_figures(simulate(load, service, replicas)), **cost}


def _shift(cameras: int, service: Service, arguments: argparse.Namespace) -> dict[str, Any]:
    load = _load(cameras, arguments)
    needed = replicas_for(load, service)
    outcome = simulate(
        load,
        service,
        2,
        seconds=SPELL_S,
        scaler=Autoscaler(least=2, most=2 * needed),
        interval_s=INTERVAL_S,
        startup_s=arguments.startup_s,
        rate_at=lambda now_s: 0.1 if now_s < SHIFT_START_S else 1.0,
    )
    changes = [(round(at_s), count) for at_s, count in outcome.replicas]
    return {"cameras": cameras, "needed": needed, **_figures(outcome), "wanted_over_time": changes}


def _server(text: str) -> tuple[str, float, Path]:
    name, price, path = [*text.split("="), "", ""][:3]
    try:
        return name, float(price), Path(path)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}': give NAME=PRICE_PER_HOUR=FILE, a price of 0 for none") from None


def _print(document: dict[str, Any]) -> None:
    if real := document.get("real_servers"):
        print(f"real servers, kept busy: measured on {real['machine']['cores']} cores, {real['machine']['cpu']}")
        for row in real["measured"]:
            print("    " + "  ".join(f"{key} {value}" for key, value in row.items()))
    for name, found in document["servers"].items():
        measured = found["measured"]
        machine = measured["machine"]
        print(f"{name}: measured on {machine['cores']} cores, {machine['cpu']}, {measured['product']}: ", end="")
        print(f"1 image {measured['single_ms']} ms, 8 images {measured['batch8_ms']} ms; the rest is modelled")
        for title in ("grid", "needed"):
            print(f"  {title}")
            for row in found[title]:
                print("    " + "  ".join(f"{key} {value}" for key, value in row.items()))
        print(f"  autoscaler, shift from 10 % to 100 % at {SHIFT_START_S:.0f} s")
        for row in found["autoscaler"]:
            print("    " + "  ".join(f"{key} {value}" for key, value in row.items()))


def main(argv: list[str]) -> int:
    """0 and the figures; 3 when a file is not what `bench serving` prints."""
    parser = argparse.ArgumentParser(prog="logicrd bench scaling", description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--server", type=_server, action="append", required=True, metavar="NAME=PRICE_PER_HOUR=FILE")
    parser.add_argument("--rate", type=float, default=1.0, help="parts a second and camera")
    parser.add_argument("--budget-ms", type=float, default=2000.0)
    parser.add_argument("--startup-s", type=float, default=120.0, help="until a new server answers")
    parser.add_argument(
        "--triton", action="append", default=[], metavar="ADDRESS", help="measure these real servers too"
    )
    parser.add_argument("--models", type=Path, default=ROOT / "models_repo", help="the repository that they serve")
    parser.add_argument("--product", default="fastener-tray", help="the product that they are asked for")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each count of real servers")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args(argv)
    logs.configure(level="error")
    try:
        document = measure(arguments)
    except LineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {error!r}; --server names what `logicrd bench serving --json` wrote", file=sys.stderr)
        return 3
    if arguments.json:
        print(json.dumps(document, indent=2))
    else:
        _print(document)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
