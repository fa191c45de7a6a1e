"""The command `logicrd`: reads arguments, calls the line, prints, and turns errors into exit codes. No logic.

Exit codes: 0 good, 1 our fault, 2 usage, 3 configuration, 4 a dependency unreachable, 5 a check failed,
130 interrupted.
stdout is the answer, stderr the rest; `--json` prints one document (one a line for `verdicts tail`).
"""

from __future__ import annotations

import json
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.live import Live

from pipeline import asyncapi, deepstream, logs
from pipeline import config as configuration
from pipeline.app import Line, read_manifests
from pipeline.cli_cameras import cameras_app
from pipeline.cli_models import models_app
from pipeline.cli_plan import plan
from pipeline.cli_reconcile import reconcile
from pipeline.cli_thresholds import threshold_doubts, thresholds_app
from pipeline.cli_topics import topics_app
from pipeline.errors import CheckError, LineError
from pipeline.health import Health
from pipeline.inference import InferenceClient
from pipeline.manifest import region_doubts
from pipeline.metrics import LineSnapshot, Metrics
from pipeline.networks import refusals
from pipeline.outbox_folder import look
from pipeline.pool import PoolTopic
from pipeline.roster import cameras_of
from pipeline.screen import draw, frame_rates, verdict_line
from pipeline.tail import VerdictReader
from pipeline.terminal import (
    CONFIG_FILE,
    PASS_ON,
    Config,
    Json,
    answer,
    run_script,
    stderr,
    stdout,
)
from pipeline.threshold_store import ThresholdStore
from pipeline.trial import try_verdicts
from pipeline.types import CameraState
from pipeline.wire import schemas

app = typer.Typer(
    help="LogicRD: cameras in, verdicts out.", no_args_is_help=True, add_completion=False, rich_markup_mode=None
)
verdicts_app = typer.Typer(help="Verdicts on Kafka.", no_args_is_help=True)
config_app = typer.Typer(help="The line file.", no_args_is_help=True)
deepstream_app = typer.Typer(help="The all-GPU alternative.", no_args_is_help=True)
for name, group in (
    ("cameras", cameras_app),
    ("models", models_app),
    ("thresholds", thresholds_app),
    ("verdicts", verdicts_app),
    ("config", config_app),
    ("deepstream", deepstream_app),
    ("topics", topics_app),
):
    app.add_typer(group, name=name)
app.command("plan")(plan)
app.command()(reconcile)


def main() -> None:
    """Run the command and exit with its code."""
    try:
        code = app(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except LineError as error:
        _complain(error)
        sys.exit(error.exit_code)
    except typer.Abort:
        sys.exit(130)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:  # noqa: BLE001 (the program's top frame)
        usage = getattr(error, "exit_code", None)  # click's usage errors carry their code
        if usage is None:
            stderr.print_exception()
            sys.exit(1)
        error.show()  # type: ignore[attr-defined]
        sys.exit(usage)


@app.command()
def run(
    config: Config = CONFIG_FILE,
    seconds: Annotated[float | None, typer.Option(help="Stop after this time.", min=0.1)] = None,
    until_end: Annotated[bool, typer.Option(help="Stop when every file or folder has been read.")] = True,
    as_json: Json = False,
    summary: Annotated[Path | None, typer.Option(help="Write the closing figures to this file as JSON.")] = None,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"] | None, typer.Option(help="What to say on stderr.")
    ] = None,
) -> None:
    """Run the line until its cameras end, the time is up, or Ctrl-C; exit 5 if a verdict did not reach Kafka."""
    table = stderr.is_terminal and not as_json
    logs.configure(level=log_level or ("warning" if table else "info"), colour=not configuration.without_colour())
    line = Line(configuration.load(config))
    interrupted = _Interrupted()
    started = time.monotonic()
    line.start()
    try:
        _watch(line, interrupted, started, seconds=seconds, until_end=until_end, table=table)
    finally:
        last = line.close()
    _summarise(last, time.monotonic() - started, as_json=as_json, path=summary)
    if last.stored:
        stderr.print(f"{last.stored} verdicts are left in the outbox: the next run delivers them", highlight=False)
    if last.lost:
        raise CheckError(f"{last.lost} verdicts never reached Kafka", hint="see the log for the reason")
    if failed := [camera.camera_id for camera in last.cameras if camera.state is CameraState.FAILED]:
        raise CheckError(f"cameras failed: {', '.join(failed)}", hint="see the log for the reason")


@app.command()
def check(
    config: Config = CONFIG_FILE,
    verdict: Annotated[
        bool, typer.Option("--verdict", help="Besides, judge a grey picture of each product, up to its event on Kafka.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Try everything a run needs, once: the file, manifests, the outbox's folder, Triton's signatures, Redis, Kafka;
    where a camera asks for DeepStream, that as well."""
    logs.configure(level="error")
    settings = configuration.load(config)
    manifests = read_manifests(settings)
    outbox = look(settings.outbox)
    doubts = [
        *outbox.doubts,
        *region_doubts(settings.cameras, manifests),
        *refusals(settings.cameras, settings.camera_networks),
        *deepstream.doubts(settings.graph_products),
    ]
    done = [f"line file {config}", *(f"manifest {product}" for product in manifests), outbox.said]
    done += deepstream.tried(settings.cameras)
    client = InferenceClient(settings.triton, manifests, metrics=Metrics(), health=Health())
    try:
        unfit = client.start(optional=manifests.keys() - set(settings.products))
        replicas = client.require_all()
    finally:
        client.close()
    fit = [manifest for product, manifest in manifests.items() if product not in unfit]
    signatures = ", ".join(f"{manifest.product} version {manifest.version}" for manifest in fit)
    done += [f"Triton at {replica}, signatures of {signatures}" for replica in replicas]
    doubts += [f"product {product!r} is not served: cameras of the pool cannot have it" for product in unfit]
    store = ThresholdStore(settings.redis)
    doubts += threshold_doubts(store, manifests.values())
    done.append(f"Redis at {settings.redis.url}")
    triggered = any(station.trigger == "message" for station in settings.stations)
    for topic in ("verdict.v1", "trigger.v1") if triggered else ("verdict.v1",):
        with VerdictReader(settings.kafka, topic=topic, start="now"):
            done.append(f"Kafka at {', '.join(settings.kafka.bootstrap)}, topic {topic}")
    if settings.pool is not None:
        table, partitions = PoolTopic(settings.kafka).read()
        done.append(f"camera pools: {len(table)} cameras in {partitions} partitions")
        pooled = cameras_of(table, settings.pool.name)
        doubts += refusals(pooled, settings.camera_networks)
        done += [what for what in deepstream.tried(pooled) if what not in done]
    if verdict:
        done += try_verdicts(settings, {manifest.product: manifest for manifest in fit})
    lines = [*(f"good  {what}" for what in done), *(f"look  {doubt}" for doubt in doubts)]
    answer({"ok": True, "checked": done, "doubts": doubts}, as_json, "\n".join(lines))


@app.command(context_settings=PASS_ON)
def stack(context: typer.Context) -> None:
    """Run Triton, Kafka and Redis on this machine: up, down, status (`logicrd stack up --help`)."""
    raise typer.Exit(run_script("deploy/local/stack.py", context.args))


@app.command(context_settings=PASS_ON)
def bench(context: typer.Context) -> None:
    """Measure this machine: `bench line`, `serving`, `ingest`, `delivery`; model many: `scaling` (all with --json)."""
    kinds = {"delivery", "ingest", "line", "scaling", "serving"}
    if not context.args or context.args[0] not in kinds:
        raise typer.BadParameter(f"name a benchmark: {', '.join(sorted(kinds))}")
    raise typer.Exit(run_script(f"tests/benchmarks/{context.args[0]}.py", context.args[1:]))


@verdicts_app.command("tail")
def verdicts_tail(
    config: Config = CONFIG_FILE,
    station: Annotated[str, typer.Option(help="Only this station.")] = "",
    verdict: Annotated[str, typer.Option(help="Only OK, NG, REVIEW or UNINSPECTED.")] = "",
    first: Annotated[bool, typer.Option("--from-start", help="From the topic's beginning, not from now.")] = False,
    idle: Annotated[float | None, typer.Option(help="End after this many seconds of silence.", min=0.1)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document a line.")] = False,
) -> None:
    """Print part verdicts as a MES reads them, until Ctrl-C."""
    wanted = verdict.upper()
    if wanted not in {"", "OK", "NG", "REVIEW", "UNINSPECTED"}:
        raise typer.BadParameter(f"--verdict {verdict}: choose OK, NG, REVIEW or UNINSPECTED")
    settings = configuration.load(config)
    with VerdictReader(settings.kafka, start="first" if first else "now") as reader:
        for event in reader.read(idle_s=idle):
            data = event.get("data", {})
            if (station and data.get("station") != station) or (wanted and data.get("verdict") != wanted):
                continue
            sys.stdout.write((json.dumps(event) if as_json else verdict_line(event)) + "\n")
            sys.stdout.flush()


@config_app.command("show")
def config_show(config: Config = CONFIG_FILE) -> None:
    """Print the line file as it is understood: defaults and environment included, paths resolved."""
    sys.stdout.write(configuration.load(config).model_dump_json(indent=2) + "\n")


@config_app.command("schema")
def config_schema(
    wire: Annotated[bool, typer.Option(help="The schemas of the events instead.")] = False,
    out: Annotated[Path | None, typer.Option(help="With --wire: write them and asyncapi.json to this folder.")] = None,
) -> None:
    """Print the JSON Schema of the line file, for editors and charts."""
    if not wire or out is None:
        sys.stdout.write(json.dumps(schemas() if wire else configuration.schema(), indent=2) + "\n")
        return
    out.mkdir(parents=True, exist_ok=True)
    for name, document in {**schemas(), "asyncapi.json": asyncapi.document()}.items():
        (out / name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


@deepstream_app.command("render")
def deepstream_render(
    config: Annotated[Path, typer.Argument(help="The line file.")],
    out: Annotated[Path, typer.Option(help="Folder to write to: one below it for each product.")],
    root: Annotated[Path | None, typer.Option(help="Where DeepStream will find the folder. Default: --out.")] = None,
    as_json: Json = False,
) -> None:
    """Write down the graphs that `logicrd run` starts for cameras with `inference: graph`, one a product."""
    written = [str(path) for path in deepstream.write(configuration.load(config), out, root or out.resolve())]
    answer({"written": written}, as_json, "\n".join(written))


class _Interrupted:
    """True after the first Ctrl-C or SIGTERM, which asks for a drain; the second one ends at once."""

    def __init__(self) -> None:
        self._set = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def __bool__(self) -> bool:
        return self._set

    def _handle(self, number: int, frame: object) -> None:
        del number, frame
        if self._set:
            raise KeyboardInterrupt
        self._set = True


def _watch(
    line: Line, interrupted: _Interrupted, started: float, *, seconds: float | None, until_end: bool, table: bool
) -> None:
    """Keep the live table going until the run is over."""
    before, before_at = line.snapshot(), started
    rates: dict[str, float] = {}
    with Live(console=stderr, auto_refresh=False, transient=True) if table else nullcontext() as live:
        while not interrupted and not (until_end and line.finished):
            now = time.monotonic()
            if seconds is not None and now - started >= seconds:
                return
            if now - before_at >= 1.0:
                current = line.snapshot()
                rates = frame_rates(before, current, now - before_at)
                before, before_at = current, now
                if live is not None:
                    live.update(draw(current, rates, elapsed_s=now - started), refresh=True)
            time.sleep(0.1)


def _summarise(last: LineSnapshot, elapsed_s: float, *, as_json: bool, path: Path | None) -> None:
    document = json.dumps({"elapsed_s": round(elapsed_s, 2), **asdict(last)}) + "\n"
    if path is not None:
        path.write_text(document, encoding="utf-8")
    if as_json:
        sys.stdout.write(document)
        return
    rates = {camera.camera_id: camera.frames / elapsed_s for camera in last.cameras}
    stdout.print(draw(last, rates, elapsed_s=elapsed_s))


def _complain(error: LineError) -> None:
    stderr.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
    if error.hint:
        stderr.print(f"hint: {error.hint}", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
