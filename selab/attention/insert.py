"""Insert attention blocks into a network, and remove them.

Every key of the baseline's checkpoint stays valid; only the keys of the blocks are new. A block is inserted in one of
three ways, whichever keeps the keys:

* the join of a residual block is replaced by one that gates an edge (`GatedJoin`);
* an `nn.Sequential` gets the block as one more child, named `se`;
* any other module is put into a `GatedSite`, which runs both and keeps the module's keys.
"""

from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from selab.attention.base import Attention
from selab.attention.config import SiteConfig, as_keys, block_config, merged_keys
from selab.attention.gated_site import (
    CONVERSIONS,
    GatedSite,
    block_of,
    free_name,
    gated_site,
    has_block,
    move_hooks,
    replace_modules,
)
from selab.attention.given import check_network, check_on, example_given, patterns_given
from selab.attention.inserted import (
    calls_of_modules,
    check_calls,
    check_complete,
    inserted_blocks,
    wrapper_prefixes,
)
from selab.attention.insertions import Insertions
from selab.attention.norms import note_norms
from selab.attention.plan import AUTO, Plan, check_changeable, plan_insertion
from selab.attention.registry import make_block
from selab.attention.se import GatedJoin
from selab.attention.sites import matches
from selab.attention.unfuse import unfuse, unswap
from selab.errors import InsertionError, nearest
from selab.kernels.swap import Swapped
from selab.meta import Example, On, Passage
from selab.meta.modes import made_on

__all__ = ["AUTO", "insert_se", "remove_se"]


def insert_se(
    model: nn.Module,
    sites: str | Sequence[str] | SiteConfig,
    *,
    input_nchw: Example = (1, 3, 224, 224),
    inputs: Example | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    dry_run: bool = False,
    on: On = "fake",
    **keys: object,
) -> Insertions:
    """Insert SE (or other attention) blocks into a network, in place; check that each runs once in a forward pass.

    Args:
        model: any module.
        sites: a site group that the network declares (`residual`, `pointwise` …), module-path patterns (`layer*.*.bn3`:
            `*` within a name, `**` across names), `auto` for the block ends found by tracing, or a whole configuration
            such as `selab.attention.config.ECAConfig(sites=…)`.
        input_nchw: the shape of an example input, (N, C, H, W).
        inputs: an example input of another form: a tensor, positional arguments in a tuple, keyword arguments in a
            mapping.
        optimizer: gets the new parameters as one more group, with its defaults.
        dry_run: only list what would be done.
        on: `fake` for passes over tensors without memory; `cpu` to run the kernels on copies with real tensors, for a
            network in which the values of tensors decide what is computed, such as one for detection.
        keys: keys of the block, as in `--se` and in a family's TOML. For every block:

            * `block`: `se` (the default), `eca`, `cbam`, `coordinate`, `scse`, `sse`, `gather_excite`, `ese`,
              `grn`, `simam`, `global_context`, `triplet`, `ela`, `sk`, `ge_theta`, `ge_theta_plus`, a
              registered name, or a class of your own as `path/to/file.py:Class`.
            * `placement`: `standard` (the branch's output, before the addition), `pre` (its input), `post` (after the
              join), `identity` (on the shortcut) or `3x3` (inside the branch). At a module that is not a residual
              block, `standard` and `post` gate its output, `pre` its input.
            * `stages`: keep only sites in these stages.
            * `init`: `he`, or `identity` for blocks that return a pretrained network's output unchanged, bit for bit,
              and still learn.

            * `min_channels`: leave out sites with fewer channels.

            For SE: `reduction` (channels / squeeze width, 16), or instead `latent_channels` (the squeeze width, or
            below 1 the fraction of the channels), `squeeze_from` (`site` or `block_input`: whose channels are divided),
            `divisor` (the squeeze width is rounded to a multiple of it), `squeeze` (`avg`, `max`, `none`), `gate`
            (`sigmoid`, `tanh`, `relu`, `hardsigmoid`), `activation` (`relu`, `silu`), `bias` (True).

    Returns:
        The inserted blocks (with `dry_run`, those that would be), in the order of the network. Its attribute `skipped`
        names the sites that were left out, for too few channels or because `auto` finds no place there. A site that a
        pattern names alone is not left out for a reduction that is too large: that is an error.

    Raises:
        SpecError: an unknown key, a wrong type or a value that is not allowed; the message names the key.
        InsertionError: no site, a pattern that matches nothing, a site inside an SE block, a site whose tensor is
            none of (N, C, H, W), (N, H, W, C) and (C, H, W), a shared module, a reduction larger than the channels, a
            block that would not run exactly once. The message names the module; the model is not changed then.
        ModelError: `model` is no module or a TorchScript network, or has lazy modules without parameters; no example
            is given; or the forward pass fails with this input.

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
    check_network(model, "insert_se")
    check_on(on, "insert_se")
    check_complete(model)
    config = _config(sites, keys)
    example = example_given(input_nchw, inputs, "insert_se")
    found = plan_insertion(model, config, example, on=on)
    plans = found.plans
    listed = Insertions((plan.insertion for plan in plans), skipped=found.skipped)
    if dry_run:
        return listed
    blocks = [_block_for(model, plan, config) for plan in plans]
    _put(model, plans, blocks)
    try:
        seen = _check_passes(model, found.seen, example, on)
        new = {id(block) for block in blocks}
        note_norms(model, {path: one for path, (_, one) in inserted_blocks(model).items() if id(one) in new}, seen)
        if optimizer is not None:
            optimizer.add_param_group({"params": [p for block in blocks for p in block.parameters()]})
    except BaseException:
        _remove(model, blocks)
        raise
    return listed


def _config(sites: str | Sequence[str] | SiteConfig, keys: dict[str, Any]) -> SiteConfig:
    if isinstance(sites, SiteConfig):
        return block_config(**merged_keys(as_keys(sites), keys)) if keys else sites
    if keys.get("block", "se") == "se":
        keys = {"bias": True, **keys}
    stages = keys.get("stages")
    if isinstance(stages, Sequence):
        keys = {**keys, "stages": list(stages)}
    return block_config(sites=sites if isinstance(sites, str) else patterns_given(sites, "insert_se: sites"), **keys)


def remove_se(model: nn.Module, paths: str | Sequence[str] | None = None) -> int:
    """Remove blocks that `insert_se` inserted, in place; without any of them the network is exactly the baseline.

    Blocks that belong to the network itself stay. An optimizer that was given their parameters keeps them. If
    `selab.fuse` ran after the insertion, removing the last block undoes what it changed: outputs are those of the
    baseline to the bit. Call `selab.fuse` again for a fused baseline.

    Args:
        model: any module.
        paths: paths or patterns of sites (as `Insertion.path`) or of the blocks themselves; None for all. In a wrapper
            such as `DataParallel` the paths of the network that it holds are known too.

    Returns:
        The number of blocks removed.

    Raises:
        InsertionError: a pattern that matches no inserted block; nothing was removed then.
        ModelError: `model` is no module, a TorchScript network, or has lazy modules without parameters.

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
    check_changeable(model, "remove_se")
    check_complete(model, with_blocks=False)
    inserted = inserted_blocks(model)
    if paths is None:
        chosen = set(inserted)
    else:
        chosen = {
            path for pattern in patterns_given(paths, "remove_se: paths") for path in _of(model, pattern, inserted)
        }
    removed = [inserted[path][1] for path in chosen]
    kept = [block for path, (_, block) in inserted.items() if path not in chosen]
    _remove(model, removed)
    if any(block.was_fused for block in removed):
        for block in kept:
            block.was_fused = True
        if not kept:
            unfuse(model)
    return len(chosen)


def take_out(model: nn.Module, path: str) -> None:
    """Let one block pass its input on, in place: a block that was inserted, or one of the network's own.

    Args:
        model: any module.
        path: of the block. A ReLU that it took over stays.

    Raises:
        InsertionError: there is no module of this path.
    """
    if path in inserted_blocks(model):
        remove_se(model, path)
        return
    try:
        block = model.get_submodule(path)
    except AttributeError:
        raise InsertionError(f"{path}: the network has no such module") from None
    model.set_submodule(path, nn.ReLU() if getattr(block, "relu_in", False) else nn.Identity())


def _of(model: nn.Module, pattern: str, inserted: dict[str, tuple[str, Attention]]) -> list[str]:
    for prefix in wrapper_prefixes(model):
        below = {path: site for path, (site, _) in inserted.items() if path.startswith(prefix)}
        found = [
            path
            for path, site in below.items()
            if any(matches(pattern, one.removeprefix(prefix)) for one in (path, site) if one.startswith(prefix))
        ]
        if found:
            return found
    sites = [site for site, _ in inserted.values()]
    raise InsertionError(
        f"remove_se: {pattern!r} matches no inserted block"
        + (nearest(pattern, sites) if sites else "; the network has none")
    )


def _remove(model: nn.Module, blocks: Collection[nn.Module]) -> None:
    _take_back_work(model, blocks)
    replaced: list[tuple[nn.Module, nn.Module]] = []
    for module in list(model.modules()):
        if isinstance(module, GatedSite):
            # Without a block its forward fails: there is nothing to keep it for.
            if not has_block(module) or block_of(module) in blocks:
                move_hooks(module, module.inner)
                replaced.append((module, module.inner))
            continue
        for name, child in list(module.named_children()):
            if isinstance(child, GatedJoin) and (not has_block(child) or child.se in blocks):
                module._modules[name] = child.inner
            elif child in blocks and not isinstance(module, GatedJoin):
                _take_child(module, name)
    replace_modules(model, replaced)


def _take_child(parent: nn.Module, name: str) -> None:
    """Remove a block from a sequence; give layers that were appended to it since the numbers that they would have."""
    children: dict[str, nn.Module | None] = {}
    shift = 0
    for position, (old, child) in enumerate(parent._modules.items()):
        if old == name:
            shift = 1
            continue
        new = str(position - 1) if shift and old == str(position) else old
        children[old if new in children else new] = child
    parent._modules.clear()
    parent._modules.update(children)


def _take_back_work(model: nn.Module, blocks: Collection[nn.Module]) -> None:
    """Let modules do again what `selab.fuse` left to blocks that will be gone, or to their joins."""
    joins = [
        module
        for module in model.modules()
        if isinstance(module, GatedJoin) and has_block(module) and module.se in blocks
    ]
    for module in model.modules():
        consumers = module.__dict__.get("consumers", ())
        if isinstance(module, Swapped) and any(one in blocks or one in joins for one in consumers):
            unswap(module)


def _check_passes(model: nn.Module, before: Mapping[str, Passage], example: Example, on: On) -> Mapping[str, Passage]:
    """Check that every block runs once, and every other module as often as before; return their calls.

    Raises:
        InsertionError: names the module.
        ModelError: the forward pass fails with this input.
    """
    after = calls_of_modules(model, example, on=on, open_gates=on == "cpu")
    check_calls(model, after)
    for path, passage in before.items():
        # What is below a residual block's join has another path now.
        if path in after and after[path].calls != passage.calls:
            raise InsertionError(
                f"{path}: runs {after[path].calls} times in a forward pass with the blocks, and {passage.calls} times "
                "without; the network treats a site by its class, or holds it elsewhere: choose another site"
            )
    return after


def _block_for(model: nn.Module, plan: Plan, config: SiteConfig) -> Attention:
    site = model.get_submodule(plan.tap.site)
    like = next((p for owner in (site, model) for p in owner.parameters() if p.is_floating_point()), None)
    with nullcontext() if like is None else made_on(like.device):
        block = make_block(config, plan.insertion.channels, plan.insertion.squeeze_channels)
    block.inserted = True
    # A half-precision network may keep its norms in float32: what the block gates has the dtype of the feature map.
    dtype = plan.dtype if plan.dtype is not None and plan.dtype.is_floating_point else None
    if like is not None:
        block.to(device=like.device, dtype=dtype or like.dtype)
    return block.train(model.training)


def _put(model: nn.Module, plans: Sequence[Plan], blocks: Sequence[Attention]) -> None:
    replaced: list[tuple[nn.Module, nn.Module]] = []
    for plan, block in zip(plans, blocks, strict=True):
        tap = plan.tap
        below = _depth(tap.module) - _depth(tap.site)
        # What a residual block's join holds is below the join, whichever edge is gated.
        block.site_depth = 2 if tap.edge else below + 1
        if tap.edge:
            owner = model.get_submodule(tap.site)
            owner.join = GatedJoin(owner.get_submodule("join"), block, tap.edge).train(owner.training)
            continue
        module = model.get_submodule(tap.module)
        parent_path, _, name = tap.module.rpartition(".")
        parent = model.get_submodule(parent_path)
        if plan.channels_last:
            replaced.append((module, gated_site(module, block, tap.side, one_tensor=False, channels_last=True)))
        elif _runs_children_in_order(module):
            last = list(module._modules)[-1] if module._modules else None
            _add_child(module, block, after=None if tap.side == "input" else last)
            block.ends_sequence = tap.side == "output"
        elif tap.module != tap.site and _runs_children_in_order(parent):
            # Inside the named branch of a residual block: a child of the branch, not of a leaf.
            _add_child(parent, block, after=name)
            block.site_depth = below
        else:
            replaced.append((module, gated_site(module, block, tap.side, one_tensor=plan.one_tensor)))
    replace_modules(model, replaced)


def _depth(path: str) -> int:
    return len(path.split("."))


def _runs_children_in_order(module: nn.Module) -> bool:
    # One that converts itself makes one layer of its own children, without the block.
    converts = any(hasattr(module, name) for name in CONVERSIONS)
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward and not converts


def _add_child(parent: nn.Module, child: nn.Module, *, after: str | None) -> None:
    items = list(parent._modules.items())
    position = 0 if after is None else [key for key, _ in items].index(after) + 1
    items.insert(position, (free_name(parent), child))
    parent._modules.clear()
    parent._modules.update(items)
