"""The command `logicrd plan`: how much of everything a number of cameras needs. Reads figures, computes, prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.capacity import HEADROOM, Load, Service, replicas_for, simulate
from pipeline.errors import ConfigError
from pipeline.terminal import Json, answer, table_of

_FULL_BATCH = 8


def plan(
    cameras: Annotated[int, typer.Option(min=1, max=100_000, help="How many cameras.")],
    bench: Annotated[
        Path, typer.Option(help="What `logicrd bench serving --json` printed on a machine like the servers to plan.")
    ],
    rate: Annotated[float, typer.Option(min=0.001, max=1000, help="Parts a second and camera.")] = 1.0,
    budget_ms: Annotated[float, typer.Option(min=1, help="From capture to verdict.")] = 2000.0,
    batch: Annotated[int, typer.Option(min=1, max=64, help="Most images in a request.")] = _FULL_BATCH,
    ingest: Annotated[
        Path | None, typer.Option(help="What `logicrd bench ingest --json` printed on a machine like the workers.")
    ] = None,
    camera_mbps: Annotated[float, typer.Option(min=0.01, help="What a camera sends, in Mbit/s; assumed.")] = 4.0,
    as_json: Json = False,
) -> None:
    """Say how many replicas of Triton, cores of workers and how much network a number of cameras needs."""
    measured = _read(bench, "serving")
    load = Load(cameras, rate, budget_ms, batch)
    try:
        service = service_of(measured)
        replicas = replicas_for(load, service)
    except (KeyError, TypeError, ZeroDivisionError):
        raise ConfigError(f"{bench}: not what `logicrd bench serving --json` prints") from None
    except ValueError as error:
        raise ConfigError(str(error)) from None
    outcome = simulate(load, service, replicas)
    image_bytes = _product(measured.get("image") or [])
    document = {
        "frames_per_s": round(load.images_per_s, 2),
        "triton_replicas": replicas,
        "triton_replicas_with_one_lost": replicas + 1,
        "replica_images_per_s": round(service.images_per_s(batch), 1),
        "mean_batch": round(outcome.mean_batch, 1),
        "wait_and_inference_p50_ms": outcome.p50_ms,
        "wait_and_inference_p99_ms": outcome.p99_ms,
        "worker_cores": None if ingest is None else _worker_cores(ingest, load),
        "network_to_triton_mbps": round(load.images_per_s * image_bytes * 8 / 1e6, 1) if image_bytes else None,
        "network_from_cameras_mbps": round(cameras * camera_mbps, 1),
        "measured_on": measured["machine"],
        "product": measured["product"],
    }
    answer(document, as_json, table_of(_rows(document), ["what", "how much", "from"]))


def service_of(measured: dict[str, Any]) -> Service:
    """Take the service times from the document of `bench serving`: a replica that is kept busy, one request behind."""
    rates = {batch: measured["ensemble"][f"batch{batch}_in_flight2"]["images_per_s"] for batch in (1, _FULL_BATCH)}
    return Service(1e3 / rates[1], 1e3 * _FULL_BATCH / rates[_FULL_BATCH], _FULL_BATCH)


def _read(path: Path, name: str) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}", hint=f"write it with `logicrd bench {name} --json > {path}`") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: not what `logicrd bench {name} --json` prints")
    return document


def _worker_cores(path: Path, load: Load) -> float:
    try:
        cpu_ms = float(_read(path, "ingest")["logicrd"]["cpu_ms_per_frame"])
    except (KeyError, TypeError, ValueError):
        raise ConfigError(f"{path}: not what `logicrd bench ingest --json` prints") from None
    return round(load.images_per_s * cpu_ms / 1e3 / HEADROOM, 1)


def _product(shape: list[int]) -> int:
    size = 1 if shape else 0
    for side in shape:
        size *= side
    return size


def _rows(document: dict[str, Any]) -> list[dict[str, Any]]:
    machine, spare = document["measured_on"], f"at most {HEADROOM:.0%} loaded"
    told = f"measured: {document['product']} on {machine['cores']} cores, {machine['cpu']}"
    lines = [
        ("frames a second", document["frames_per_s"], "cameras x rate"),
        ("Triton replicas", document["triton_replicas"], f"simulated; {spare}"),
        ("  with one lost", document["triton_replicas_with_one_lost"], "one more"),
        ("  each gives, images/s", document["replica_images_per_s"], told),
        ("  images in a batch, mean", document["mean_batch"], "simulated"),
        ("wait and inference, p50 ms", document["wait_and_inference_p50_ms"], "simulated"),
        ("wait and inference, p99 ms", document["wait_and_inference_p99_ms"], "simulated"),
        ("cores of workers", document["worker_cores"] or "-", f"bench ingest; {spare}"),
        ("network to Triton, Mbit/s", document["network_to_triton_mbps"] or "-", "images as they are sent"),
        ("network from cameras, Mbit/s", document["network_from_cameras_mbps"], "assumed by --camera-mbps"),
    ]
    return [{"what": what, "how much": amount, "from": source} for what, amount, source in lines]
