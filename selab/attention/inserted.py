"""The inserted blocks of a network, and whether each of them runs."""

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from selab.attention.base import Attention
from selab.attention.gated_site import BLOCK, INNER, GatedSite, has_block, named_sites
from selab.attention.given import check_network, check_on, example_given, patterns_given
from selab.attention.norms import check_norms
from selab.attention.se import GatedJoin
from selab.attention.sites import is_residual_block, matches
from selab.errors import InsertionError, nearest
from selab.meta import Example, On, Passage, passages
from selab.records.types import Insertion

# How many blocks a message explains.
_SHOWN = 3
_BLOCK_NAME = re.compile(rf"{BLOCK}(_\d+)?")


def inserted_blocks(model: nn.Module) -> dict[str, tuple[str, Attention]]:
    """Return the blocks that `insert_se` inserted: path → its site and the block."""
    return {
        path: (site_of(model, path), module)
        for path, module in named_sites(model)
        if isinstance(module, Attention) and module.inserted
    }


def site_of(model: nn.Module, path: str) -> str:
    """Return the site of a block: the module that holds it, or the residual block whose join or branch holds it."""
    holder = path.rpartition(".")[0]
    names = path.split(".")
    depth = getattr(model.get_submodule(path), "site_depth", 0)
    if depth == 1:
        # A branch or a join may be the site itself.
        return holder
    for up in (depth,) if depth else (2, 3):
        site = ".".join(names[:-up])
        part = names[-up] if up <= len(names) else ""
        if part in ("join", "branch") and _is_residual(model.get_submodule(site)):
            return site
    return holder


def _is_residual(module: nn.Module) -> bool:
    """Return whether a module is a residual block, or what torch.fx makes of it: its join has a block's parameters."""
    of_graph = type(module) is nn.Module and {"branch", "join"} <= module._modules.keys()
    return of_graph or is_residual_block(module)


def wrapper_prefixes(model: nn.Module) -> list[str]:
    """Return what stands before the paths of the network that wrappers such as `DataParallel` hold; first nothing.

    A wrapper has no other child with parameters.
    """
    prefixes, module = [""], model
    while not isinstance(module, GatedSite | GatedJoin | Attention):
        held = [
            (name, child)
            for name, child in module.named_children()
            if next(child.parameters(), None) is not None or next(child.buffers(), None) is not None
        ]
        if len(held) != 1 or next(module.parameters(recurse=False), None) is not None:
            break
        prefixes.append(f"{prefixes[-1]}{held[0][0]}.")
        module = held[0][1]
    return prefixes


def check_inserted(
    model: nn.Module,
    *,
    input_nchw: Example = (1, 3, 224, 224),
    inputs: Example | None = None,
    inserted: Iterable[Insertion | str] | str = (),
    on: On = "fake",
) -> tuple[str, ...]:
    """Check that every attention block of a network runs exactly once in a forward pass; the network stays as it is.

    A conversion of a network, such as folding its BatchNorms, can leave a block's parameters in the state dict without
    the block. The network then runs, and nothing says so. Call this after whatever changed the modules of a network.

    Args:
        model: any module; not changed.
        input_nchw: the shape of an example input, (N, C, H, W).
        inputs: an example input of another form: a tensor, positional arguments in a tuple, keyword arguments in a
            mapping.
        inserted: the result of `insert_se`, or paths or patterns of sites, which must still have their blocks; of a
            pattern's sites, at least one. In a wrapper such as `DataParallel` the paths of the network that it holds
            are known too.
        on: `fake` for tensors without memory, on which no kernel runs; `cpu` to run the kernels on a copy with real
            tensors, for a network in which the values of tensors decide what is computed.

    Returns:
        The sites of the blocks, in the order of the network; a block that belongs to the network itself has its own
        path.

    Raises:
        InsertionError: names the blocks that do not run once, are gone, are no longer the last layer of the sequence
            whose output they gate, or have lost the BatchNorm that read their output, and says what probably happened;
            or `inserted` names no module.
        ModelError: `model` is no module or a TorchScript network, no example is given, or the forward pass fails with
            this input.

    Examples:
        >>> from torch import nn
        >>> import selab
        >>> net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU())
        >>> inserted = selab.insert_se(net, "1", input_nchw=(1, 3, 16, 16), reduction=4)
        >>> net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
        >>> selab.check_inserted(net, input_nchw=(1, 3, 16, 16), inserted=inserted)
        ('1',)
    """
    check_network(model, "check_inserted")
    check_on(on, "check_inserted")
    example = example_given(input_nchw, inputs, "check_inserted")
    given = list(inserted) if isinstance(inserted, Iterable) and not isinstance(inserted, str) else inserted
    expected = patterns_given(given, "check_inserted: inserted")
    was_there = {one.path for one in given if isinstance(one, Insertion)} if isinstance(given, list) else set()
    check_complete(model)
    blocks = _blocks(model)
    sites = {path: site_of(model, path) if getattr(block, "inserted", True) else path for path, block in blocks.items()}
    _check_expected(model, expected, set(sites.values()), was_there)
    seen = calls_of_modules(model, example, on=on)
    check_calls(model, seen)
    _check_last(model, blocks)
    check_norms(model, blocks, sites, seen, example, on=on)
    return tuple(sites.values())


def check_complete(model: nn.Module, *, with_blocks: bool = True) -> None:
    """Refuse places of blocks whose own module was deleted, or whose block.

    Args:
        model: any module.
        with_blocks: whether a place without a block is refused as well.

    Raises:
        InsertionError: names the place.
    """
    for path, module in model.named_modules():
        if not isinstance(module, GatedSite | GatedJoin) or has_block(module):
            continue
        if module._modules.get(INNER) is None:
            raise InsertionError(f"{path}: its own module, `.inner`, was deleted; put it back, or replace {path}")
        if with_blocks:
            raise InsertionError(
                f"{path}: its attention block was deleted, and what is left cannot run; selab.remove_se(network) "
                "restores the module"
            )


def _check_expected(model: nn.Module, expected: Sequence[str], sites: set[str], was_there: set[str]) -> None:
    """Check that each path or pattern names a site that still has its block."""
    paths = [path for path, _ in named_sites(model, shared=True) if path]
    # Names that the network has itself are not those of what it wraps.
    prefixes = wrapper_prefixes(model) if _unmatched(expected, set(paths)) else [""]
    missing = {prefix: _unmatched(expected, _below(prefix, sites)) for prefix in prefixes}
    # The paths may be those of the network that a wrapper holds: all of them then.
    prefix = min(prefixes, key=lambda one: len(missing[one]))
    for pattern in missing[prefix]:
        if pattern not in was_there and not any(matches(pattern, path) for path in _below(prefix, paths)):
            known = nearest(pattern, paths)
            raise InsertionError(f"check_inserted: inserted {pattern!r}: no module has that name{known}")
    gone = [prefix + pattern for pattern in missing[prefix]]
    if gone:
        raise InsertionError(
            f"{', '.join(gone[:_SHOWN])}{_more(len(gone))}: has no attention block any more; something replaced the "
            "module that held it, such as folding a BatchNorm: insert the blocks again afterwards"
        )


def _below(prefix: str, paths: Iterable[str]) -> set[str]:
    return {path.removeprefix(prefix) for path in paths if path.startswith(prefix)}


def _unmatched(patterns: Iterable[str], sites: set[str]) -> list[str]:
    return [one for one in patterns if one not in sites and not any(matches(one, site) for site in sites)]


def _check_last(model: nn.Module, blocks: Mapping[str, nn.Module]) -> None:
    """Check that a block on the output of a sequence is still the last child."""
    for path, block in blocks.items():
        holder_path = path.rpartition(".")[0]
        holder = model.get_submodule(holder_path)
        children = list(holder._modules.items())
        if not getattr(block, "ends_sequence", False) or not isinstance(holder, nn.Sequential):
            continue
        if children[-1][1] is not block:
            name, last = children[-1][0], type(children[-1][1]).__name__
            raise InsertionError(
                f"{path}: this SE block gates the output of {holder_path}, but {name} ({last}) was added "
                "after it; remove the block first (selab.remove_se), then change the sequence and insert it again"
            )


def calls_of_modules(
    model: nn.Module, example: Example, *, on: On = "fake", open_gates: bool = False
) -> Mapping[str, Passage]:
    """Run a network once; return the calls of its modules, by their paths without blocks.

    Args:
        model: not changed.
        example: an example input.
        on: as in `check_inserted`.
        open_gates: whether each inserted block returns its input, so that the values are those of the network without
            blocks, and lead the same way.

    Raises:
        ModelError: the forward pass fails with this input.
    """
    modules = dict(named_sites(model))
    inner = [f"{path}.inner" for path, module in modules.items() if isinstance(module, GatedSite)]
    return passages(model, [*modules, *inner], example, on=on, prepare=_open_gates if open_gates else None)


def _open_gates(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, Attention) and module.inserted:
            module.register_forward_hook(lambda _module, args, _output: args[0].view_as(args[0]))


def check_calls(model: nn.Module, seen: Mapping[str, Passage]) -> None:
    """Check that every block runs once, given the calls of a network's modules.

    Raises:
        InsertionError: as `check_inserted`.
    """
    wrong = [(path, calls) for path in _blocks(model) if (calls := _calls(model, seen, path)) != 1]
    if wrong:
        shown = "; ".join(
            f"{path}: this SE block ran {calls} times in a forward pass, not once: {_why(model, seen, path, calls)}"
            for path, calls in wrong[:_SHOWN]
        )
        raise InsertionError(shown + _more(len(wrong)))


def _blocks(model: nn.Module) -> dict[str, nn.Module]:
    return {path: module for path, module in named_sites(model) if _is_block(path, module)}


def _is_block(path: str, module: nn.Module) -> bool:
    """Return whether a module is a block, or in a graph of torch.fx the container of a block's layers."""
    if isinstance(module, Attention):
        return True
    named = _BLOCK_NAME.fullmatch(path.rpartition(".")[2]) is not None
    return named and type(module) is nn.Module and next(module.parameters(), None) is not None


def _layers(path: str, module: nn.Module) -> list[str]:
    """Return the layers below a module that have parameters."""
    return [f"{path}.{name}" for name, one in module.named_modules() if name and one._parameters]


def _calls(model: nn.Module, seen: Mapping[str, Passage], path: str) -> int:
    """Return how often a block ran; a container of torch.fx is not called itself, but its layers are."""
    module = model.get_submodule(path)
    if isinstance(module, Attention):
        return seen[path].calls
    of_layers = {seen[layer].calls for layer in _layers(path, module)}
    return of_layers.pop() if len(of_layers) == 1 else min(of_layers)


def _why(model: nn.Module, seen: Mapping[str, Passage], path: str, calls: int) -> str:
    """Return what probably happened to a block that does not run once."""
    above = path.rpartition(".")[0]
    holder = model.get_submodule(above)
    kind, of_holder = type(holder).__name__, seen[above].calls
    if calls > 1:
        return f"its site {above} is shared or runs in a loop; choose a site that the forward pass goes through once"
    if isinstance(holder, GatedSite):
        if of_holder:
            return f"another forward was set on {above}; set it on {above}.inner"
        if seen[f"{above}.inner"].calls:
            return f"something calls {above}.inner past its place, such as a list of modules; choose another site"
    elif isinstance(holder, nn.Sequential) and of_holder:
        return f"the forward of {above} does not run all its children; choose one of them as the site"
    elif of_holder and not isinstance(holder, GatedJoin) and getattr(holder, "inserted", True):
        return f"{kind} does not call it; a conversion may have made a new {kind} around it: insert the block again"
    return "its site does not run either; the forward pass takes another path with this input, or never runs it"


def _more(count: int) -> str:
    return f"; and {count - _SHOWN} more" if count > _SHOWN else ""
