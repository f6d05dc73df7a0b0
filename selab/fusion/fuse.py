"""Makes a network's SE blocks cheap, in place, with their weights and the checkpoint's keys kept.

What is done, wherever it applies:

* `SqueezeExcitation` takes its fastest implementation (`impl="auto"`);
* a ReLU right before a block in an `nn.Sequential` becomes part of the block, which then reads the map once less;
* a residual join, relu(branch + shortcut), is one pass, with a block in it or without;
* in inference on a CPU, a BatchNorm is part of the pass behind it (a block's, a join's or an activation's) where a
  trace proves that nobody else reads its output; one with an activation of its own (timm's) is one pass;
* SE modules of torchvision and timm compute as ours do, under their own class, parameters and keys;
* in inference, a block's output takes its input's place where a trace proves that nobody reads the input again.
"""

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from selab.attention.se import GatedJoin, SqueezeExcitation
from selab.errors import ModelError, SelabError
from selab.fusion.external import Fast, external_params, fast_class, library_class
from selab.fusion.liveness import Seen, traced
from selab.kernels import cpu
from selab.kernels.deferred_bn import DeferredNorm, defer, recall
from selab.kernels.dispatch import Impl, has_hooks, norm_of
from selab.kernels.residual import ADD_RELU, FUSED_ACTIVATIONS, FusedActivation, FusedJoin, formula_of
from selab.meta import first_line, passages
from selab.records.display import Displayed


@dataclass(frozen=True, kw_only=True)
class FusedBlock:
    """One block as it will run.

    Attributes:
        kind: its class's name.
        joined: whether scale, addition and ReLU are one pass.
        absorbed: whether the ReLU before it is part of it.
        normalising: whether the BatchNorm before it, or before that ReLU, is part of it in inference, and the
            activation that the BatchNorm may have.
        in_place: whether its output takes its input's place in inference.
        reason: why it stays as it was; empty if it does not.
    """

    path: str
    kind: str
    joined: bool = False
    absorbed: bool = False
    normalising: bool = False
    in_place: bool = False
    reason: str = ""


@dataclass(frozen=True, kw_only=True, repr=False)
class Fusion(Displayed):
    """What `fuse` did.

    Attributes:
        blocks: in the order of the network.
        joins: residual joins without a block that are one pass now.
        norms: BatchNorms that are one pass with what is behind them in inference, a block or anything else.
        in_place_reason: why no output takes its input's place, and no BatchNorm is part of the pass behind it; empty if
            that could be looked into.
    """

    blocks: tuple[FusedBlock, ...]
    joins: int
    norms: int = 0
    in_place_reason: str = ""

    def columns(self) -> tuple[str, ...]:
        """Return the names of the columns of `rows`."""
        return tuple(field.name for field in fields(FusedBlock))

    def rows(self) -> list[tuple[object, ...]]:
        """Return one row for each block."""
        return [tuple(getattr(one, name) for name in self.columns()) for one in self.blocks]

    def summary(self) -> str:
        """What was fused, and what was not and why: `16 joins in one pass, 16 blocks in place`."""
        counts = (
            (self.joins, "joins in one pass"),
            (self.norms, "BatchNorms in one pass with what is behind them"),
            (sum(one.joined for one in self.blocks), "blocks in one pass with their join"),
            (sum(one.absorbed for one in self.blocks), "blocks with the ReLU before them"),
            (sum(one.in_place for one in self.blocks), "blocks in place"),
        )
        words = [f"{count} {what}" for count, what in counts if count] or ["nothing to fuse"]
        left = Counter(one.reason for one in self.blocks if one.reason)
        kept = [f"{count} blocks as they were: {reason}" for reason, count in left.items()]
        return "; ".join([", ".join(words), *kept, *([self.in_place_reason] if self.in_place_reason else [])])


def fuse(model: nn.Module, *, input_nchw: tuple[int, ...] = (1, 3, 224, 224), blocks: bool = True) -> Fusion:
    """Makes the SE blocks of a network cheap, in place: the same mathematics, parameters and checkpoint keys.

    Args:
        model: with blocks of selab, torchvision (`torchvision.ops.SqueezeExcitation`) or timm (`SEModule`,
            `SqueezeExcite`), or with none.
        input_nchw: (N, C, H, W) of an example input, to see on the meta device which maps are read once only.
        blocks: whether the blocks are made fast; without, only what stands around them, as in a network without SE.

    Returns:
        What was done, and what was not and why; as a string in a sentence.

    Raises:
        ModelError: `model` is no network, or `input_nchw` no shape of images.

    Example:
        >>> from torch import nn
        >>> import selab
        >>> net = nn.Sequential(nn.Conv2d(3, 16, 3), selab.SqueezeExcitation(16, 4)).eval()
        >>> fusion = selab.fuse(net, input_nchw=(1, 3, 8, 8))
        >>> [(one.path, one.reason) for one in fusion.blocks]
        [('1', '')]
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"selab.fuse: {type(model).__name__} is no network; give it a torch.nn.Module")
    if not (isinstance(input_nchw, (tuple, list)) and len(input_nchw) == 4 and all(_is_size(n) for n in input_nchw)):
        raise ModelError(f"selab.fuse: input_nchw {input_nchw!r}: four sizes (N, C, H, W), such as (1, 3, 224, 224)")
    absorbed = _absorb(model) if blocks else set()
    joins = _join(model, blocks)
    changed = [_fused(path, module, absorbed) for path, module in _blocks(model)] if blocks else []
    reason = ""
    try:
        seen = traced(model, input_nchw, norms=_norms, readers=partial(_readers, blocks=blocks))
    except (SelabError, RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError, LookupError) as error:
        seen = Seen(owning=set(), reader={}, alone={}, producers={})
        reason = f"no pass over an input of shape {input_nchw} on the meta device: {first_line(error)}"
    # What an earlier call has found may hold no longer; an in-place ReLU that a block took in has shown it for good.
    producers = {path: tuple(map(model.get_submodule, sorted(paths))) for path, paths in seen.producers.items()}
    for path, reader in _readers(model, blocks):
        if hasattr(reader, "can_overwrite"):
            owner: Any = reader
            join = _enclosing(model, path)
            owner.can_overwrite = path in seen.owning or bool(getattr(owner, "relu_in", False))
            owner.producers = (*producers.get(path, ()), *(() if join is None else (join,)))
    left = {norm: reader for norm, reader in seen.reader.items() if _deferred(model, norm, reader, producers[norm])}
    alone = {
        norm
        for norm, owns in seen.alone.items()
        if norm not in left and _with_its_activation(model, norm, producers[norm], owns)
    }
    for path, norm in _norms(model):
        if isinstance(norm, DeferredNorm) and path not in left and path not in alone:
            recall(norm)
    return Fusion(
        blocks=tuple(_described(model, one, set(left.values())) for one in changed),
        joins=joins,
        norms=len(left) + len(alone),
        in_place_reason=reason,
    )


def _is_size(number: object) -> bool:
    return isinstance(number, int) and number > 0


def _described(model: nn.Module, one: FusedBlock, readers: set[str]) -> FusedBlock:
    """With what the pass of its block comprises, if it has a fast one."""
    if one.reason:
        return one
    join = _enclosing(model, one.path)
    joined = join is not None and join.edge == "branch" and bool(formula_of(_plain_inner(join)))
    owns = bool(getattr(model.get_submodule(one.path), "can_overwrite", False))
    return replace(one, joined=joined, in_place=owns, normalising=one.path in readers)


def _enclosing(model: nn.Module, path: str) -> GatedJoin | None:
    """The join whose block or inner join this is."""
    parent = model.get_submodule(path.rpartition(".")[0])
    return parent if isinstance(parent, GatedJoin) else None


def _plain_inner(join: GatedJoin) -> nn.Module:
    inner: Any = join.inner
    return inner.inner if isinstance(inner, FusedJoin) else inner


def _deferred(model: nn.Module, path: str, reader_path: str, producers: tuple[nn.Module, ...]) -> bool:
    """Leaves a BatchNorm's work to the one who reads its output.

    Returns:
        False if somebody looks at one of them, or the reader cannot do it.
    """
    norm, reader, join = model.get_submodule(path), model.get_submodule(reader_path), _enclosing(model, reader_path)
    behind = (reader, *(() if join is None else (join,)))
    if not isinstance(norm, nn.BatchNorm2d) or has_hooks(norm, *norm.children(), *behind, *producers):
        return False
    does = norm_of(norm)
    if does is None or not _takes(reader, does.activation):
        return False
    defer(norm, behind, producers=producers)
    if type(reader) in FUSED_ACTIVATIONS:
        fast: Any = reader
        fast.__class__ = FUSED_ACTIVATIONS[type(reader)]
        fast.can_overwrite = True
    return True


def _takes(reader: nn.Module, activation: str) -> bool:
    """Whether a pass can begin with a BatchNorm that has this activation."""
    if not activation:
        return True
    return (
        isinstance(reader, (SqueezeExcitation, Fast)) and activation in cpu.PRE_ACTIVATIONS and not _rectifies(reader)
    )


def _rectifies(block: nn.Module) -> bool:
    return isinstance(block, SqueezeExcitation) and block.relu_in


def _with_its_activation(model: nn.Module, path: str, producers: tuple[nn.Module, ...], can_overwrite: bool) -> bool:
    """Makes a BatchNorm that has an activation one pass with it; False if it has none, or somebody looks at it."""
    norm = model.get_submodule(path)
    if not isinstance(norm, nn.BatchNorm2d) or not _is_of_timm(norm) or has_hooks(norm, *norm.children(), *producers):
        return False
    defer(norm, (), producers=producers, can_overwrite=can_overwrite)
    return True


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """How one block of a network would run.

    Attributes:
        map_nchw: the shape of its input.
        impl: the implementation that is taken.
        reason: why not a faster one; empty if there is none.
    """

    block: FusedBlock
    map_nchw: tuple[int, ...]
    impl: Impl
    reason: str


def runtimes(
    model: nn.Module,
    input_nchw: tuple[int, ...],
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> tuple[Runtime, ...]:
    """Which implementation each block would take after `fuse`, for maps of this kind.

    Args:
        model: left as it is.
        input_nchw: of the network, (N, C, H, W).
        device: where it would run.
        dtype: of the maps.
        memory_format: of the maps.

    Raises:
        ModelError: the network fails on this input.
    """
    twin = copy.deepcopy(model)
    blocks = fuse(twin, input_nchw=input_nchw).blocks
    seen = passages(twin, [one.path for one in blocks], input_nchw)
    found = []
    for one in blocks:
        module: Any = twin.get_submodule(one.path)
        shape = seen[one.path].input_shape or (1, 1, 1, 1)
        x = torch.empty(shape, device=device, dtype=dtype).contiguous(memory_format=memory_format)
        impl: Impl = "reference"
        reason = one.reason
        if not reason:
            impl, reason = module.runtime(x)
        found.append(Runtime(block=one, map_nchw=shape, impl=impl, reason=reason))
    return tuple(found)


def _absorb(model: nn.Module) -> set[nn.Module]:
    """Moves in-place ReLUs into the blocks right behind them; gives these blocks."""
    found: set[nn.Module] = set()
    for parent in model.modules():
        if not isinstance(parent, nn.Sequential) or type(parent).forward is not nn.Sequential.forward:
            continue
        children = list(parent._modules.items())
        for (name, before), (_, block) in pairwise(children):
            if not isinstance(block, SqueezeExcitation) or block.kinds[0] != "avg" or block.kinds[2] not in cpu.GATES:
                continue
            # One that writes over its input has shown that nobody else needs it.
            if type(before) is nn.ReLU and before.inplace and not has_hooks(before, block):
                if name.isdecimal():
                    # A place in a row, which others may be counted from.
                    parent._modules[name] = nn.Identity()
                else:
                    del parent._modules[name]
                block.relu_in = block.can_overwrite = True
                found.add(block)
    return found


def _join(model: nn.Module, blocks: bool) -> int:
    """Makes joins one pass; counts those that no block makes one with its own."""
    joins = 0
    for parent in list(model.modules()):
        if isinstance(parent, FusedJoin):
            continue
        for name, child in list(parent.named_children()):
            if formula_of(child) == ADD_RELU:
                parent._modules[name] = FusedJoin(child).train(child.training)
                joins += not (blocks and isinstance(parent, GatedJoin) and parent.edge == "branch")
    return joins


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in model.named_modules():
        if isinstance(module, SqueezeExcitation) or library_class(module) is not None:
            yield path, module


def _fused(path: str, module: nn.Module, absorbed: set[nn.Module]) -> FusedBlock:
    kind = type(module).__name__
    if isinstance(module, SqueezeExcitation):
        module.impl = "auto"
        reason = module.refuses()
        return FusedBlock(path=path, kind=kind, absorbed=module in absorbed, reason=reason)
    base = library_class(module)
    assert base is not None
    formula = external_params(module, base)
    if isinstance(formula, str):
        return FusedBlock(path=path, kind=kind, reason=formula)
    fast: Any = module
    fast.__class__ = fast_class(base)
    fast.can_overwrite = False
    return FusedBlock(path=path, kind=kind)


# ------------------------------------------------------------------------------------------------- what can be one pass
def _norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """BatchNorms whose work may be left to others, by their class and statistics."""
    for path, module in model.named_modules():
        known = type(module) is nn.BatchNorm2d or isinstance(module, DeferredNorm) or _is_of_timm(module)
        if known and isinstance(module, nn.BatchNorm2d) and norm_of(module) is not None:
            yield path, module


def _is_of_timm(module: nn.Module) -> bool:
    """Whether it is timm's BatchNorm with an activation, and nothing is dropped between the two."""
    kind: Any = module.library if isinstance(module, DeferredNorm) else type(module)
    named = (kind.__module__, kind.__name__) == ("timm.layers.norm_act", "BatchNormAct2d")
    return named and type(module._modules.get("drop")) is nn.Identity


def _readers(model: nn.Module, blocks: bool) -> Iterator[tuple[str, nn.Module]]:
    """Those who can do a BatchNorm's work, or take the place of what they read."""
    there = dict(_blocks(model))
    closed = [*there, *(path for path, _ in _norms(model))]
    for path, module in model.named_modules():
        if path in there:
            if blocks and hasattr(module, "can_overwrite"):
                yield path, module
        elif any(path.startswith(f"{one}.") for one in closed):
            continue
        elif isinstance(module, (FusedJoin, FusedActivation)) or type(module) in FUSED_ACTIVATIONS:
            yield path, module
