"""Global Semantic Enhancement (GSE): what the whole picture shows, in a code too small to copy a local defect.

The paper (JOCA 2025, 10.11772/j.issn.1001-9081.2025020229) states the purpose: to fuse the teacher's levels into
multi-level global semantics with spatial-logical relations. Tokens, sizes and attention are ours: learned queries
condense all levels into a few tokens, these exchange relations, are squeezed to `code` numbers each, and position
queries read a feature field of every level back from them. No feature reaches that field but through the code.
Built by `logicrd`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.modules.attention import Attention, Mixer, TokenNorm, grid_codes


class GlobalSemantics(nn.Module):
    """f1, f2, f3 (widths c1, c2, c3, strides 4, 8, 16 of an `image_size` picture) to fields and the code.

    Returns (g4 at stride 32, g3 at 16, g2 at 8, code (B, tokens * code)); `fields` are the channels of g2, g3, g4.
    """

    def __init__(
        self,
        channels: tuple[int, int, int],
        fields: tuple[int, int, int],
        image_size: int,
        *,
        dim: int = 128,
        tokens: int = 16,
        code: int = 32,
        heads: int = 4,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        side = image_size // 16
        self.aligned = [(-1, c, side * side) for c in channels]
        self.align = nn.ModuleList(nn.Conv1d(c, dim, 1, bias=False) for c in channels)
        self.levels = nn.Parameter(0.02 * torch.randn(len(channels), dim, 1))
        self.places = nn.Parameter(grid_codes(side, dim))
        self.queries = nn.Parameter(0.5 * torch.randn(1, dim, tokens))
        self.norm = TokenNorm(dim)
        self.condense = Attention(dim, heads, tokens, len(channels) * side * side)
        self.mix = nn.Sequential(*(Mixer(dim, heads, tokens, dropout) for _ in range(2)))
        self.squeeze = nn.Sequential(TokenNorm(dim), nn.Conv1d(dim, code, 1))
        self.unsqueeze = nn.Conv1d(code, dim, 1)
        self.field2 = Field(side * 2, dim, heads, tokens, fields[0])
        self.field3 = Field(side, dim, heads, tokens, fields[1])
        self.field4 = Field(side // 2, dim, heads, tokens, fields[2])

    def forward(self, f1: Tensor, f2: Tensor, f3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The tensors named above; `code` is what the distance branch may measure."""
        pooled = (F.avg_pool2d(f1, 4), F.avg_pool2d(f2, 2), f3)
        aligned = [
            conv(level.reshape(self.aligned[index])) + self.levels[index] + self.places
            for index, (conv, level) in enumerate(zip(self.align, pooled, strict=True))
        ]
        memory = self.norm(torch.cat(aligned, dim=2))
        tokens = self.mix(self.condense(self.queries, memory) + self.queries)
        code = self.squeeze(tokens)
        memory = self.unsqueeze(code)
        return self.field4(memory), self.field3(memory), self.field2(memory), code.flatten(1)


class Field(nn.Module):
    """Position queries read tokens (B, dim, n) into a field (B, channels, side, side)."""

    def __init__(self, side: int, dim: int, heads: int, tokens: int, channels: int) -> None:
        super().__init__()
        self.shape = (-1, channels, side, side)
        self.places = nn.Parameter(grid_codes(side, dim).unsqueeze(0))
        self.read = Attention(dim, heads, side * side, tokens)
        self.out = nn.Conv1d(dim, channels, 1)

    def forward(self, memory: Tensor) -> Tensor:
        """The place decides what is asked, the tokens what is answered."""
        read = self.read(self.places, memory)
        field: Tensor = self.out(torch.relu(read + self.places))
        return field.reshape(self.shape)
