"""Insert attention blocks into a network, and remove them.

Every key of the baseline's checkpoint stays valid; only the keys of the blocks are new. A block is inserted in one of
three ways, whichever keeps the keys:

* the join of a residual block is replaced by one that gates an edge (`GatedJoin`);
* an `nn.Sequential` gets the block as one more child, named `se`;
* any other module gets it as a child named `se`, which a forward hook runs.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from selab.attention.auto_sites import block_ends
from selab.attention.base import Attention
from selab.attention.config import SEConfig, SiteConfig, as_keys, block_config, block_name
from selab.attention.insertions import Insertions
from selab.attention.registry import make_block
from selab.attention.se import GatedJoin, squeeze_width
from selab.attention.sites import CHILD, Tap, check_unshared, find_sites, in_stages, is_residual_block, matches, tap_for
from selab.errors import InsertionError, nearest
from selab.meta import Passage, passages
from selab.records.types import Insertion

AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """A block to insert."""

    tap: Tap
    insertion: Insertion


def insert_se(
    model: nn.Module,
    sites: str | Sequence[str] | SiteConfig,
    *,
    input_nchw: tuple[int, ...] = (1, 3, 224, 224),
    optimizer: torch.optim.Optimizer | None = None,
    dry_run: bool = False,
    **keys: object,
) -> Insertions:
    """Insert SE (or other attention) blocks into a network, in place; check that each runs once in a forward pass.

    Args:
        model: any module.
        sites: a site group that the network declares (`residual`, `pointwise` …), module-path patterns (`layer*.*.bn3`:
            `*` within a name, `**` across names), `auto` for the block ends found by tracing, or a whole configuration
            such as `selab.attention.config.ECAConfig(sites=…)`.
        input_nchw: the shape of an example input, (N, C, H, W).
        optimizer: gets the new parameters as one more group, with its defaults.
        dry_run: only list what would be done.
        keys: keys of the block, as in `--se` and in a family's TOML. For every block:

            * `block`: `se` (the default), `eca`, `cbam`, `coordinate`, `scse`, `sse`, `gather_excite`, `ese`, a
              registered name, or a class of your own as `path/to/file.py:Class`.
            * `placement`: `standard` (the branch's output, before the addition), `pre` (its input), `post` (after the
              join), `identity` (on the shortcut) or `3x3` (inside the branch). At a module that is not a residual
              block, `standard` and `post` gate its output, `pre` its input.
            * `stages`: keep only sites in these stages.
            * `init`: `he`, or `identity` for blocks that return a pretrained network's output unchanged, bit for bit,
              and still learn.

            For SE: `reduction` (channels / squeeze width, 16), `squeeze_from` (`site` or `block_input`: whose channels
            are divided), `divisor` (the squeeze width is rounded to a multiple of it), `squeeze` (`avg`, `max`,
            `none`), `gate` (`sigmoid`, `tanh`, `relu`, `hardsigmoid`), `activation` (`relu`, `silu`), `bias` (True).

    Returns:
        The inserted blocks (with `dry_run`, those that would be), in the order of the network.

    Raises:
        SpecError: an unknown key, a wrong type or a value that is not allowed; the message names the key.
        InsertionError: no site, a pattern that matches nothing, a site inside an SE block, a site whose tensor is not
            (N, C, H, W), a shared module, a reduction larger than the channels, a block that would not run exactly
            once. The message names the module; the model is not changed then.
        ModelError: the forward pass fails with this input.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> import selab
        >>> net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))
        >>> selab.insert_se(net, ["0", "2"], input_nchw=(1, 3, 16, 16), reduction=4, init="identity")
        2 SE blocks inserted: +296 parameters, +11,208 MACs per image
        >>> net(torch.zeros(1, 3, 16, 16)).shape
        torch.Size([1, 16, 12, 12])

    Source: placements: arXiv 1709.01507, Fig. 5 and Tables 14-15.
    """
    config = _config(sites, keys)
    plans = _plan(model, config, input_nchw)
    listed = Insertions(plan.insertion for plan in plans)
    if dry_run:
        return listed
    blocks = [_block_for(model, plan, config) for plan in plans]
    for plan, block in zip(plans, blocks, strict=True):
        _put(model, plan.tap, block)
    try:
        check_blocks_run(model, input_nchw)
        if optimizer is not None:
            optimizer.add_param_group({"params": [p for block in blocks for p in block.parameters()]})
    except BaseException:
        _remove(model, blocks)
        raise
    return listed


def _config(sites: str | Sequence[str] | SiteConfig, keys: dict[str, Any]) -> SiteConfig:
    if isinstance(sites, SiteConfig):
        return block_config(**{**as_keys(sites), **keys}) if keys else sites
    if keys.get("block", "se") == "se":
        keys = {"bias": True, **keys}
    stages = keys.get("stages")
    if isinstance(stages, Sequence):
        keys = {**keys, "stages": list(stages)}
    return block_config(sites=sites if isinstance(sites, str) else list(sites), **keys)


def remove_se(model: nn.Module, paths: str | Sequence[str] | None = None) -> int:
    """Remove blocks that `insert_se` inserted, in place; without any of them the network is exactly the baseline.

    Blocks that belong to the network itself stay. An optimizer that was given their parameters keeps them.

    Args:
        model: any module.
        paths: paths or patterns of sites (as `Insertion.path`) or of the blocks themselves; None for all.

    Returns:
        The number of blocks removed.

    Raises:
        InsertionError: a pattern that matches no inserted block; nothing was removed then.

    Examples:
        >>> from torch import nn
        >>> import selab
        >>> net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))
        >>> _ = selab.insert_se(net, ["0", "2"], input_nchw=(1, 3, 16, 16), reduction=4)
        >>> selab.remove_se(net, "0")
        1
        >>> selab.remove_se(net)
        1
    """
    inserted = inserted_blocks(model)
    if paths is None:
        chosen = set(inserted)
    else:
        chosen = {path for pattern in ([paths] if isinstance(paths, str) else paths) for path in _of(pattern, inserted)}
    _remove(model, [inserted[path][1] for path in chosen])
    return len(chosen)


def inserted_blocks(model: nn.Module) -> dict[str, tuple[str, Attention]]:
    """Return the blocks that `insert_se` inserted: path → its site and the block."""
    return {
        path: (_site_of(model, path), module)
        for path, module in model.named_modules()
        if isinstance(module, Attention) and module.inserted
    }


def _site_of(model: nn.Module, path: str) -> str:
    """Return the site of a block: the module that holds it, or the residual block whose join or branch holds it."""
    holder = path.rpartition(".")[0]
    names = holder.split(".")
    for depth in (1, 2):
        above = ".".join(names[:-depth])
        part = names[-depth] if depth <= len(names) else ""
        if part in ("join", "branch") and is_residual_block(model.get_submodule(above)):
            return above
    return holder


def _of(pattern: str, inserted: dict[str, tuple[str, Attention]]) -> list[str]:
    found = [path for path, (site, _) in inserted.items() if matches(pattern, path) or matches(pattern, site)]
    if not found:
        sites = [site for site, _ in inserted.values()]
        raise InsertionError(
            f"remove_se: {pattern!r} matches no inserted block"
            + (nearest(pattern, sites) if sites else "; the network has none")
        )
    return found


def _remove(model: nn.Module, blocks: Collection[nn.Module]) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, GatedJoin) and child.se in blocks:
                module._modules[name] = child.inner
            elif child in blocks and not isinstance(module, GatedJoin):
                _drop_child(module, name)


def check_blocks_run(model: nn.Module, input_nchw: tuple[int, ...]) -> None:
    """Check that every SE block of a network runs exactly once in a forward pass.

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


def _plan(model: nn.Module, config: SiteConfig, input_nchw: tuple[int, ...]) -> list[_Plan]:
    if config.sites == AUTO:
        sites = [end.path for end in block_ends(model, input_nchw)]
    else:
        sites = find_sites(model, config.sites)
    if config.stages:
        sites = in_stages(sites, config.stages)
    taps = [tap_for(model, site, config.placement) for site in sites]
    check_unshared(model, [tap.module for tap in taps])
    for tap in taps:
        _check_free(model, tap)
    seen = passages(model, {tap.module for tap in taps} | {tap.block for tap in taps}, input_nchw)
    return [_Plan(tap=tap, insertion=_insertion(tap, seen, config)) for tap in taps]


def _check_free(model: nn.Module, tap: Tap) -> None:
    holder = model.get_submodule(f"{tap.site}.join" if tap.edge else tap.module)
    if isinstance(holder, GatedJoin) or hasattr(holder, CHILD):
        raise InsertionError(f"{tap.site}: already holds an SE block (or a child named '{CHILD}'); remove it first")


def _insertion(tap: Tap, seen: Any, config: SiteConfig) -> Insertion:
    passage: Passage = seen[tap.module]
    if passage.calls != 1:
        how = (
            "does not run (a container, or unused)"
            if passage.calls == 0
            else f"runs {passage.calls} times (a shared module)"
        )
        raise InsertionError(f"{tap.module}: {how} in a forward pass, so it cannot be a site; it must run exactly once")
    shape = passage.input_shape if tap.side == "input" else passage.output_shape
    if shape is None or len(shape) != 4:
        kind = passage.input_kind if tap.side == "input" else passage.output_kind
        what = kind if shape is None else f"a tensor of shape {shape}"
        raise InsertionError(f"{tap.module}: its {tap.side} is {what}; SE needs (N, C, H, W)")
    _, channels, height, width = shape
    try:
        squeezed = _squeeze_channels(tap, seen, config, channels) if isinstance(config, SEConfig) else None
        with torch.device("meta"):
            block = make_block(config, channels, squeezed)
    except InsertionError as error:
        raise InsertionError(f"{tap.module}: {error}") from None
    return Insertion(
        path=tap.site,
        placement=config.placement,
        channels=channels,
        squeeze_channels=block.squeeze_channels,
        params=sum(parameter.numel() for parameter in block.parameters()),
        height=height,
        width=width,
        macs=block.macs(height, width),
        block=block_name(config),
    )


def _squeeze_channels(tap: Tap, seen: Any, config: SEConfig, channels: int) -> int:
    divided = channels
    if config.squeeze_from == "block_input":
        block_input = seen[tap.block].input_shape
        if block_input is None or len(block_input) != 4:
            raise InsertionError(
                f"the input of {tap.block or 'the network'} is not (N, C, H, W); use squeeze_from='site'"
            )
        divided = block_input[1]
    return squeeze_width(divided, config.reduction, config.divisor)


def _block_for(model: nn.Module, plan: _Plan, config: SiteConfig) -> Attention:
    site = model.get_submodule(plan.tap.site)
    like = next((p for owner in (site, model) for p in owner.parameters() if p.is_floating_point()), None)
    with nullcontext() if like is None else torch.device(like.device):
        block = make_block(config, plan.insertion.channels, plan.insertion.squeeze_channels)
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
