"""Small networks that know nothing of sites or blocks."""

from torch import nn


class Foreign(nn.Module):
    """A network that knows nothing of sites: a leaf, a bare Sequential, a block of its own."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.layers = nn.Sequential(
            nn.Sequential(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
            nn.Sequential(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
        )
        self.act = nn.ReLU()
        self.unused = nn.Conv2d(3, 16, 1)
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        x = self.act(self.layers(self.act(self.stem(x))))
        return self.head(x.mean((2, 3)))


class ReluJoin(nn.Module):
    """An addition with a formula, as the joins of the catalog, in a class that is no part of it."""

    formula = "relu(branch + shortcut)"

    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, branch, shortcut):
        return self.relu(branch + shortcut)
