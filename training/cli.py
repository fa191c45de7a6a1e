"""The command `logicrd-train`: scenes, pretrain, fit, evaluate, compare, export.

Turns arguments into calls and errors into one line with an exit code; computes nothing itself. stdout is the answer,
stderr the rest; progress bars appear on a terminal only.
"""

import fcntl
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import onnx
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from training.card import summary, write_report
from training.checkpoint import FILE as CHECKPOINT
from training.compare import NETWORKS, Equal, product_folders, run_all, tasks_of
from training.config import CONFIGS, MAX_SEED, FitConfig, PretrainConfig, changed, check_product_name, load_config
from training.data import check_pictures, list_images, open_data
from training.detector import load_bundle, save_bundle
from training.errors import ConfigError, TrainingError
from training.evaluate import ScoreRecord, evaluate, score_files, write_maps
from training.export import export, fused_graph, load_exported
from training.fit import Places, fit, process_group
from training.fit import Progress as FitProgress
from training.masks import open_masks
from training.pretrain import PretrainProgress, pretrain
from training.repository import Serving, Target, parse_server_version
from training.scenes import PRODUCTS, Amounts, parse_size, render_scenes
from training.speed import measure_speed
from training.table import make_table, markdown
from training.teacher import ARCH, SHIPPED, AnyTeacher, load_teacher, named_teacher, random_teacher, weights_sha256

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
DATA_HELP = "Product folder: MVTec LOCO, MVTec AD, or pictures with the good ones in good/."
TEACHER_HELP = "Weights: a safetensors file, torchvision/<model> or timm/<model>; the shipped one otherwise."
Teacher = Annotated[Path | None, typer.Option(help=TEACHER_HELP, dir_okay=False)]
Arch = Annotated[str, typer.Option("--arch", help="Backbone of a weight file: resnet18, or any timm name.")]
TeacherHash = Annotated[str | None, typer.Option(help="Refuse weights of another hash; first digits are enough.")]
RandomSeed = Annotated[
    int | None, typer.Option("--random-teacher", min=0, max=MAX_SEED, help="Seed of an untrained teacher.")
]
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
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels; the product's own otherwise.")] = None,
) -> None:
    """Render products as data sets in the MVTec LOCO layout."""
    amounts = Amounts(train, validation, test)
    pixels = None if size is None else parse_size(size)
    for name in PRODUCTS if product == "all" else (product,):
        with _progress() as bar:
            task = bar.add_task(f"scenes {name}", total=1.0, note="")
            render_scenes(out / name, name, amounts, seed, partial(_advance, bar, task), workers, pixels)
        typer.echo(str(out / name))


@app.command("fit")
def fit_command(
    data: Annotated[Path, typer.Option(file_okay=False, help=DATA_HELP)],
    out: Annotated[Path, typer.Option(file_okay=False, help="Bundle folder to write.")],
    product: Annotated[str | None, typer.Option(help="Product name; the data folder's name otherwise.")] = None,
    config: Annotated[Path, typer.Option(dir_okay=False, help="YAML of settings.")] = CONFIGS / "demo.yaml",
    teacher: Teacher = None,
    arch: Arch = ARCH,
    teacher_sha256: TeacherHash = None,
    random_seed: RandomSeed = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Overrides max_steps.")] = None,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Overrides max_minutes.")] = None,
    size: Annotated[int | None, typer.Option(min=64, max=1024, help="Overrides image_size.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Overrides seed.")] = None,
    cache: Annotated[Path | None, typer.Option(file_okay=False, help="Folder for pictures and features.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a killed run of the same --out was.")] = False,
    log: Annotated[Path | None, typer.Option(file_okay=False, help="Folder for TensorBoard.")] = None,
) -> None:
    """Train on the normals of one product, calibrate, and write a bundle."""
    changes = {"max_steps": steps, "max_minutes": minutes, "image_size": size, "seed": seed}
    settings = changed(load_config(FitConfig, config), changes, "fit")
    name = check_product_name(product or data.resolve().name)
    network = _teacher(teacher, arch, teacher_sha256, random_seed)
    folder = open_data(data)
    open_masks(folder)
    check_pictures(folder)
    with (
        process_group() as first,
        _alone(out, first),
        _progress(shown=first) as bar,
        _logged(log if first else None) as write,
    ):
        if first and not resume:
            (out / CHECKPOINT).unlink(missing_ok=True)
        task = bar.add_task(f"fit {name}", total=1.0, note="")

        def report(now: FitProgress) -> None:
            note = f"step {now.step}  loss {now.loss:.4f}  validation {now.validation_loss:.4f}  "
            bar.update(task, completed=now.share, note=note + f"{now.images_per_s:.1f} images/s")
            write(now)

        with _folder(cache) as kept:
            detector = fit(folder, name, network, settings, report, Places(kept, out))
        if not first:
            return
    # Kept before it is measured: a failing report must not cost the training.
    save_bundle(out, detector)
    (out / CHECKPOINT).unlink(missing_ok=True)
    if folder.test:
        metrics = evaluate(detector, folder).report.image
        description = detector.description.model_copy(update={"metrics": metrics})
        detector = replace(detector, description=description)
        save_bundle(out, detector)
    typer.echo(detector.description.model_dump_json(indent=1, include={"product", "calibration", "metrics"}))


@app.command("pretrain")
def pretrain_command(
    out: Annotated[Path, typer.Option(dir_okay=False, help="Weights to write, safetensors.")],
    config: Annotated[Path, typer.Option(dir_okay=False, help="YAML of settings.")] = CONFIGS / "pretrain.yaml",
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Overrides minutes.")] = None,
    start: Annotated[Path | None, typer.Option(dir_okay=False, help="Teacher to begin with, safetensors.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a killed run of the same --out was.")] = False,
) -> None:
    """Train a teacher from scratch on drawn pictures; no data needed."""
    settings = load_config(PretrainConfig, config)
    settings = changed(settings, {"minutes": minutes}, "pretrain")
    with _progress() as bar:
        task = bar.add_task("pretrain", total=1.0, note="")

        def report(now: PretrainProgress) -> None:
            note = f"step {now.step}  loss {now.loss:.4f}  {now.images_per_s:.0f} images/s"
            bar.update(task, completed=now.share, note=note)

        train = partial(pretrain, start=start, resume=resume) if start or resume else pretrain
        train(settings, out, report)
    typer.echo(f"{out} {weights_sha256(load_teacher(out))}")


@app.command("compare")
def compare_command(
    data: Annotated[Path, typer.Option(file_okay=False, help="A product folder, or a folder of product folders.")],
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for runs, compare.json and compare.md.")],
    teacher: Teacher = None,
    arch: Arch = ARCH,
    teacher_sha256: TeacherHash = None,
    random_seed: RandomSeed = None,
    networks: Annotated[str, typer.Option(help="Networks to train, by comma.")] = ",".join(NETWORKS),
    seeds: Annotated[str, typer.Option(help="Seeds, by comma; fewer than three say little.")] = "111,112,113",
    steps: Annotated[int, typer.Option(min=1, help="Steps of every run.")] = 5000,
    batch_size: Annotated[int, typer.Option(min=2, help="Pictures of a step.")] = 16,
    size: Annotated[int, typer.Option(min=64, max=1024, help="Height and width of the pictures.")] = 256,
    precision: Annotated[Literal["auto", "fp32", "bf16"], typer.Option(help="As the setting of that name.")] = "auto",
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time; they share the cores.")] = 1,
    rounds: Annotated[int, typer.Option(min=0, help="Rounds of the speed measurement; 0 leaves it out.")] = 30,
    keep_models: Annotated[bool, typer.Option("--keep-models", help="Keep each new run's bundle.")] = False,
    as_json: Json = False,
) -> None:
    """Train and measure LogicRD, its ablations, RD and DSKD on the same terms; resumes, and prints one table."""
    wanted = networks.split(",")
    drawn = seeds.split(",")
    if not set(wanted) <= set(NETWORKS) or not all(seed.isdecimal() for seed in drawn):
        raise ConfigError(f"compare: networks are {', '.join(NETWORKS)}; seeds are numbers by comma")
    if len(set(wanted)) < len(wanted) or len(set(drawn)) < len(drawn):
        raise ConfigError("compare: a network or a seed stands twice; each is run once")
    network = _teacher(teacher, arch, teacher_sha256, random_seed)
    equal = Equal(
        image_size=size,
        steps=steps,
        batch_size=batch_size,
        precision=precision,
        teacher_arch=network.arch,
        teacher_sha256=weights_sha256(network),
    )
    products, numbers = product_folders(data), [int(seed) for seed in drawn]
    tasks = tasks_of(products, out, network, equal, wanted, numbers, keep_models=keep_models)
    with _alone(out), _progress() as bar:
        task = bar.add_task("compare", total=len(tasks), note="")
        results = run_all(tasks, jobs, lambda done, note: bar.update(task, completed=done, note=note))
    configs = {result.network: result.config.network() for result in results}
    speeds = measure_speed(configs, network.arch, rounds) if rounds else {}
    table = make_table(results, speeds, equal, f"ONNX Runtime, {os.cpu_count()} CPU cores")
    text = markdown(table)
    (out / "compare.json").write_text(table.model_dump_json(indent=1) + "\n", encoding="utf-8")
    (out / "compare.md").write_text(text, encoding="utf-8")
    typer.echo(table.model_dump_json() if as_json else text)


@app.command("evaluate")
def evaluate_command(
    model: Annotated[Path, typer.Option(file_okay=False, help="Bundle, or product folder in a model repository.")],
    data: Annotated[Path | None, typer.Option(file_okay=False, help=DATA_HELP)] = None,
    images: Annotated[Path | None, typer.Option(file_okay=False, help="Folder of pictures to score.")] = None,
    out: Annotated[Path | None, typer.Option(file_okay=False, help="Folder for report, pictures and card.")] = None,
    maps: Annotated[Path | None, typer.Option(file_okay=False, help="Folder for maps in LOCO's TIFF layout.")] = None,
    as_json: Json = False,
) -> None:
    """Measure a model on a test split (AUROC, AU-sPRO), or score a folder of pictures, with the torch model."""
    if (data is None) == (images is None):
        raise ConfigError("evaluate: give either --data or --images")
    if data is None and (out is not None or maps is not None):
        raise ConfigError("evaluate: --out and --maps need --data, a test split to report on")
    exported = (model / "manifest.json").is_file()
    detector = load_exported(model.parent, model.resolve().name) if exported else load_bundle(model)
    records: list[ScoreRecord] = []
    answer: dict[str, object] = {"product": detector.description.product}
    lines: list[str] = []
    if data is not None:
        folder = open_data(data, need_test=True)
        for place in (out, maps):
            if place is not None:
                # Before minutes of scoring: a folder that cannot be made.
                place.mkdir(parents=True, exist_ok=True)
        evaluation = evaluate(detector, folder)
        records = evaluation.records
        answer = evaluation.report.model_dump()
        lines = summary(evaluation.report)
        if out is not None:
            write_report(out, detector.description, evaluation)
        if maps is not None:
            write_maps(maps, evaluation)
    elif images is not None:
        records = score_files(detector, list_images(images))
        lines = [f"{r.score:9.3f} {r.map_score:9.4f} {r.mahalanobis:9.3f}  {r.file}" for r in records]
    if as_json:
        typer.echo(json.dumps(answer | {"scores": [record.model_dump() for record in records]}))
    else:
        typer.echo("\n".join([f"product: {detector.description.product}", *lines]))


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


def _teacher(file: Path | None, arch: str, sha256: str | None, seed: int | None) -> AnyTeacher:
    if file is not None and seed is not None:
        raise ConfigError(
            "give either --teacher FILE|NAME or --random-teacher SEED, or neither for the shipped teacher"
        )
    if seed is not None:
        return random_teacher(seed, arch)
    file = file or SHIPPED
    name = file.as_posix()
    if name.startswith(("torchvision/", "timm/")) and not file.exists():
        return named_teacher(name, sha256)
    return load_teacher(file, arch, sha256)


@contextmanager
def _alone(out: Path, needed: bool = True) -> Iterator[None]:
    """Holds the folder `out`, so that two runs never write over each other's files."""
    if not needed:
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"--out '{out}': another run writes there; wait, or give another folder") from error
        yield


@contextmanager
def _folder(kept: Path | None) -> Iterator[Path]:
    if kept is not None:
        yield kept
        return
    with tempfile.TemporaryDirectory(prefix="logicrd-fit-") as passing:
        yield Path(passing)


@contextmanager
def _logged(folder: Path | None) -> Iterator[Callable[[FitProgress], None]]:
    """Writes every step to TensorBoard, if a folder is given."""
    if folder is None:
        yield lambda _: None
        return
    # Imported here: TensorBoard takes a second that no other command needs.
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:

        def write(now: FitProgress) -> None:
            writer.add_scalar("loss/train", now.loss, now.step)
            writer.add_scalar("images_per_s", now.images_per_s, now.step)
            if math.isfinite(now.validation_loss):
                writer.add_scalar("loss/validation_best", now.validation_loss, now.step)

        yield write


def _progress(*, shown: bool = True) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
    return Progress(*columns, console=Console(stderr=True), disable=not (shown and sys.stderr.isatty()))


def _advance(bar: Progress, task: TaskID, share: float) -> None:
    bar.update(task, completed=share)


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


if __name__ == "__main__":
    main()
