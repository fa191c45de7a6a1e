"""Attention over sets of tokens, in the layout (B, channels, tokens), with 1 x 1 convolutions as its linear maps.

Convolutions keep their parameter names through the ONNX exporter, which matrix products with transposed constants do
not. Vaswani et al., NeurIPS 2017, less the bias of the scores. Used by `gse`.
"""

import math

import torch
from torch import Tensor, nn

# Below the smallest variance a channel of a trained network shows; keeps the quotient finite on constant tokens.
EPSILON = 1e-5


class Attention(nn.Module):
    """`queries` (B or 1, dim, n) look at `memory` (B, dim, m): (B, dim, n). Queries of batch 1 serve every picture.

    n and m are given to it: a graph whose shapes are constants spares the runtime computing them at every request.
    """

    def __init__(self, dim: int, heads: int, queries: int, memory: int) -> None:
        super().__init__()
        self.split_queries = (-1, heads, dim // heads, queries)
        self.split_memory = (-1, heads, dim // heads, memory)
        self.joined = (-1, dim, queries)
        self.scale = 1 / math.sqrt(dim // heads)
        self.to_query = nn.Conv1d(dim, dim, 1, bias=False)
        self.to_key = nn.Conv1d(dim, dim, 1, bias=False)
        self.to_value = nn.Conv1d(dim, dim, 1, bias=False)
        self.to_out = nn.Conv1d(dim, dim, 1)

    def forward(self, queries: Tensor, memory: Tensor) -> Tensor:
        """No residual: what comes out is made of `memory` alone."""
        query = self.to_query(queries).reshape(self.split_queries)
        key = self.to_key(memory).reshape(self.split_memory)
        value = self.to_value(memory).reshape(self.split_memory)
        weights = torch.softmax(torch.matmul(query.transpose(2, 3), key) * self.scale, dim=3)
        read: Tensor = self.to_out(torch.matmul(value, weights.transpose(2, 3)).reshape(self.joined))
        return read


class TokenNorm(nn.Module):
    """Scales each token of (B, dim, n) to a root mean square of 1, then by a learned weight (RMSNorm)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim, 1))

    def forward(self, tokens: Tensor) -> Tensor:
        """Same shape as `tokens`."""
        return tokens * torch.rsqrt(tokens.square().mean(dim=1, keepdim=True) + EPSILON) * self.weight


class Mixer(nn.Module):
    """Tokens look at each other, then each is transformed alone: one encoder block, normalised before each half."""

    def __init__(self, dim: int, heads: int, tokens: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = TokenNorm(dim)
        self.attention = Attention(dim, heads, tokens, tokens)
        self.norm2 = TokenNorm(dim)
        self.widen = nn.Conv1d(dim, 2 * dim, 1)
        self.narrow = nn.Conv1d(2 * dim, dim, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, dim, n) to the same shape."""
        normed = self.norm1(tokens)
        tokens = tokens + self.attention(normed, normed)
        hidden = self.dropout(torch.relu(self.widen(self.norm2(tokens))))
        mixed: Tensor = tokens + self.narrow(hidden)
        return mixed


def grid_codes(side: int, dim: int) -> Tensor:
    """(dim, side * side) fixed sine and cosine codes of the positions of a grid, half for rows and half for columns."""
    quarter = dim // 4
    rates = torch.exp(-math.log(100.0) * torch.arange(quarter) / quarter)
    angles = (torch.arange(side) + 0.5)[None, :] * (2 * math.pi / side) * (rates * side / 4)[:, None]
    line = torch.cat([angles.sin(), angles.cos()])
    rows = line[:, :, None].expand(-1, -1, side)
    columns = line[:, None, :].expand(-1, side, -1)
    return torch.cat([rows, columns]).reshape(4 * quarter, side * side)
