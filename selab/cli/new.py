"""Write templates for networks and blocks of one's own: `selab new family NAME`, `selab new block NAME`."""

import re
from keyword import iskeyword
from pathlib import Path
from typing import Annotated

import typer

from selab.cli.options import OUTPUT, examples, option
from selab.cli.usage import Command, Group
from selab.errors import SpecError

new_app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    help="Write a commented, working template: a family or a block.",
    epilog=examples("selab new family my_nets", "selab new block my_gate"),
)

Name = Annotated[str, typer.Argument(help="Lower-case letters, digits and _; names the files.", show_default=False)]
Out = Annotated[Path, option("--out", OUTPUT, "The folder to write to.", metavar="FOLDER")]
Replace = Annotated[bool, option("--replace", OUTPUT, "Write over files that exist.")]

_FAMILY_TOML = """\
# A family of networks for selab. Count it:  selab count --arch {name}.toml:se_{name}
# The format is described in docs/extending.md. A family needs no change of selab and no installation.
family = "{name}"
source = "Where the network is published, for readers"
# MODULE:CALLABLE. The module is looked up beside this file, then among the installed packages.
builder = "{name}:{name}"
input_chw = [3, 64, 64]
num_classes = 10

# The baseline, without attention. A variant's name is lower-case letters, digits and _.
[variants.{name}]
title = "{title}"
arguments = {{ width = 16 }}  # passed to the builder, beside num_classes

# The same network with SE. Its baseline is what it is compared with.
[variants.se_{name}]
title = "SE-{title}"
baseline = "{name}"
arguments = {{ width = 16 }}

[variants.se_{name}.se]
sites = "residual"      # a site group of the network, or patterns such as ["blocks.*.branch"], or "auto"
reduction = 4
bias = true             # whether the two layers have biases; state it, because codebases differ
# block = "eca"         # another kind of block, or one of your own: "my_block.py:MyBlock"
# placement = "standard"  # standard | pre | post | identity | 3x3
# init = "he"           # he | identity
"""

_FAMILY_PY = '''\
"""{title}: a small residual network, to be replaced by yours. Edit it together with {name}.toml."""

from torch import Tensor, nn


class AddReLU(nn.Module):
    """relu(branch + shortcut). As a module of its own, SE can gate the branch before the addition."""

    # selab.fuse computes a join with this formula in one pass.
    formula = "relu(branch + shortcut)"

    def forward(self, branch: Tensor, shortcut: Tensor) -> Tensor:
        return (branch + shortcut).relu()


class Block(nn.Module):
    """A residual block. Children called branch, shortcut and join make every placement of SE possible."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.shortcut = nn.Identity()
        self.join = AddReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self.branch(x), self.shortcut(x))


class Net(nn.Module):
    """A stem, three blocks, a pooling and a linear classifier."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(3)))
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x).relu()).mean((2, 3)))

    def site_groups(self) -> dict[str, list[str]]:
        """Site groups by name, as `sites` in the TOML takes them. Optional: patterns and "auto" need none."""
        return {{"residual": [f"blocks.{{index}}" for index in range(len(self.blocks))]}}


def {name}(num_classes: int, width: int = 16) -> nn.Module:
    """The builder that {name}.toml names."""
    return Net(num_classes, width)
'''

_BLOCK_PY = '''\
"""An attention block for selab. Count it:  selab count --arch resnet18 --se block={name}.py:{title}"""

import torch
from torch import Tensor, nn

from selab.attention import Attention


class {title}(Attention):
    """x * sigmoid(scale * mean(x) + shift), one gate per channel; replace it by yours.

    The number of channels comes first. Every other keyword argument is a key of --se and of a family's TOML:
    --se block={name}.py:{title},slope=2
    """

    def __init__(self, channels: int, *, slope: float = 1.0, init: str = "he") -> None:
        # `init` is optional; a block without it takes init=he only.
        super().__init__(channels, init)
        self.slope = slope
        # Any layers are allowed. Where there is a bottleneck, set self.squeeze_channels to its width.
        self.scale = nn.Parameter(torch.zeros(channels) if init == "identity" else torch.ones(channels))
        self.shift = nn.Parameter(torch.zeros(channels))
        # A sigmoid is one half at zero; doubled, the block starts as the identity.
        self.range = 2.0 if init == "identity" else 1.0

    def macs(self, height: int, width: int) -> int:
        """Multiply-accumulates of one image; must agree with `selab count` (convention: all).

        Here: the mean, scale and shift, slope, the sigmoid, its range, and the product.
        """
        return self.channels * (height * width + 5 + height * width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H, W)."""
        gate = self.range * torch.sigmoid(self.slope * (self.scale * x.mean((2, 3)) + self.shift))
        return x * gate[:, :, None, None]
'''


@new_app.command("family", cls=Command)
def new_family(name: Name, out: Out = Path(), replace: Replace = False) -> None:
    """Write NAME.toml and NAME.py: a small network with and without SE, ready to be counted and measured.

    Example: selab new family mynet, then selab count --arch mynet.toml:se_mynet
    """
    title = _title(name)
    files = {f"{name}.toml": _FAMILY_TOML, f"{name}.py": _FAMILY_PY}
    _write({out / file: text.format(name=name, title=title) for file, text in files.items()}, replace=replace)
    typer.echo(f"next: selab count --arch {out / name}.toml:se_{name}")


@new_app.command("block", cls=Command)
def new_block(name: Name, out: Out = Path(), replace: Replace = False) -> None:
    """Write NAME.py: an attention block, ready for --se block=NAME.py:Class.

    Example: selab new block my_gate, then selab count --arch resnet18 --se block=my_gate.py:MyGate
    """
    title = _title(name)
    _write({out / f"{name}.py": _BLOCK_PY.format(name=name, title=title)}, replace=replace)
    typer.echo(f"next: selab count --arch resnet18 --se block={out / name}.py:{title}")


def _title(name: str) -> str:
    """Return `my_gate` as `MyGate`; refuses what cannot name a module and a variant."""
    if name in _TAKEN or iskeyword(name):
        raise SpecError(f"selab new: {name!r}: is a module or keyword that the template needs; choose another name")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise SpecError(f"selab new: {name!r}: a name begins with a letter and has lower-case letters, digits and _")
    return "".join(part.capitalize() for part in name.split("_"))


# Modules that the templates import.
_TAKEN = ("torch", "selab")


def _write(files: dict[Path, str], *, replace: bool) -> None:
    from selab.records.files import check_writable, write_atomically

    for path in files:
        check_writable(path, replace=replace)
    for path, text in files.items():
        write_atomically(path, text.encode())
        typer.echo(f"wrote {path}")
