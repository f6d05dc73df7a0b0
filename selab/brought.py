"""SE blocks that a network of another library brings along: where they stand, and the network without them."""

from torch import nn

from selab.fusing import foreign_blocks, foreign_squeeze_channels
from selab.probe import Passage, passages
from selab.record import Insertion

PLACEMENT = "its own"


def brought_blocks(model: nn.Module, input_nchw: tuple[int, ...]) -> tuple[Insertion, ...]:
    """The SE blocks of torchvision and timm in a network, as far as a map goes through them.

    Args:
        model: left as it is, whatever device it is on.
        input_nchw: the shape of an example input, (N, C, H, W).

    Raises:
        ModelError: the network fails on this input.
    """
    blocks = foreign_blocks(model)
    seen = passages(model, blocks, input_nchw)
    found = (_insertion(path, block, seen[path]) for path, block in blocks.items())
    return tuple(one for one in found if one is not None)


def _insertion(path: str, block: nn.Module, passage: Passage) -> Insertion | None:
    shape = passage.input_shape
    if shape is None or len(shape) != 4:
        return None
    _, channels, height, width = shape
    hidden = foreign_squeeze_channels(block)
    # Squeeze and scale, two layers, the activation and the gate: of one image, as our own block counts them.
    layers = 0 if hidden is None else 2 * channels * hidden + hidden + channels
    return Insertion(
        path=path,
        placement=PLACEMENT,
        channels=channels,
        squeeze_channels=hidden,
        params=sum(parameter.numel() for parameter in block.parameters()),
        height=height,
        width=width,
        macs=layers + 2 * channels * height * width,
    )


def leave_out(model: nn.Module) -> None:
    """Puts nn.Identity in the place of every SE block of torchvision and timm; all other weights stay as they are.

    Args:
        model: a network that the caller made, not fused.
    """
    blocks = set(foreign_blocks(model).values())
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in blocks:
                parent._modules[name] = nn.Identity().train(child.training)
