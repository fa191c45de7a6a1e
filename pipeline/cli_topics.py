"""The commands `logicrd topics`: the topics of a line in Kafka. No logic."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline import config as configuration
from pipeline import topics
from pipeline.errors import CheckError
from pipeline.terminal import CONFIG_FILE, Config, Json, answer, table_of

topics_app = typer.Typer(help="Topics of the line in Kafka.", no_args_is_help=True)


@topics_app.callback()
def _group() -> None:
    """Keep `create` a command of its own name; a group of one would take its place."""


@topics_app.command("create")
def topics_create(
    partitions: Annotated[
        int, typer.Option(help="Partitions of each new topic but that of the camera pools.", min=1, max=1000)
    ] = 6,
    copies: Annotated[int, typer.Option(help="Copies of each new topic; -1 takes the broker's default.", min=-1)] = -1,
    config: Config = CONFIG_FILE,
    as_json: Json = False,
) -> None:
    """Make the topics that are missing; those that are there stay as they are. Exit 5 if one of them does not fit."""
    if copies == 0:
        raise typer.BadParameter("--copies: at least 1, or -1 for the broker's default")
    made, faults = topics.create(configuration.load(config).kafka, partitions=partitions, copies=copies)
    rows = [{"topic": topic.name, "partitions": topic.partitions, **topic.settings} for topic in made]
    text = table_of(rows, ["topic", "partitions"]) if rows else "every topic is there"
    answer({"created": rows, "faults": faults}, as_json, text)
    if faults:
        words = "; ".join(f"topic {name}: {fault}" for name, fault in faults.items())
        raise CheckError(words, hint="correct it with Kafka's own tools: a topic that is there is never changed")
