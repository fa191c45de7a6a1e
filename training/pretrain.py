"""Pre-trains the teacher from scratch on drawn pictures, so that a model can ship without licensed photographs.

Formula-driven: a picture holds a few shapes of eight kinds and eight colours on a ground that means nothing; the target
is how many of each kind and colour it holds, predicted at every position and summed. That makes features local,
additive and blind to the ground, which is what counting parts needs. Never sees a scene or a product. Called by `cli`.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from training.config import PretrainConfig
from training.errors import TrainingError
from training.teacher import CHANNELS, Teacher
from training.textures import PHOTOGRAPHS, relief

KINDS = ("disc", "ring", "square", "triangle", "bar", "cross", "hexagon", "crescent")
# RGB, far enough apart to survive tint, shade and noise.
COLOURS = (
    (200, 40, 40),
    (40, 160, 60),
    (50, 80, 200),
    (220, 190, 50),
    (150, 60, 170),
    (40, 180, 190),
    (40, 40, 40),
    (225, 225, 225),
)
TARGETS = len(KINDS) + len(COLOURS)
MAX_SHAPES = 11
# Half the width of a shape in pixels of the model's input, where parts of a product measure 10 to 60.
RADIUS = (5.0, 15.0)
CHECKPOINT_EVERY_S = 60.0
# Room for the shadow of a shape and its soft edge.
WINDOW_MARGIN = 12
# Level 2 learns the same counts with less weight, so that its channels name parts too.
LEVEL2_WEIGHT = 0.5


@dataclass(frozen=True, slots=True)
class PretrainProgress:
    """Told after every step: `share` of the budget used, running mean of the loss, pictures a second."""

    step: int
    share: float
    loss: float
    images_per_s: float


class Counter(nn.Module):
    """A teacher with one counting head each on levels 2 and 3: (B, H, W, 3) uint8 to two (B, TARGETS) counts."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.teacher = teacher
        self.head2 = nn.Conv2d(CHANNELS[1], TARGETS, 1)
        self.head3 = nn.Conv2d(CHANNELS[2], TARGETS, 1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Counts are never negative: softplus at each position, then the sum over positions."""
        _, f2, f3 = self.teacher(image)
        # A fresh head would count ln 2 at each of hundreds of positions; the shift starts it near zero.
        counts2 = F.softplus(self.head2(f2) - 5.0).sum(dim=(2, 3))
        return counts2, F.softplus(self.head3(f3) - 4.0).sum(dim=(2, 3))


class DrawnPictures(IterableDataset[tuple[NDArray[np.uint8], NDArray[np.float32]]]):
    """Endless seeded stream of (picture (s, s, 3) uint8, counts (TARGETS,) float32)."""

    def __init__(self, size: int, seed: int) -> None:
        self._size, self._seed = size, seed

    def __iter__(self) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.float32]]]:
        generator = np.random.default_rng(self._seed)
        while True:
            yield draw_picture(self._size, generator)


def pretrain(config: PretrainConfig, out: Path, report: Callable[[PretrainProgress], None], workers: int = 1) -> None:
    """Trains until minutes or steps run out; writes layers 1 to 3 to `out` as FP16 safetensors.

    It does so every minute and at the end, replacing the file in one step: a kill leaves the last whole checkpoint.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    counter = Counter(Teacher()).train().to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(counter.parameters(), lr=config.learning_rate, weight_decay=0.01)
    loader = DataLoader(DrawnPictures(config.picture_size, config.seed), config.batch_size, num_workers=workers)
    started = saved = time.monotonic()
    running = 0.0
    for step, (pictures, counts) in enumerate(loader, start=1):
        share = max((time.monotonic() - started) / (60 * config.minutes), step / config.max_steps)
        for group in optimiser.param_groups:
            group["lr"] = config.learning_rate * _schedule(step, share)
        loss = _train_step(counter, optimiser, pictures, counts)
        if not math.isfinite(loss):
            raise TrainingError(f"step {step}: the loss is {loss}; lower learning_rate")
        running = loss if step == 1 else 0.98 * running + 0.02 * loss
        now = time.monotonic()
        report(PretrainProgress(step, min(share, 1.0), running, step * config.batch_size / (now - started)))
        if share >= 1:
            break
        if now - saved > CHECKPOINT_EVERY_S:
            save_teacher(counter.teacher, out)
            saved = now
    save_teacher(counter.teacher, out)


def save_teacher(teacher: Teacher, path: Path) -> None:
    """Writes the weights as FP16 safetensors, replacing `path` in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().half().contiguous()
        for name, tensor in teacher.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial)
    partial.replace(path)


def _schedule(step: int, share: float) -> float:
    """Warm-up over 100 steps, then half a cosine down to nothing at the end of the budget."""
    return min(1.0, step / 100) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


def _train_step(counter: Counter, optimiser: torch.optim.Optimizer, pictures: Tensor, counts: Tensor) -> float:
    counts2, counts3 = counter(pictures)
    loss = F.smooth_l1_loss(counts3, counts) + LEVEL2_WEIGHT * F.smooth_l1_loss(counts2, counts)
    optimiser.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(counter.parameters(), 5.0)
    optimiser.step()
    return loss.item()


def draw_picture(size: int, generator: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """One picture (size, size, 3) uint8 RGB and its counts: kinds first, then colours."""
    picture = draw_ground(size, generator)
    counts = np.zeros(TARGETS, dtype=np.float32)
    placed: list[tuple[float, float, float]] = []
    for _ in range(generator.integers(0, MAX_SHAPES + 1)):
        radius = float(generator.uniform(*RADIUS))
        x, y = (float(v) for v in generator.uniform(radius, size - radius, size=2))
        if any(math.hypot(x - px, y - py) < 0.8 * (radius + pr) for px, py, pr in placed):
            continue
        placed.append((x, y, radius))
        kind, colour = int(generator.integers(len(KINDS))), int(generator.integers(len(COLOURS)))
        counts[kind] += 1
        counts[len(KINDS) + colour] += 1
        _draw_shape(picture, KINDS[kind], COLOURS[colour], (x, y, radius), generator)
    return _photograph(picture, generator), counts


def draw_ground(size: int, generator: np.random.Generator) -> NDArray[np.float32]:
    """A ground of one of six families, (size, size, 3) float32 in 0..255."""
    # Half of the grounds are nearly grey, as trays and metal are.
    chroma = generator.uniform(-80, 80, size=3) * (1.0 if generator.random() < 0.5 else 0.15)
    colour = np.clip(generator.uniform(20, 225) + chroma, 5, 250).astype(np.float32)
    ground = np.broadcast_to(colour, (size, size, 3)).copy()
    family = int(generator.integers(6))
    if family >= 3:
        photograph = PHOTOGRAPHS[int(generator.integers(len(PHOTOGRAPHS)))]
        texture = relief(photograph, (size, size), float(generator.uniform(0.3, 1.5)), generator)
        return np.asarray(ground + texture[..., None] * generator.uniform(5, 45), dtype=np.float32)
    if family == 0:
        return ground
    if family == 1:
        cells = generator.uniform(-1, 1, size=(int(generator.integers(2, 24)),) * 2).astype(np.float32)
        blobs = cv2.resize(cells, (size, size), interpolation=cv2.INTER_CUBIC)
        return np.asarray(ground + blobs[..., None] * generator.uniform(10, 60, size=3), dtype=np.float32)
    angle, period = generator.uniform(0, math.pi), generator.uniform(4, 40)
    rows, columns = np.mgrid[0:size, 0:size]
    stripes = np.sin((rows * math.sin(angle) + columns * math.cos(angle)) * 2 * math.pi / period)
    stripes = np.sign(stripes) if generator.random() < 0.5 else stripes
    return np.asarray(ground + stripes[..., None] * generator.uniform(5, 60, size=3), dtype=np.float32)


def _draw_shape(
    picture: NDArray[np.float32],
    kind: str,
    colour: tuple[int, int, int],
    place: tuple[float, float, float],
    generator: np.random.Generator,
) -> None:
    x, y, radius = place
    # Only the window around the shape is touched: a third of the time of whole-picture arithmetic.
    left, top = (max(0, int(v - radius) - WINDOW_MARGIN) for v in (x, y))
    picture = picture[top : int(y + radius) + WINDOW_MARGIN, left : int(x + radius) + WINDOW_MARGIN]
    place = (x - left, y - top, radius)
    mask = shape_mask(picture.shape[:2], kind, place, float(generator.uniform(0, 2 * math.pi)), generator)
    if generator.random() < 0.6:
        shift = generator.integers(-4, 5, size=2)
        shadow = np.roll(cv2.GaussianBlur(mask, (0, 0), 1.5), tuple(shift), axis=(0, 1))
        picture *= 1 - 0.5 * shadow[..., None]
    tint = np.array(colour, dtype=np.float32) * generator.uniform(0.8, 1.15) + generator.normal(0, 8, size=3)
    light = _shading(mask, generator) if generator.random() < 0.7 else np.ones_like(mask)
    picture += mask[..., None] * (tint * light[..., None] - picture)


def _shading(mask: NDArray[np.float32], generator: np.random.Generator) -> NDArray[np.float32]:
    """Round edges lit from one side: brightness factor (h, w) from the slope of the blurred mask."""
    soft = cv2.GaussianBlur(mask, (0, 0), float(generator.uniform(1, 3)))
    angle = generator.uniform(0, 2 * math.pi)
    slope = cv2.Sobel(soft, cv2.CV_32F, 1, 0) * math.cos(angle) + cv2.Sobel(soft, cv2.CV_32F, 0, 1) * math.sin(angle)
    return np.asarray(1 + slope * generator.uniform(0.1, 0.5), dtype=np.float32)


def shape_mask(
    shape: tuple[int, ...], kind: str, place: tuple[float, float, float], angle: float, generator: np.random.Generator
) -> NDArray[np.float32]:
    """Coverage of one shape, (h, w) float32 in 0..1; `place` is (x, y, radius) in pixels."""
    mask = np.zeros(shape, dtype=np.uint8)
    x, y, radius = place
    centre = (round(x * 16), round(y * 16))
    if kind in ("disc", "ring", "crescent"):
        cv2.circle(mask, centre, round(radius * 16), 255, -1, cv2.LINE_AA, 4)
        if kind == "ring":
            cv2.circle(mask, centre, round(radius * generator.uniform(0.4, 0.65) * 16), 0, -1, cv2.LINE_AA, 4)
        if kind == "crescent":
            aside = (x + 0.55 * radius * math.cos(angle), y + 0.55 * radius * math.sin(angle))
            away = (round(aside[0] * 16), round(aside[1] * 16))
            cv2.circle(mask, away, round(radius * 0.8 * 16), 0, -1, cv2.LINE_AA, 4)
    else:
        points = _outline(kind, generator) * radius
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        cv2.fillPoly(mask, [np.round((points @ turn.T + (x, y)) * 16).astype(np.int32)], 255, cv2.LINE_AA, 4)
        if kind == "hexagon":
            cv2.circle(mask, centre, round(radius * 0.45 * 16), 0, -1, cv2.LINE_AA, 4)
    return np.asarray(mask / np.float32(255), dtype=np.float32)


def _outline(kind: str, generator: np.random.Generator) -> NDArray[np.float64]:
    """Corners of a shape within the unit circle, (n, 2)."""
    if kind == "bar":
        half = generator.uniform(0.12, 0.25)
        return np.array([(-1, -half), (1, -half), (1, half), (-1, half)])
    if kind == "cross":
        a = generator.uniform(0.2, 0.35)
        quarter = [(a, a), (a, 1), (-a, 1)]
        turns = ((1, 0), (0, 1), (-1, 0), (0, -1))
        return np.array([(x * c - y * s, x * s + y * c) for c, s in turns for x, y in quarter])
    corners = {"square": 4, "triangle": 3, "hexagon": 6}[kind]
    angles = np.arange(corners) * 2 * math.pi / corners
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _photograph(picture: NDArray[np.float32], generator: np.random.Generator) -> NDArray[np.uint8]:
    """What a camera adds: uneven light, blur, noise, exposure."""
    size = picture.shape[0]
    corners = generator.uniform(0.75, 1.2, size=(2, 2)).astype(np.float32)
    picture = picture * cv2.resize(corners, (size, size), interpolation=cv2.INTER_LINEAR)[..., None]
    if generator.random() < 0.5:
        picture = np.asarray(cv2.GaussianBlur(picture, (0, 0), float(generator.uniform(0.3, 1.2))), dtype=np.float32)
    noise = generator.standard_normal(picture.shape, dtype=np.float32) * generator.uniform(0, 8)
    return np.asarray(np.clip(picture + noise, 0, 255), dtype=np.uint8)
