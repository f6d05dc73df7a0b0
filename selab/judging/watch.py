"""Find the gated blocks of a PyTorch network, and read their gates while it runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from selab.attention.blocks import ECA
from selab.attention.se import SqueezeExcitation
from selab.errors import InsertionError, ModelError
from selab.fusion.external import external_blocks
from selab.fusion.related import related_blocks
from selab.kernels.squeeze_scale import Recorded, RecordedMap

Take = Callable[[str, Tensor], object]


def gated_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return path → block with one gate per channel, in the order of the network's modules.

    Blocks of this project (SE with a squeeze, ECA), of torchvision and timm, and modules of any class that take the
    mean of their input over height and width and return the input times one gate per channel.

    Raises:
        InsertionError: there is none.
    """
    found = dict(external_blocks(model)) | related_blocks(model)
    for path, module in model.named_modules():
        if isinstance(module, ECA) or (isinstance(module, SqueezeExcitation) and module.kinds[0] != "none"):
            found[path] = module
    if not found:
        raise InsertionError(
            f"{type(model).__name__}: has no block with one gate per channel: neither SE or ECA of selab, torchvision "
            "or timm, nor a module that multiplies its input by a gate computed from the input's mean; name a network "
            "with blocks (`selab archs`)"
        )
    order = {path: place for place, (path, _) in enumerate(model.named_modules())}
    return dict(sorted(found.items(), key=lambda one: order[one[0]]))


@contextmanager
def watched(blocks: dict[str, nn.Module], take: Take) -> Iterator[None]:
    """Call `take(path, gate)` for each block that runs in the body; gates are (N, C), detached.

    Blocks run operation by operation meanwhile. A block that runs twice in a pass is taken twice.

    Args:
        blocks: of `gated_blocks`.
        take: called within the forward pass; it must not keep the tensor, or copy it.

    Raises:
        ModelError: within the body, a block does not multiply its input by one gate per channel.
    """
    handles = []
    try:
        for path, block in blocks.items():
            handles.append(block.register_forward_pre_hook(_give_recorded, with_kwargs=True))
            handles.append(block.register_forward_hook(partial(_take, path, take), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _give_recorded(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Give a block its feature map as one that records what is done with it."""
    if not args or not isinstance(args[0], Tensor) or args[0].dim() != 4:
        return None
    given: Any = args[0].as_subclass(RecordedMap)
    given.record = Recorded()
    return (given, *args[1:]), kwargs


def _take(path: str, take: Take, _block: nn.Module, args: tuple[Any, ...], _kwargs: dict[str, Any], out: Any) -> Any:
    record: Recorded | None = getattr(args[0], "record", None) if args else None
    if record is None or len(record.gates) != 1:
        raise ModelError(f"{path}: does not multiply its input, (N, C, H, W), by one gate per channel")
    take(path, record.gates[0].detach())
    # A block may return the map itself, which must not record further.
    return out.as_subclass(Tensor) if isinstance(out, RecordedMap) else None
