"""The commands `logicrd cameras`: what cameras there are, how they are, and the pools of them in Kafka. No logic."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline import config as configuration
from pipeline.errors import DependencyError
from pipeline.pool import PoolTopic
from pipeline.roster import difference, read_list, table_rows
from pipeline.tail import camera_states
from pipeline.terminal import CONFIG_FILE, PASS_ON, Config, Json, answer, run_script, stderr, table_of

cameras_app = typer.Typer(help="Cameras of the line.", no_args_is_help=True)


@cameras_app.command("list")
def cameras_list(config: Config = CONFIG_FILE, as_json: Json = False) -> None:
    """List the cameras of the line file, and of the pools where it takes part in one, each with its last state.

    That is what a worker reported last on Kafka.
    """
    settings = configuration.load(config)
    states: dict[str, dict[str, str]] = {}
    none = {"state": "never reported"}
    cameras: list[dict[str, Any]] = [camera.model_dump(mode="json") for camera in settings.cameras]
    columns = ["id", "type", "product", "station", "overflow", "state", "reason", "since"]
    unknown = "states are" if settings.pool is None else "states and the cameras of pools are"
    try:
        if settings.pool is not None:
            cameras += table_rows(PoolTopic(settings.kafka).read()[0])
            columns = ["id", "pool", "type", "product", "station", "state", "reason", "worker", "since"]
        states = camera_states(settings.kafka, f"/{settings.site}/{settings.area}/{settings.line}")
    except DependencyError as error:
        none = {"state": "unknown"}
        stderr.print(f"{unknown} unknown: {error}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    rows = [camera | none | states.get(camera["id"], {}) for camera in cameras]
    answer(rows, as_json, table_of(rows, columns))


@cameras_app.command("apply")
def cameras_apply(
    file: Annotated[Path, typer.Argument(help="A YAML list of cameras as in the line file, each with its `pool`.")],
    prune: Annotated[bool, typer.Option("--prune", help="Remove every camera that the file does not list.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would change, and change nothing.")] = False,
    config: Config = CONFIG_FILE,
    as_json: Json = False,
) -> None:
    """Make the camera pools in Kafka what the file says; running workers follow within seconds."""
    settings = configuration.load(config)
    listed = read_list(configuration.read_yaml(file), str(file))
    wanted = [replace(entry, camera=configuration.with_mask(entry.camera, file)) for entry in listed]
    topic = PoolTopic(settings.kafka)
    present, partitions = topic.read()
    changes = difference(wanted, present, partitions, prune=prune)
    if not dry_run:
        topic.write(changes)
    columns = ["change", "camera", "pool", "product", "station"]
    rows = [
        dict(zip(columns, (row.kind, row.camera_id, row.pool, row.product, row.station), strict=True))
        for row in changes
    ]
    text = table_of(rows, columns) if rows else "nothing differs"
    answer({"dry_run": dry_run, "changes": rows}, as_json, text)


@cameras_app.command("simulate", context_settings=PASS_ON)
def cameras_simulate(context: typer.Context) -> None:
    """Serve pictures as H.264 over RTSP, as cameras would (`logicrd cameras simulate --help`)."""
    raise typer.Exit(run_script("deploy/local/simulate.py", context.args))
