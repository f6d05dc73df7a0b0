"""Fuse a network's SE blocks and what surrounds them, in place; weights and checkpoint keys stay.

Wherever it applies:

* `SqueezeExcitation` takes its fastest implementation (`impl="auto"`);
* an in-place ReLU right before a block in an `nn.Sequential` is computed by the block, which saves one read of the
  feature map;
* a residual join, relu(branch + shortcut), becomes one pass, with or without a block in it;
* at inference on a CPU, a BatchNorm is computed by the pass that consumes its output (a block, join or activation) if
  nothing else reads that output; a BatchNorm with its own activation (timm's) becomes one pass;
* SE modules of torchvision and timm get the same implementations, under their own class, parameters and keys;
* related blocks, of libraries and of anybody's, run their own layers between a native squeeze and a native scale, at
  inference on a CPU;
* at inference, a block's output reuses its input's memory if nothing else holds the input.

A trace chooses where the last three apply. It shows one path through the network. So each call proves again that
nothing else holds the feature map, by its references and the code of the callers (`selab.kernels.ownership`).
Otherwise the modules compute as they did before.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import pairwise
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from selab import units
from selab.attention.base import Attention
from selab.attention.se import GatedJoin, SqueezeExcitation
from selab.errors import ModelError, SelabError
from selab.fusion.external import FusedExternal, external_params, hooked, is_external
from selab.fusion.liveness import Liveness, analyze
from selab.fusion.related import SteppedBlock, inline_joins, left_reason, step_related
from selab.kernels import cpu
from selab.kernels.deferred_bn import DeferredNorm, defer, undefer
from selab.kernels.deferred_relu import DeferredReLU, defer_relu, undefer_relu
from selab.kernels.dispatch import Impl, has_hooks, norm_of
from selab.kernels.ownership import measured
from selab.kernels.residual import ACTIVATIONS, ADD_RELU, FusedActivation, FusedJoin, formula_of
from selab.kernels.swap import library_of, swap
from selab.meta import ON_REAL_TENSORS, Example, On, are_shapes, first_line, is_shape, passages, shapes_of
from selab.meta.fake import VALUE_NEEDED
from selab.meta.real import real_copy
from selab.records.display import Displayed


@dataclass(frozen=True, kw_only=True)
class FusedBlock:
    """One SE block after `fuse`.

    Attributes:
        kind: its class's name.
        joined: whether scale, addition and ReLU are one pass.
        absorbed: whether it computes the in-place ReLU before it, where nothing else holds that ReLU's input.
        normalising: whether it computes the BatchNorm before it, or before that ReLU, and the activation of that
            BatchNorm, if any; at inference, where nothing else holds that BatchNorm's input or output.
        in_place: whether its output reuses its input's memory, at inference, where nothing else holds the input.
        stepwise: whether at inference on a CPU its squeeze and its scale are native passes, and its own layers run as
            they are between the two.
        reason: why it was left unchanged, or why its layers are not part of the pass; empty if it was fused.
    """

    path: str
    kind: str
    joined: bool = False
    absorbed: bool = False
    normalising: bool = False
    in_place: bool = False
    stepwise: bool = False
    reason: str = ""


@dataclass(frozen=True, kw_only=True, repr=False)
class Fusion(Displayed):
    """What `fuse` changed.

    Attributes:
        blocks: every SE block, in the order of the network.
        joins: residual joins without a block that are one pass now.
        norms: BatchNorms that at inference are part of another pass, or one pass with their activation, where nothing
            else holds their input or output.
        inline_joins: the class of every module of torchvision or timm whose residual addition stays as it is, because
            it is written in the code of its forward.
        in_place_reason: why no memory is reused and no BatchNorm is folded; empty if the trace succeeded, or if it was
            not asked for.
    """

    blocks: tuple[FusedBlock, ...]
    joins: int
    norms: int = 0
    in_place_reason: str = ""
    inline_joins: tuple[str, ...] = ()

    def columns(self) -> tuple[str, ...]:
        """Return the names of the columns of `rows`."""
        return tuple(field.name for field in fields(FusedBlock))

    def rows(self) -> list[tuple[object, ...]]:
        """Return one row for each block."""
        return [tuple(getattr(one, name) for name in self.columns()) for one in self.blocks]

    def summary(self) -> str:
        """Return what was fused, then what was not and why: `fused 8 SE blocks (8 with their join) and 16 joins`."""
        fused = [one for one in self.blocks if not one.reason]
        objects = []
        if fused:
            ways = (
                (sum(one.joined for one in fused), "with their join"),
                (sum(one.absorbed for one in fused), "with the ReLU before them"),
                (sum(one.in_place for one in fused), "in place"),
            )
            # A number is given only where it differs from that of the blocks.
            shown = [way if count == len(fused) else f"{count} {way}" for count, way in ways if count]
            objects.append(units.counted(len(fused), "SE block") + (f" ({', '.join(shown)})" if shown else ""))
        if self.joins:
            objects.append(units.counted(self.joins, "residual join"))
        done = [f"fused {' and '.join(objects)}"] if objects else []
        if self.norms:
            done.append(f"folded {units.counted(self.norms, 'BatchNorm')}")
        stepped = Counter(one.reason for one in self.blocks if one.stepwise)
        kept = [f"fused squeeze and scale of {units.counted(count, 'block')}: {why}" for why, count in stepped.items()]
        left = Counter(one.reason for one in self.blocks if one.reason and not one.stepwise)
        kept += [f"left {units.counted(count, 'SE block')} unchanged: {why}" for why, count in left.items()]
        if self.inline_joins:
            kinds = ", ".join(dict.fromkeys(self.inline_joins))
            count = units.counted(len(self.inline_joins), "residual addition")
            kept.append(f"left {count} unchanged: written in the code of {kinds}")
        sentence = (" and " if len(objects) < 2 else ", ").join(done) or ("" if stepped else "nothing to fuse")
        return "; ".join(
            [*([sentence] if sentence else []), *kept, *([self.in_place_reason] if self.in_place_reason else [])]
        )


def fuse(
    model: nn.Module,
    *,
    input_nchw: tuple[int, ...] = (1, 3, 224, 224),
    inputs: Example | None = None,
    blocks: bool = True,
    in_place: bool = True,
    on: On = "fake",
) -> Fusion:
    """Fuse the SE blocks of a network, in place: the same mathematics, parameters and checkpoint keys.

    Args:
        model: a network with blocks of selab, torchvision (`torchvision.ops.SqueezeExcitation`), timm (`SEModule`,
            `SqueezeExcite`) or any other class, or without blocks.
        input_nchw: the shape of an example input, (N, C, H, W); a pass over it shows which feature maps are read only
            once.
        inputs: an example input of another form: a tensor, positional arguments in a tuple, keyword arguments in a
            dict. Its values are read with `on="cpu"` only.
        blocks: whether to fuse the blocks; otherwise only what surrounds them, as in a network without SE.
        in_place: whether feature maps that nothing else holds may be overwritten, and BatchNorms and ReLUs be left to
            the module that consumes their output; otherwise every module computes its own output in new memory.
        on: `fake` for a pass over fake tensors, which have no memory, and for which no kernel runs; `cpu` to run the
            kernels on a copy with real tensors, for a network in which the values of tensors decide what is computed.

    Returns:
        What was fused, and what was not and why; `str()` gives a sentence.

    Raises:
        ModelError: `model` is not a torch.nn.Module, or the example is neither four positive integers nor a tensor nor
            arguments with tensors.

    Examples:
        >>> from torch import nn
        >>> import selab
        >>> net = nn.Sequential(nn.Conv2d(3, 16, 3), selab.SqueezeExcitation(16, 4)).eval()
        >>> fusion = selab.fuse(net, input_nchw=(1, 3, 8, 8))
        >>> [(one.path, one.reason) for one in fusion.blocks]
        [('1', '')]
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"selab.fuse: expected a torch.nn.Module, got {type(model).__name__}")
    if on not in get_args(On):
        raise ModelError(f"selab.fuse: on {on!r}: allowed: {', '.join(get_args(On))}")
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            "selab.fuse: the modules of a TorchScript network cannot be fused; fuse before torch.jit.script"
        )
    example = _example(input_nchw, "input_nchw") if inputs is None else _example(inputs, "inputs")
    reason = "" if measured() else "this interpreter's reference counts do not show who holds a feature map"
    defers = in_place and not reason
    for module in model.modules():
        if isinstance(module, Attention) and module.inserted:
            module.was_fused = True
    absorbed = _absorb(model, defers and blocks)
    joins = _join(model, blocks)
    if blocks:
        step_related(model)
    changed = [_fused(path, module, absorbed) for path, module in _blocks(model)] if blocks else []
    seen = Liveness(overwritable=set(), consumer={}, exclusive={}, producers={})
    try:
        if defers:
            seen = analyze(model, example, norms=_norms, consumers=partial(_consumers, blocks=blocks), on=on)
    except (SelabError, RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError, LookupError) as error:
        reason = _failed(model, example, error)
    # An earlier call may have found otherwise. An in-place ReLU before a block is proof that its input is not needed.
    for path, consumer in _consumers(model, blocks):
        if hasattr(consumer, "can_overwrite"):
            fused: Any = consumer
            fused.guarded, fused.can_overwrite = True, path in seen.overwritable or consumer in absorbed
    producers = {path: tuple(map(model.get_submodule, sorted(paths))) for path, paths in seen.producers.items()}
    deferred = {
        norm: consumer for norm, consumer in seen.consumer.items() if _defer(model, norm, consumer, producers[norm])
    }
    with_activation = {
        norm
        for norm, exclusive in seen.exclusive.items()
        if norm not in deferred and _defer_to_itself(model, norm, producers[norm], exclusive)
    }
    for path, norm in _norms(model):
        if isinstance(norm, DeferredNorm) and path not in deferred and path not in with_activation:
            undefer(norm)
    return Fusion(
        blocks=tuple(_described(model, one, set(deferred.values())) for one in changed),
        joins=joins,
        norms=len(deferred) + len(with_activation),
        in_place_reason=reason,
        inline_joins=inline_joins(model),
    )


def _example(example: Example, name: str) -> Example:
    """Return an example input; raise ModelError if it is neither a shape nor a tensor, nor arguments with tensors."""
    if isinstance(example, (Tensor, Mapping)):
        return example
    if isinstance(example, (tuple, list)):
        if len(example) == 4 and all(isinstance(size, int) and size > 0 for size in example):
            return example
        if are_shapes(example) or any(isinstance(leaf, Tensor) for leaf in tree_leaves(example)):
            return example
    raise ModelError(
        f"selab.fuse: {name} {example!r}: expected four sizes (N, C, H, W), such as (1, 3, 224, 224); any other "
        "example is a tensor, a tuple of arguments or a dict of keyword arguments, as inputs="
    )


def _failed(model: nn.Module, example: Example, error: Exception) -> str:
    """Return why the trace failed, and how the network can be traced after all."""
    causes = (error, error.__cause__, error.__context__)
    if any(isinstance(one, VALUE_NEEDED) for one in causes):
        return f"the network cannot be traced without values: {first_line(error)}; {ON_REAL_TENSORS}"
    shape = example if is_shape(example) or are_shapes(example) else shapes_of(example)
    reason = f"the network fails on fake tensors with an input of shape {shape}: {first_line(error)}; "
    reason += "give the shape of its input as input_nchw=(N, C, H, W), or other arguments as inputs="
    part = next((name for name in ("backbone", "encoder", "features", "body") if name in model._modules), None)
    return reason if part is None else f"{reason}, or fuse a part that takes images, such as selab.fuse(model.{part})"


def _described(model: nn.Module, one: FusedBlock, consumers: set[str]) -> FusedBlock:
    """Add what a fused block's pass includes."""
    if one.reason:
        return one
    join = _enclosing(model, one.path)
    joined = join is not None and join.edge == "branch" and bool(formula_of(_unwrapped(join)))
    in_place = bool(getattr(model.get_submodule(one.path), "can_overwrite", False))
    return replace(one, joined=joined, in_place=in_place, normalising=one.path in consumers)


def _enclosing(model: nn.Module, path: str) -> GatedJoin | None:
    """Return the join that holds this block or inner join."""
    parent = model.get_submodule(path.rpartition(".")[0])
    return parent if isinstance(parent, GatedJoin) else None


def _unwrapped(join: GatedJoin) -> nn.Module:
    inner: Any = join.inner
    return inner.inner if isinstance(inner, FusedJoin) else inner


def _defer(model: nn.Module, path: str, consumer_path: str, producers: tuple[nn.Module, ...]) -> bool:
    """Defer a BatchNorm to the consumer of its output.

    Returns:
        False if a hook is registered on one of them, or the consumer cannot take it.
    """
    norm, consumer = model.get_submodule(path), model.get_submodule(consumer_path)
    join = _enclosing(model, consumer_path)
    relus = (one for one in model.modules() if isinstance(one, DeferredReLU) and consumer in one.consumers)
    consumers = (consumer, *(() if join is None else (join,)), *relus)
    if not isinstance(norm, nn.BatchNorm2d) or has_hooks(norm, *norm.children(), *consumers, *producers):
        return False
    statistics = norm_of(norm)
    if statistics is None or not _supports(consumer, statistics.activation):
        return False
    defer(norm, consumers, guarded=True)
    if type(consumer) in ACTIVATIONS:
        swap(consumer, FusedActivation)
        activation: Any = consumer
        activation.can_overwrite = activation.guarded = True
    return True


def _supports(consumer: nn.Module, activation: str) -> bool:
    """Return whether a consumer's pass can begin with a BatchNorm that has this activation."""
    if not activation:
        return True
    if isinstance(consumer, SqueezeExcitation) and consumer.relu_in:
        return False
    return isinstance(consumer, (SqueezeExcitation, FusedExternal)) and activation in cpu.PRE_ACTIVATIONS


def _defer_to_itself(model: nn.Module, path: str, producers: tuple[nn.Module, ...], exclusive: bool) -> bool:
    """Make a BatchNorm and its own activation one pass; return False if it has none or a hook is registered."""
    norm = model.get_submodule(path)
    if not isinstance(norm, nn.BatchNorm2d) or not _has_activation(norm):
        return False
    if has_hooks(norm, *norm.children(), *producers):
        return False
    defer(norm, (), can_overwrite=exclusive, guarded=True)
    return True


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """How one block of a network would run.

    Attributes:
        map_nchw: the shape of its input, (N, C, H, W).
        impl: its implementation.
        reason: why it is not a faster one; empty if there is none.
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
    on: On = "fake",
) -> tuple[Runtime, ...]:
    """Return the implementation that each block would take after `fuse`.

    Args:
        model: not changed.
        input_nchw: the shape of the network's input, (N, C, H, W).
        device: where it would run.
        dtype: of the feature maps.
        memory_format: of the feature maps.
        on: as in `fuse`.

    Raises:
        ModelError: the network fails on this input.
    """
    twin = real_copy(model)
    blocks = fuse(twin, input_nchw=input_nchw, on=on).blocks
    seen = passages(twin, [one.path for one in blocks], input_nchw, on=on)
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


def _absorb(model: nn.Module, defers: bool) -> set[nn.Module]:
    """Leave in-place ReLUs to the blocks right after them; return these blocks."""
    found: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, DeferredReLU):
            undefer_relu(module)
    if not defers:
        return found
    for parent in model.modules():
        if not isinstance(parent, nn.Sequential) or type(parent).forward is not nn.Sequential.forward:
            continue
        for before, block in pairwise(parent._modules.values()):
            if not isinstance(block, SqueezeExcitation) or block.kinds[0] != "avg" or block.kinds[2] not in cpu.GATES:
                continue
            # A ReLU that overwrites its input is proof that nothing else needs it.
            if type(before) is nn.ReLU and before.inplace and not has_hooks(before, block):
                defer_relu(before, block)
                found.add(block)
    return found


def _join(model: nn.Module, blocks: bool) -> int:
    """Make residual joins one pass; return the number of those that are not part of a block's pass."""
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
        known = isinstance(module, (SqueezeExcitation, SteppedBlock)) or is_external(module)
        if known or left_reason(module):
            yield path, module


def _fused(path: str, module: nn.Module, absorbed: set[nn.Module]) -> FusedBlock:
    """Fuse one block, in place."""
    kind = type(module).__name__
    if isinstance(module, SqueezeExcitation):
        if module.impl != "auto":
            module.unfused_impl, module.impl = module.impl, "auto"
        return FusedBlock(path=path, kind=kind, absorbed=module in absorbed, reason=module.refuses())
    native = not cpu.native_reason()
    if isinstance(module, SteppedBlock):
        return FusedBlock(path=path, kind=kind, stepwise=native, reason=module.reason())
    if left_reason(module):
        return FusedBlock(path=path, kind=kind, reason=left_reason(module))
    params = external_params(module)
    swap(module, FusedExternal)
    block: Any = module
    block.can_overwrite = False
    if isinstance(params, str):
        return FusedBlock(path=path, kind=kind, stepwise=native, reason=params)
    # Hooks are looked at in every call: without them the block is fast from then on.
    return FusedBlock(path=path, kind=kind, reason=hooked(module))


# ------------------------------------------------------------------------------------------------- what can be one pass
def _norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the BatchNorms that can be deferred, by their class and statistics."""
    for path, module in model.named_modules():
        known = type(module) is nn.BatchNorm2d or isinstance(module, DeferredNorm) or _has_activation(module)
        if known and isinstance(module, nn.BatchNorm2d) and norm_of(module) is not None:
            yield path, module


def _has_activation(module: nn.Module) -> bool:
    """Return whether it is timm's BatchNorm with an activation, and without dropout between the two."""
    kind = library_of(module)
    named = (kind.__module__, kind.__name__) == ("timm.layers.norm_act", "BatchNormAct2d")
    return named and type(module._modules.get("drop")) is nn.Identity


def _consumers(model: nn.Module, blocks: bool) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that can apply a deferred BatchNorm or overwrite their input."""
    there = dict(_blocks(model))
    closed = [*there, *(path for path, _ in _norms(model))]
    for path, module in model.named_modules():
        if path in there:
            if blocks and hasattr(module, "can_overwrite"):
                yield path, module
        elif any(path.startswith(f"{one}.") for one in closed):
            continue
        elif isinstance(module, (FusedJoin, FusedActivation)) or type(module) in ACTIVATIONS:
            yield path, module
