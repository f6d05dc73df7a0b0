"""Pure surgery: put attention blocks into a network, say what was done, and undo it.

Every key of the baseline's checkpoint stays as it is; those of the blocks are the only new ones. A block is
inserted by one of three moves, whichever keeps the keys:

* a residual block's join is replaced by one that gates an edge (`GatedJoin`);
* in an `nn.Sequential` the block becomes one more child, named `se`;
* at any other module it becomes a child named `se` that a forward hook runs.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from selab.attention.auto_sites import block_ends
from selab.attention.base import Attention, Init
from selab.attention.blocks import CBAM, ECA, ESE, SCSE, SSE, CoordinateAttention, GatherExcite
from selab.attention.config import Activation, Gate, Placement, SEConfig, SiteConfig, Squeeze, SqueezeFrom, block_config
from selab.attention.se import GatedJoin, SqueezeExcitation, squeeze_width
from selab.attention.sites import CHILD, Tap, check_unshared, find_sites, in_stages, tap_for
from selab.errors import InsertionError
from selab.meta import Passage, passages
from selab.records.types import Insertion

_BLOCKS: dict[str, type[Attention]] = {
    "eca": ECA,
    "cbam": CBAM,
    "coordinate": CoordinateAttention,
    "scse": SCSE,
    "sse": SSE,
    "gather_excite": GatherExcite,
    "ese": ESE,
}
AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """One block before it exists."""

    tap: Tap
    insertion: Insertion


def insert_se(
    model: nn.Module,
    sites: str | Sequence[str] | SiteConfig,
    *,
    input_nchw: tuple[int, ...] = (1, 3, 224, 224),
    placement: Placement = "standard",
    reduction: int = 16,
    squeeze_from: SqueezeFrom = "site",
    divisor: int = 1,
    squeeze: Squeeze = "avg",
    gate: Gate = "sigmoid",
    activation: Activation = "relu",
    bias: bool = True,
    init: Init = "he",
    optimizer: torch.optim.Optimizer | None = None,
    dry_run: bool = False,
) -> tuple[Insertion, ...]:
    """Puts SE (or other attention) blocks into a network, in place, and proves that each runs once in a forward pass.

    Args:
        model: any module.
        sites: a site group that the network declares (`residual`, `pointwise` …), module-path patterns (`layer*.*.bn3`:
            `*` within a name, `**` across names), `auto` for the block ends that tracing finds, or all facts at once
            (`selab.spec.ECAConfig(sites=…)` for another kind of block); then the arguments from `placement` to `bias`
            are not looked at.
        input_nchw: the shape of an example input, (N, C, H, W).
        placement: `standard` (the branch's output, before the addition), `pre` (its input), `post` (after the join),
            `identity` (on the shortcut) or `3x3` (inside the branch). At a module that is no residual block, `standard`
            and `post` gate its output, `pre` its input.
        reduction: channels / squeeze width.
        squeeze_from: the channels that are divided: those at the `site`, or those of the `block_input`.
        divisor: the squeeze width is rounded to a multiple of it.
        squeeze: `avg`, `max` or `none`.
        gate: `sigmoid`, `tanh`, `relu` or `hardsigmoid`.
        activation: between the blocks' layers, `relu` or `silu`.
        bias: whether the blocks' layers have biases.
        init: `he`, or `identity` for blocks that leave a pretrained network's output as it is, to the bit, and learn.
        optimizer: gets the new parameters as one more group, with its defaults.
        dry_run: only list what would be done.

    Returns:
        What was (or would be) inserted, in the order of the network.

    Raises:
        SpecError: an argument of a wrong type or a word that is not allowed; the message names it.
        InsertionError: no site, a pattern that matches nothing, a site inside an SE block, a site whose tensor is not
            (N, C, H, W), a shared module, a reduction larger than the channels, a block that would not run exactly
            once. The message names the module; the model is left as it was.
        ModelError: the forward pass fails with this input.

    Source: placements: arXiv 1709.01507, Fig. 5 and Tables 14-15.
    """
    if isinstance(sites, SiteConfig):
        facts = sites
    else:
        facts = block_config(
            sites=sites if isinstance(sites, str) else list(sites),
            placement=placement,
            reduction=reduction,
            squeeze_from=squeeze_from,
            divisor=divisor,
            squeeze=squeeze,
            gate=gate,
            activation=activation,
            bias=bias,
        )
    plans = _plan(model, facts, input_nchw, init)
    if dry_run:
        return tuple(plan.insertion for plan in plans)
    blocks = [_block_for(model, plan, facts, init) for plan in plans]
    for plan, block in zip(plans, blocks, strict=True):
        _put(model, plan.tap, block)
    try:
        check_blocks_run(model, input_nchw)
        if optimizer is not None:
            optimizer.add_param_group({"params": [p for block in blocks for p in block.parameters()]})
    except BaseException:
        _remove(model, blocks)
        raise
    return tuple(plan.insertion for plan in plans)


def remove_se(model: nn.Module) -> int:
    """Takes out every block that `insert_se` put in, in place; gives back exactly the baseline.

    Blocks that belong to the network itself stay. An optimizer that was given their parameters keeps them.

    Returns:
        The number of blocks removed.
    """
    blocks = [module for module in model.modules() if isinstance(module, Attention) and module.inserted]
    _remove(model, blocks)
    return len(blocks)


def _remove(model: nn.Module, blocks: Collection[nn.Module]) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, GatedJoin) and child.se in blocks:
                module._modules[name] = child.inner
            elif child in blocks and not isinstance(module, GatedJoin):
                _drop_child(module, name)


def check_blocks_run(model: nn.Module, input_nchw: tuple[int, ...]) -> None:
    """Proves that every SE block of a network runs exactly once in a forward pass.

    Raises:
        InsertionError: names the first block that does not.
        ModelError: the forward pass fails with this input.
    """
    paths = [path for path, module in model.named_modules() if isinstance(module, Attention)]
    for path, passage in passages(model, paths, input_nchw).items():
        if passage.calls != 1:
            raise InsertionError(
                f"{path}: this SE block ran {passage.calls} times in a forward pass, not once; "
                "choose a site that the forward pass goes through once"
            )


def _plan(model: nn.Module, facts: SiteConfig, input_nchw: tuple[int, ...], init: Init) -> list[_Plan]:
    if facts.sites == AUTO:
        sites = [end.path for end in block_ends(model, input_nchw)]
    else:
        sites = find_sites(model, facts.sites)
    if facts.stages:
        sites = in_stages(sites, facts.stages)
    taps = [tap_for(model, site, facts.placement) for site in sites]
    check_unshared(model, [tap.module for tap in taps])
    for tap in taps:
        _check_free(model, tap)
    seen = passages(model, {tap.module for tap in taps} | {tap.block for tap in taps}, input_nchw)
    return [_Plan(tap=tap, insertion=_insertion(tap, seen, facts, init)) for tap in taps]


def _check_free(model: nn.Module, tap: Tap) -> None:
    holder = model.get_submodule(f"{tap.site}.join" if tap.edge else tap.module)
    if isinstance(holder, GatedJoin) or hasattr(holder, CHILD):
        raise InsertionError(f"{tap.site}: already holds an SE block (or a child named '{CHILD}'); remove it first")


def _insertion(tap: Tap, seen: Any, facts: SiteConfig, init: Init) -> Insertion:
    passage: Passage = seen[tap.module]
    if passage.calls != 1:
        how = "does not run" if passage.calls == 0 else f"runs {passage.calls} times (a shared module)"
        raise InsertionError(f"{tap.module}: {how} in a forward pass, so it cannot be a site; it must run exactly once")
    shape = passage.input_shape if tap.side == "input" else passage.output_shape
    if shape is None or len(shape) != 4:
        kind = passage.input_kind if tap.side == "input" else passage.output_kind
        what = kind if shape is None else f"a tensor of shape {shape}"
        raise InsertionError(f"{tap.module}: its {tap.side} is {what}; SE needs (N, C, H, W)")
    _, channels, height, width = shape
    try:
        squeezed = _squeeze_channels(tap, seen, facts, channels) if isinstance(facts, SEConfig) else None
        with torch.device("meta"):
            block = _make(facts, channels, squeezed, init)
    except InsertionError as error:
        raise InsertionError(f"{tap.module}: {error}") from None
    return Insertion(
        path=tap.site,
        placement=facts.placement,
        channels=channels,
        squeeze_channels=block.squeeze_channels,
        params=sum(parameter.numel() for parameter in block.parameters()),
        height=height,
        width=width,
        macs=block.macs(height, width),
        block=str(facts.__struct_config__.tag),
    )


def _squeeze_channels(tap: Tap, seen: Any, facts: SEConfig, channels: int) -> int:
    divided = channels
    if facts.squeeze_from == "block_input":
        block_input = seen[tap.block].input_shape
        if block_input is None or len(block_input) != 4:
            raise InsertionError(
                f"the input of {tap.block or 'the network'} is not (N, C, H, W); use squeeze_from='site'"
            )
        divided = block_input[1]
    return squeeze_width(divided, facts.reduction, facts.divisor)


def _make(facts: SiteConfig, channels: int, squeeze_channels: int | None, init: Init) -> Attention:
    """The block that facts describe, for a map of this many channels."""
    if isinstance(facts, SEConfig):
        return SqueezeExcitation(
            channels,
            squeeze=facts.squeeze,
            gate=facts.gate,
            activation=facts.activation,
            bias=facts.bias,
            squeeze_channels=squeeze_channels,
            init=init,
        )
    own = {name: getattr(facts, name) for name in facts.__struct_fields__ if name not in SiteConfig.__struct_fields__}
    return _BLOCKS[str(facts.__struct_config__.tag)](channels, **own, init=init)


def _block_for(model: nn.Module, plan: _Plan, facts: SiteConfig, init: Init) -> Attention:
    site = model.get_submodule(plan.tap.site)
    like = next((p for owner in (site, model) for p in owner.parameters() if p.is_floating_point()), None)
    with nullcontext() if like is None else torch.device(like.device):
        block = _make(facts, plan.insertion.channels, plan.insertion.squeeze_channels, init)
    block.inserted = True
    if like is not None:
        block.to(device=like.device, dtype=like.dtype)
    return block.train(model.training)


def _put(model: nn.Module, tap: Tap, block: Attention) -> None:
    if tap.edge:
        owner = model.get_submodule(tap.site)
        owner.join = GatedJoin(owner.get_submodule("join"), block, tap.edge).train(owner.training)
        return
    module = model.get_submodule(tap.module)
    parent_path, _, name = tap.module.rpartition(".")
    parent = model.get_submodule(parent_path)
    if _runs_children_in_order(module):
        _add_child(module, CHILD, block, after=None if tap.side == "input" else list(module._modules)[-1])
    elif tap.module != tap.site and _runs_children_in_order(parent):
        # Inside the named branch of a residual block: a child of the branch, not of a leaf.
        _add_child(parent, CHILD, block, after=name)
    else:
        module.add_module(CHILD, block)
        if tap.side == "input":
            module.register_forward_pre_hook(_gate_input)
        else:
            module.register_forward_hook(_gate_output)


def _runs_children_in_order(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _add_child(parent: nn.Module, name: str, child: nn.Module, *, after: str | None) -> None:
    if name in parent._modules:
        raise InsertionError(f"{type(parent).__name__}: already has a child named {name!r}; remove it first")
    items = list(parent._modules.items())
    position = 0 if after is None else [key for key, _ in items].index(after) + 1
    items.insert(position, (name, child))
    parent._modules.clear()
    parent._modules.update(items)


def _drop_child(module: nn.Module, name: str) -> None:
    del module._modules[name]
    for hooks, ours in ((module._forward_hooks, _gate_output), (module._forward_pre_hooks, _gate_input)):
        _drop_hook(hooks, ours)


def _drop_hook(hooks: Any, ours: Callable[..., Any]) -> None:
    for key in [key for key, hook in hooks.items() if hook is ours]:
        del hooks[key]


def _gate_output(module: nn.Module, _args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    gated: torch.Tensor = module.get_submodule(CHILD)(output)
    return gated


def _gate_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (module.get_submodule(CHILD)(args[0]), *args[1:])
