"""Reverse distillation (Deng & Li, CVPR 2022): teacher, bottleneck, student and the map between them.

Recipe of the official code: cosine of the whole flattened tensors as loss, map = sum over levels of 1 - cosine, score =
maximum of the smoothed map. Ours: the map has the size of level 1 (64 x 64 at 256) and smoothing lies in the graph.
Built by `fit` and `detector`; holds no optimiser, no threshold and no file.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.modules.bottleneck import Bottleneck
from training.modules.decoder import Decoder
from training.modules.resnet import Features
from training.teacher import CHANNELS, Teacher

# Sigma 4 of the official code at 256 pixels is 1 at 64; four sigmas each side, as scipy truncates.
SMOOTHING_SIGMA = 1.0
SMOOTHING_RADIUS = 4


class AnomalyMap(nn.Module):
    """Teacher's and student's features to `anomaly_map` (B, side, side), smoothed, and `map_score` (B, 1), its maximum.

    Smoothing is two products with a fixed matrix: exact at the borders, and the graph needs no padding operator.
    """

    smoothing: Tensor

    def __init__(self, side: int) -> None:
        super().__init__()
        self.register_buffer("smoothing", smoothing_matrix(side), persistent=False)

    def forward(self, f1: Tensor, f2: Tensor, f3: Tensor, d1: Tensor, d2: Tensor, d3: Tensor) -> tuple[Tensor, Tensor]:
        """Range 0 to 6 in theory, 0 to 3 after ReLU features; never clamped."""
        side = self.smoothing.shape[0]
        raw = cosine_distance(f1, d1)
        for teacher_level, student_level in ((f2, d2), (f3, d3)):
            level = cosine_distance(teacher_level, student_level)
            raw = raw + F.interpolate(level, size=(side, side), mode="bilinear", align_corners=False)
        smooth = torch.matmul(torch.matmul(self.smoothing, raw), self.smoothing.t()).squeeze(1)
        return smooth, smooth.amax(dim=(1, 2)).unsqueeze(1)


def smoothing_matrix(side: int) -> Tensor:
    """(side, side) matrix S such that S x is x convolved with the Gaussian along its rows, mirrored at the borders."""
    matrix = torch.zeros(side, side, dtype=torch.float64)
    for row in range(side):
        for offset in range(-SMOOTHING_RADIUS, SMOOTHING_RADIUS + 1):
            column = abs(row + offset)
            column = min(column, 2 * (side - 1) - column)
            matrix[row, column] += math.exp(-0.5 * (offset / SMOOTHING_SIGMA) ** 2)
    return (matrix / matrix.sum(dim=1, keepdim=True)).float()


class ReverseDistillation(nn.Module):
    """The four served networks in one module: `teacher` frozen, `bottleneck` and `student` trained, `map` fixed."""

    def __init__(self, teacher: Teacher, width: int, image_size: int = 256) -> None:
        super().__init__()
        self.width = width
        self.image_size = image_size
        self.teacher = teacher
        self.bottleneck = Bottleneck(CHANNELS, width)
        self.student = Decoder(CHANNELS, width)
        self.map = AnomalyMap(image_size // 4)
        self.teacher.requires_grad_(False)

    def train(self, mode: bool = True) -> "ReverseDistillation":
        """As nn.Module.train, but the teacher's norms stay in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def loss(self, image: Tensor) -> Tensor:
        """Distillation loss of (B, H, W, 3) uint8 pictures: a scalar from 0 (equal) to 6."""
        with torch.no_grad():
            features: Features = self.teacher(image)
        embedding, _ = self.bottleneck(*features)
        return distillation_loss(features, self.student(embedding))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, H, W, 3) uint8 to (anomaly_map (B, h, w), map_score (B, 1), descriptor (B, D)), as served."""
        features = self.teacher(image)
        embedding, descriptor = self.bottleneck(*features)
        anomaly_map, map_score = self.map(*features, *self.student(embedding))
        return anomaly_map, map_score, descriptor


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - cosine over channels at each position: (B, C, H, W) twice to (B, 1, H, W)."""
    dot = (a * b).sum(dim=1, keepdim=True)
    norms = (a.square().sum(dim=1, keepdim=True) * b.square().sum(dim=1, keepdim=True)).sqrt()
    return 1 - dot / norms.clamp_min(1e-8)


def distillation_loss(features: Features, rebuilt: Features) -> Tensor:
    """Sum over levels of the batch mean of 1 - cosine of the whole flattened tensors: the official code's loss.

    The paper prints a per-position form instead, which trains measurably worse (RD4AD issue 22).
    """
    pairs = zip(features, rebuilt, strict=True)
    levels = [1 - F.cosine_similarity(f.flatten(1), d.flatten(1)).mean() for f, d in pairs]
    return torch.stack(levels).sum()
