"""Pre-trains the teacher from scratch on drawn pictures, so that a model can ship without licensed photographs.

Several tasks share the backbone, all of them answered at every position, so that features stay local and additive:
how many shapes of each kind, colour, size and pair (summed over positions: what counting parts needs), which ground,
kind and colour a position shows, where something is damaged, and how the picture without camera noise looks there.
Never sees a scene or a product. Draws with `drawing`; called by `cli`.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from training.checkpoint import network_state, read_file, replace_file, restore_optimiser, state_tensors
from training.config import PretrainConfig
from training.drawing import COLOURS, KINDS, SURFACES, Drawing, Shape, draw
from training.errors import DataError, TrainingError
from training.teacher import CHANNELS, Teacher, load_teacher

# Radii between the four classes of size, equal steps of the logarithm.
SIZE_EDGES = (4.1, 6.7, 11.0)
# Kinds, then colours, then sizes, which level 2 counts; level 3 counts every pair of kind and colour as well.
SINGLES = len(KINDS) + len(COLOURS) + len(SIZE_EDGES) + 1
PAIRS = len(KINDS) * len(COLOURS)
# Mean colour and eight rectified gradients, see `appearance`.
APPEARANCE = 11
CHECKPOINT_EVERY_S = 60.0
# Most positions are whole; without it the damage heads would learn to say nothing.
DAMAGE_WEIGHT = 4.0


class Weights(NamedTuple):
    """What one unit of each task's loss counts in the sum: set by hand so that counting, which needs features that add
    up, leads, and no other task drowns the rest; not tuned."""

    counts: float = 12.0
    pairs: float = 60.0
    surface: float = 0.1
    colour: float = 0.3
    damage: float = 1.0
    appearance: float = 3.0


class Targets(NamedTuple):
    """Truth of a batch; tuples go by level, (h, w) is the size of the level.

    counts (B, SINGLES + PAIRS) float32; surface (B, h, w) uint8 at levels 2 and 3; at levels 1 and 2 colour (B, h, w)
    uint8, damage (B, h, w) float32 in 0..1 and appearance (B, APPEARANCE, h, w) float32.
    """

    counts: Tensor
    surface: tuple[Tensor, Tensor]
    colour: tuple[Tensor, Tensor]
    damage: tuple[Tensor, Tensor]
    appearance: tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class PretrainProgress:
    """Told after every step: `share` of the budget used, running mean of the loss, pictures a second."""

    step: int
    share: float
    loss: float
    images_per_s: float


class Pretext(nn.Module):
    """A teacher with the heads of all tasks: 1 × 1 convolutions, so that whatever a head reads lies in one position."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.teacher = teacher
        self._dense = [len(COLOURS) + 1, 1, APPEARANCE]
        self.dense1 = nn.Conv2d(CHANNELS[0], sum(self._dense), 1)
        self.dense2 = nn.Conv2d(CHANNELS[1], sum(self._dense) + SURFACES, 1)
        self.dense3 = nn.Conv2d(CHANNELS[2], SURFACES, 1)
        self.count2 = nn.Conv2d(CHANNELS[1], SINGLES, 1)
        self.count3 = nn.Conv2d(CHANNELS[2], SINGLES + PAIRS, 1)

    def forward(self, image: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """(B, H, W, 3) uint8 to the answers of each task at its two levels, shaped as in `Targets`."""
        f1, f2, f3 = self.teacher(image)
        colour1, damage1, appearance1 = torch.split(self.dense1(f1), self._dense, dim=1)
        colour2, damage2, appearance2, surface2 = torch.split(self.dense2(f2), [*self._dense, SURFACES], dim=1)
        # Counts are never negative. A fresh head would count ln 2 at each of hundreds of positions; the shift starts
        # it near zero.
        counts2 = F.softplus(self.count2(f2).float() - 5.0).sum(dim=(2, 3))
        counts3 = F.softplus(self.count3(f3).float() - 4.0).sum(dim=(2, 3))
        return {
            "counts": (counts2, counts3),
            "surface": (surface2, self.dense3(f3)),
            "colour": (colour1, colour2),
            "damage": (damage1.squeeze(1), damage2.squeeze(1)),
            "appearance": (appearance1, appearance2),
        }


def pretext_loss(answers: dict[str, tuple[Tensor, Tensor]], targets: Targets, weights: Weights) -> Tensor:
    """Weighted sum of the losses of all tasks, a scalar."""
    counts2, counts3 = answers["counts"]
    single, pairs = torch.split(targets.counts, [SINGLES, PAIRS], dim=1)
    single3, pairs3 = torch.split(counts3, [SINGLES, PAIRS], dim=1)
    # Deeper features count better; level 2 learns the same with half the weight.
    counting = F.smooth_l1_loss(single3, single) + 0.5 * F.smooth_l1_loss(counts2, single)
    total = weights.counts * counting + weights.pairs * F.smooth_l1_loss(pairs3, pairs)
    positive = torch.tensor(DAMAGE_WEIGHT, device=total.device)
    for level in (0, 1):
        total = total + weights.surface * F.cross_entropy(answers["surface"][level], targets.surface[level].long())
        total = total + weights.colour * F.cross_entropy(answers["colour"][level], targets.colour[level].long())
        total = total + weights.damage * F.binary_cross_entropy_with_logits(
            answers["damage"][level], targets.damage[level], pos_weight=positive
        )
        total = total + weights.appearance * F.mse_loss(answers["appearance"][level], targets.appearance[level])
    return total


def targets_of(drawing: Drawing) -> Targets:
    """The truth of one picture, without the batch dimension. A position of stride s looks at pixel (s i, s j)."""
    surface, colour = torch.from_numpy(drawing.surface), torch.from_numpy(drawing.colour)
    looks = appearance(drawing.clean)
    return Targets(
        torch.from_numpy(count(drawing.shapes)),
        (surface[::8, ::8], surface[::16, ::16]),
        (colour[::4, ::4], colour[::8, ::8]),
        (_around(drawing.damage, 4).clamp(max=0.25) * 4, _around(drawing.damage, 8).clamp(max=0.25) * 4),
        (_around(looks, 4).permute(2, 0, 1), _around(looks, 8).permute(2, 0, 1)),
    )


def count(shapes: list[Shape]) -> NDArray[np.float32]:
    """How many shapes of each kind, colour, size and pair of kind and colour: (SINGLES + PAIRS,) float32."""
    counts = np.zeros(SINGLES + PAIRS, dtype=np.float32)
    for shape in shapes:
        counts[shape.kind] += 1
        counts[len(KINDS) + shape.colour] += 1
        counts[len(KINDS) + len(COLOURS) + int(np.searchsorted(SIZE_EDGES, shape.radius))] += 1
        counts[SINGLES + shape.kind * len(COLOURS) + shape.colour] += 1
    return counts


def appearance(clean: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(h, w, 3) uint8 to (h, w, APPEARANCE): colour in -1..1 and gradients rectified by direction, as HOG bins them."""
    grey = np.asarray(cv2.cvtColor(clean, cv2.COLOR_RGB2GRAY), dtype=np.float32) / 255
    dx, dy = cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1)
    strength = np.sqrt(dx * dx + dy * dy) + 1e-6
    # Twice the angle, so that the two sides of a line agree.
    straight, oblique = (dx * dx - dy * dy) / strength, 2 * dx * dy / strength
    signed = [np.maximum(v, 0) for value in (dx, dy, straight, oblique) for v in (value, -value)]
    return np.concatenate([clean / np.float32(127.5) - 1, np.stack(signed, axis=2)], axis=2, dtype=np.float32)


def _around(values: NDArray[np.float32], stride: int) -> Tensor:
    """Means over a window of the stride's width around each of its positions."""
    return torch.from_numpy(np.ascontiguousarray(cv2.blur(values, (stride, stride))[::stride, ::stride]))


class DrawnPictures(Dataset[tuple[Tensor, Targets]]):
    """Picture number i of a seed, for any i: the order can be resumed anywhere and shared by several processes."""

    def __init__(self, size: int, seed: int) -> None:
        self._size, self._seed = size, seed

    def __getitem__(self, index: int) -> tuple[Tensor, Targets]:
        """(picture (s, s, 3) uint8, its truth)."""
        # One core draws and the other trains; more threads would take turns.
        cv2.setNumThreads(1)
        drawing = draw(self._size, np.random.default_rng((self._seed, index)))
        return torch.from_numpy(drawing.photograph), targets_of(drawing)


class Run:
    """One pre-training run: the network, its optimiser, and how far they are."""

    def __init__(self, config: PretrainConfig, start: Path | None = None) -> None:
        self.config = config
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(config.seed)
        teacher = Teacher()
        if start is not None:
            teacher.load_state_dict(load_teacher(start).state_dict())
        self.network = Pretext(teacher).train().to(self.device)
        self.network.to(memory_format=torch.channels_last)
        self.optimiser = torch.optim.AdamW(self.network.parameters(), lr=config.learning_rate, weight_decay=0.01)
        self.step, self.seconds, self.loss = 0, 0.0, 0.0
        self._bf16 = config.precision == "bf16" or (config.precision == "auto" and self.device.type == "cuda")

    @property
    def share(self) -> float:
        """How much of the budget is used, 0..1 or a little more: of minutes or of steps, whichever is more."""
        return max(self.seconds / (60 * self.config.minutes), self.step / self.config.max_steps)

    def train_step(self, pictures: Tensor, targets: Targets) -> None:
        """One step of the optimiser; raises TrainingError where the loss is not finite."""
        self.step += 1
        for group in self.optimiser.param_groups:
            group["lr"] = self.config.learning_rate * _schedule(self.step, self.share)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16):
            answers = self.network(pictures.to(self.device))
        answers = {task: (first.float(), second.float()) for task, (first, second) in answers.items()}
        loss = pretext_loss(answers, _moved(targets, self.device), Weights())
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.network.parameters(), 5.0)
        self.optimiser.step()
        value = loss.item()
        if not math.isfinite(value):
            raise TrainingError(f"step {self.step}: the loss is {value}; lower learning_rate")
        self.loss = value if self.step == 1 else 0.98 * self.loss + 0.02 * value


def _moved(targets: Targets, device: torch.device) -> Targets:
    pairs = ((first.to(device), second.to(device)) for first, second in targets[1:])
    return Targets(targets.counts.to(device), *pairs)


def _schedule(step: int, share: float) -> float:
    """Warm-up over 100 steps, then half a cosine down to nothing at the end of the budget."""
    return min(1.0, step / 100) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


def pretrain(
    config: PretrainConfig,
    out: Path,
    report: Callable[[PretrainProgress], None],
    workers: int | None = None,
    *,
    start: Path | None = None,
    resume: bool = False,
) -> None:
    """Trains until minutes or steps run out; writes layers 1 to 3 to `out` as FP16 safetensors.

    Begins with random weights, or with those of the teacher file `start`. Writes every minute and at the end, replacing
    the file in one step, and keeps all that `resume` needs in a second file beside it until the end. A resumed run
    takes the steps that the killed one would have taken, to the last bit where steps and not minutes end it. Raises
    DataError where there is nothing to resume or it does not fit.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    run, checkpoint = Run(config, start), checkpoint_path(out)
    if resume:
        load_checkpoint(run, checkpoint)
    saved = started = time.monotonic() - run.seconds
    for pictures, targets in _batches(run, config.workers if workers is None else workers):
        run.seconds = time.monotonic() - started
        run.train_step(pictures, Targets(*targets))
        rate = run.step * config.batch_size / max(run.seconds, 1e-9)
        report(PretrainProgress(run.step, min(run.share, 1.0), run.loss, rate))
        if run.share >= 1:
            break
        if time.monotonic() - saved > CHECKPOINT_EVERY_S:
            save_checkpoint(run, checkpoint)
            save_teacher(run.network.teacher, out)
            saved = time.monotonic()
    save_teacher(run.network.teacher, out)
    checkpoint.unlink(missing_ok=True)


def _batches(run: Run, workers: int) -> DataLoader[tuple[Tensor, Targets]]:
    """The pictures from the run's next step on."""
    size = run.config.batch_size
    numbers = range(run.step * size, run.config.max_steps * size)
    return DataLoader(
        DrawnPictures(run.config.picture_size, run.config.seed),
        size,
        sampler=numbers,
        num_workers=workers,
        pin_memory=run.device.type == "cuda",
    )


def save_teacher(teacher: Teacher, path: Path) -> None:
    """Writes the weights as FP16 safetensors, replacing `path` in one step."""
    tensors = {
        name: tensor.detach().half().contiguous()
        for name, tensor in teacher.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    replace_file(path, tensors, {})


def checkpoint_path(out: Path) -> Path:
    """Where a run that writes `out` keeps what it needs to resume."""
    return out.with_name(out.name + ".checkpoint")


def save_checkpoint(run: Run, path: Path) -> None:
    """Network, optimiser and progress as one safetensors file, its settings as JSON in the header; never a pickle."""
    tensors = state_tensors(run.network.state_dict(), run.optimiser)
    progress = {"step": run.step, "seconds": run.seconds, "loss": run.loss, "config": run.config.model_dump_json()}
    replace_file(path, tensors, {"pretrain": json.dumps(progress)})


def load_checkpoint(run: Run, path: Path) -> None:
    """Puts `run` where the checkpoint was taken; raises DataError where the file is no checkpoint of these settings."""
    if not path.is_file():
        raise DataError(f"checkpoint '{path}': no such file; start without --resume")
    try:
        metadata, tensors = read_file(path)
        progress = json.loads(metadata["pretrain"])
    except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
        raise DataError(f"checkpoint '{path}': cannot be read ({error}); start without --resume") from error
    # What may change on the way: the budget and how the machine is used. The rest decides the result.
    free = {"minutes", "max_steps", "threads", "workers"}
    if PretrainConfig.model_validate_json(progress["config"]).model_dump(exclude=free) != run.config.model_dump(
        exclude=free
    ):
        raise DataError(f"checkpoint '{path}': taken with other settings; give those or start without --resume")
    run.network.load_state_dict(network_state(tensors))
    restore_optimiser(run.optimiser, tensors)
    run.step, run.seconds, run.loss = progress["step"], progress["seconds"], progress["loss"]
