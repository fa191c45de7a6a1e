"""The command `logicrd-train`: scenes, pretrain, fit, evaluate, export.

Turns arguments into calls and errors into one line with an exit code; computes nothing itself. stdout is the answer,
stderr the rest; progress bars appear on a terminal only.
"""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import onnx
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from training.config import CONFIGS, FitConfig, PretrainConfig, check_product_name, load_config
from training.data import check_readable, list_images, open_loco
from training.detector import load_bundle, save_bundle
from training.errors import ConfigError, TrainingError
from training.evaluate import ScoreRecord, evaluate, metrics_of, score_files
from training.export import export, fused_graph, load_exported
from training.fit import Progress as FitProgress
from training.fit import fit
from training.pretrain import PretrainProgress, pretrain
from training.repository import Serving, Target, parse_server_version
from training.scenes import PRODUCTS, Amounts, render_scenes
from training.teacher import load_teacher, random_teacher, weights_sha256

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Folder = Annotated[Path, typer.Option(file_okay=False, help="Folder to write to.")]


@app.callback()
def _about() -> None:
    """Fits, measures and exports the models that LogicRD serves."""


@app.command("scenes")
def scenes_command(
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder that gets one folder a product.")],
    product: Annotated[str, typer.Option(help=f"One of {', '.join(PRODUCTS)}, or all.")] = "all",
    train: Annotated[int, typer.Option(min=2, help="Good pictures to fit on.")] = 300,
    validation: Annotated[int, typer.Option(min=2, help="Good pictures to calibrate on.")] = 60,
    test: Annotated[int, typer.Option(min=1, help="Test pictures of each kind: good, logical, structural.")] = 60,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same pictures.")] = 7,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; one a core otherwise.")] = None,
) -> None:
    """Render products as data sets in the MVTec LOCO layout."""
    amounts = Amounts(train, validation, test)
    for name in PRODUCTS if product == "all" else (product,):
        with _progress() as bar:
            task = bar.add_task(f"scenes {name}", total=1.0, note="")
            render_scenes(out / name, name, amounts, seed, partial(_advance, bar, task), workers)
        typer.echo(str(out / name))


@app.command("fit")
def fit_command(
    data: Annotated[Path, typer.Option(file_okay=False, help="Product folder in MVTec LOCO layout.")],
    out: Annotated[Path, typer.Option(file_okay=False, help="Bundle folder to write.")],
    product: Annotated[str | None, typer.Option(help="Product name; the data folder's name otherwise.")] = None,
    config: Annotated[Path, typer.Option(dir_okay=False, help="YAML of settings.")] = CONFIGS / "demo.yaml",
    teacher: Annotated[Path | None, typer.Option(dir_okay=False, help="Teacher weights, safetensors.")] = None,
    random_seed: Annotated[int | None, typer.Option("--random-teacher", help="Seed of an untrained teacher.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Overrides max_steps.")] = None,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Overrides max_minutes.")] = None,
) -> None:
    """Train on the normals of one product, calibrate, and write a bundle."""
    changes = {"max_steps": steps, "max_minutes": minutes}
    settings = load_config(FitConfig, config)
    settings = settings.model_copy(update={key: value for key, value in changes.items() if value is not None})
    if (teacher is None) == (random_seed is None):
        raise ConfigError("fit: give either --teacher FILE or --random-teacher SEED")
    name = check_product_name(product or data.resolve().name)
    network = load_teacher(teacher) if teacher is not None else random_teacher(random_seed or 0)
    folder = open_loco(data)
    check_readable(file for files in folder.test.values() for file in files)
    with _progress() as bar:
        task = bar.add_task(f"fit {name}", total=1.0, note="")

        def report(now: FitProgress) -> None:
            note = f"step {now.step}  loss {now.loss:.4f}  validation {now.validation_loss:.4f}  "
            bar.update(task, completed=now.share, note=note + f"{now.images_per_s:.1f} images/s")

        detector = fit(folder, name, network, settings, report)
    # Kept before it is measured: a failing report must not cost the training.
    save_bundle(out, detector)
    if folder.test:
        metrics, _ = evaluate(detector, folder)
        description = detector.description.model_copy(update={"metrics": metrics})
        detector = replace(detector, description=description)
        save_bundle(out, detector)
    typer.echo(detector.description.model_dump_json(indent=1, include={"product", "calibration", "metrics"}))


@app.command("pretrain")
def pretrain_command(
    out: Annotated[Path, typer.Option(dir_okay=False, help="Weights to write, safetensors.")],
    config: Annotated[Path, typer.Option(dir_okay=False, help="YAML of settings.")] = CONFIGS / "pretrain.yaml",
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Overrides minutes.")] = None,
) -> None:
    """Train a teacher from scratch on drawn pictures; no data needed."""
    settings = load_config(PretrainConfig, config)
    settings = settings if minutes is None else settings.model_copy(update={"minutes": minutes})
    with _progress() as bar:
        task = bar.add_task("pretrain", total=1.0, note="")

        def report(now: PretrainProgress) -> None:
            note = f"step {now.step}  loss {now.loss:.4f}  {now.images_per_s:.0f} images/s"
            bar.update(task, completed=now.share, note=note)

        pretrain(settings, out, report)
    typer.echo(f"{out} {weights_sha256(load_teacher(out))}")


@app.command("evaluate")
def evaluate_command(
    model: Annotated[Path, typer.Option(file_okay=False, help="Bundle, or product folder in a model repository.")],
    data: Annotated[Path | None, typer.Option(file_okay=False, help="Product folder in MVTec LOCO layout.")] = None,
    images: Annotated[Path | None, typer.Option(file_okay=False, help="Folder of pictures to score.")] = None,
    as_json: Json = False,
) -> None:
    """Score a test split (AUROC) or a folder of pictures with the torch model."""
    if (data is None) == (images is None):
        raise ConfigError("evaluate: give either --data or --images")
    exported = (model / "manifest.json").is_file()
    detector = load_exported(model.parent, model.resolve().name) if exported else load_bundle(model)
    records: list[ScoreRecord] = []
    answer: dict[str, object] = {"product": detector.description.product}
    if data is not None:
        metrics, records = evaluate(detector, open_loco(data, need_test=True))
        answer |= metrics.model_dump()
        answer["branches"] = {
            name: metrics_of(records, name).image_auroc.model_dump() for name in ("map_score", "mahalanobis")
        }
    elif images is not None:
        records = score_files(detector, list_images(images))
    if as_json:
        typer.echo(json.dumps(answer | {"scores": [record.model_dump() for record in records]}))
    else:
        _print_report(answer, records if data is None else [])


@app.command("export")
def export_command(
    bundle: Annotated[Path | None, typer.Argument(help="Bundle folder written by fit.")] = None,
    models: Annotated[Path, typer.Option(file_okay=False, help="Model repository.")] = Path("models_repo"),
    target: Annotated[Target, typer.Option(help="Where it will be served.")] = Target.CPU,
    server_version: Annotated[str, typer.Option(help="Triton server version.")] = "2.51",
    fused: Annotated[Path | None, typer.Option(dir_okay=False, help="Write one joined ONNX graph here.")] = None,
    product: Annotated[str | None, typer.Option(help="Product to join, with --fused.")] = None,
) -> None:
    """Add a bundle to a model repository as a new version, or join an exported product into one ONNX graph."""
    if (bundle is None) == (fused is None) or (fused is None) != (product is None):
        raise ConfigError("export: give either BUNDLE, or --fused FILE with --product NAME")
    if bundle is not None:
        manifest = export(load_bundle(bundle), models, Serving(target, parse_server_version(server_version)))
        typer.echo(f"{models / manifest.product} version {manifest.version} {manifest.model_sha256}")
    elif fused is not None and product is not None:
        onnx.save(fused_graph(models, product), fused)
        typer.echo(str(fused))


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
    return Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())


def _advance(bar: Progress, task: TaskID, share: float) -> None:
    bar.update(task, completed=share)


def _print_report(answer: dict[str, object], records: list[ScoreRecord]) -> None:
    for key, value in answer.items():
        typer.echo(f"{key}: {value}")
    for record in records:
        typer.echo(f"{record.score:9.3f} {record.map_score:9.4f} {record.mahalanobis:9.3f}  {record.file}")


def main() -> None:
    """Runs a command and ends the process with its exit code."""
    try:
        app()
    except TrainingError as error:
        sys.stderr.write(f"logicrd-train: {error}\n")
        raise SystemExit(error.exit_code) from error
    except OSError as error:
        sys.stderr.write(f"logicrd-train: '{error.filename}': {error.strerror}; check the path and its rights\n")
        raise SystemExit(3) from error
    except KeyboardInterrupt as error:
        raise SystemExit(130) from error
