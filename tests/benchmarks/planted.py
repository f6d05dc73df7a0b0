"""Two networks of which one is slower by a known part: what `selab profile` should find."""

import os

import torch
from torch import Tensor, nn

from selab.models.build import build
from selab.models.catalog import find

NAME, REPEATS = "SELAB_PLANTED_ARCH", "SELAB_PLANTED_REPEATS"
SIZE = 48


class Plain(nn.Module):
    """The network that the environment names."""

    input_size = (3, 224, 224)

    def __init__(self) -> None:
        super().__init__()
        self.network = build(find(os.environ[NAME])).model
        self.matrix = nn.Parameter(torch.ones(SIZE, SIZE), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.network(x)
        return out


class Slower(Plain):
    """The same, and as many multiplications of small matrices as the environment says."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(int(os.environ[REPEATS])):
            torch.mm(self.matrix, self.matrix)
        return super().forward(x)
