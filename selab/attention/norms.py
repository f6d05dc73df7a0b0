"""The BatchNorms behind inserted blocks: which there were, and whether something else took over their work."""

import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from selab.attention.base import Attention
from selab.attention.gated_site import INNER, named_sites, sites_own
from selab.attention.module_paths import holds
from selab.errors import InsertionError
from selab.meta import Example, On, Passage, passages

_NOTE = "norm_behind"
# They scale the channels too, and normalise nothing.
_NO_NORMS = (nn.modules.conv._ConvNd, nn.Linear, nn.PReLU, nn.Embedding)
_MULTIPLY = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
# Whose forward is known to normalise, unless an instance has another.
_KNOWN = ("torch.nn.", "selab.")


def note_norms(model: nn.Module, blocks: Mapping[str, nn.Module], seen: Mapping[str, Passage]) -> None:
    """Note on each block which BatchNorm reads its output, given the calls of a network's modules.

    Args:
        model: the network.
        blocks: the new blocks by their paths.
        seen: as `calls_of_modules` returns them.
    """
    readers = _readers(model, blocks, seen)
    for path, block in blocks.items():
        norms = [one for one in readers.get(path, ()) if _has_statistics(model.get_submodule(one))]
        # Where other layers read the output as well, nothing before the block can take over the BatchNorm's work: what
        # removes it merges it with those layers.
        if norms and not _other_readers(path, norms[-1], seen):
            noted = _relative(norms[-1], path)
            # A graph of torch.fx keeps the layers of a block, but not the block.
            for module in block.modules():
                module.norm_behind = noted  # type: ignore[assignment]


def _other_readers(block: str, norm: str, seen: Mapping[str, Passage]) -> list[str]:
    """Return the modules beside a norm that read a block's output as it is, and do not only pass it on."""
    reading = [path for path, one in seen.items() if one.calls and one.source == block and not one.returns_input]
    return [path for path in reading if not (holds(path, norm) or holds(norm, path) or holds(path, block))]


def check_norms(
    model: nn.Module,
    blocks: Mapping[str, nn.Module],
    sites: Mapping[str, str],
    seen: Mapping[str, Passage],
    example: Example,
    *,
    on: On = "fake",
) -> None:
    """Check that what normalised the output of a block still does: no layer before a block can take over its work.

    Args:
        model: the network.
        blocks: its blocks by their paths.
        sites: the site of each.
        seen: as `calls_of_modules` returns them.
        example: an example input.
        on: as in `check_inserted`.

    Raises:
        InsertionError: names the block and the BatchNorm that is gone.
    """
    readers = _readers(model, blocks, seen)
    doubtful: dict[str, list[str]] = {}
    for path, block in blocks.items():
        noted = _noted(block)
        if not noted:
            continue
        found = [one for one in (*readers.get(path, ()), *_places(model, path, noted)) if one in seen]
        found += [one for one in _readers_in_graph(model, path) if one in seen]
        found = [one for one in found if seen[one].calls and not seen[one].returns_input]
        if not any(_is_known(model.get_submodule(one)) for one in found):
            doubtful[path] = found
    running = _using_their_state(model, {one for found in doubtful.values() for one in found}, example, on)
    for path, found in doubtful.items():
        if not running & set(found):
            norm = _absolute(_noted(blocks[path]), path)
            raise InsertionError(
                f"{path}: the BatchNorm behind this SE block, {norm}, is gone; if it was folded into {sites[path]}, "
                "the outputs are wrong, because the block stands between the two: load the weights again, and fold "
                "before you insert the blocks; if you only removed it, remove and insert the block again "
                "(selab.remove_se, selab.insert_se)"
            )


def _noted(block: nn.Module) -> str:
    found = (getattr(module, _NOTE, "") for module in block.modules())
    return next((one for one in found if isinstance(one, str) and one), "")


def _readers(model: nn.Module, blocks: Mapping[str, nn.Module], seen: Mapping[str, Passage]) -> dict[str, list[str]]:
    """Return block → what may be a normalisation that reads its output as it is, by their paths without blocks."""
    found: dict[str, list[str]] = {}
    for path, module in named_sites(model):
        source = seen[path].source if path in seen else ""
        if source in blocks and (_normalises(module) or _may_normalise(module, blocks[source])):
            found.setdefault(source, []).append(path)
    return found


def _places(model: nn.Module, path: str, noted: str) -> list[str]:
    """Return where the noted BatchNorm, or what replaced it, can be: in a graph of torch.fx also as `.inner`."""
    norm = _absolute(noted, path)
    if isinstance(model.get_submodule(path), Attention):
        return [norm]
    names = [name for name in norm.split(".") if name != INNER]
    return [one for one, _ in model.named_modules() if [name for name in one.split(".") if name != INNER] == names]


def _readers_in_graph(model: nn.Module, path: str) -> Iterator[str]:
    """Yield the modules that read a block's output in a graph of torch.fx: its layers, then one product."""
    names = path.split(".")
    for depth in range(len(names)):
        above = ".".join(names[:depth])
        owner: Any = model.get_submodule(above)
        if isinstance(owner, torch.fx.GraphModule):
            prefix = f"{above}." if above else ""
            for target in _targets(owner.graph, ".".join(names[depth:])):
                yield prefix + target


def _targets(graph: torch.fx.Graph, block: str) -> Iterator[str]:
    following = [node for node in graph.nodes if _is_of(node, block)]
    seen = set(following)
    while following:
        node = following.pop()
        for user in node.users:
            if user.op == "call_module" and not _is_of(user, block) and node.target in _MULTIPLY:
                yield str(user.target)
            elif user.op in ("call_function", "call_method") and node.target not in _MULTIPLY and user not in seen:
                seen.add(user)
                following.append(user)


def _is_of(node: torch.fx.Node, block: str) -> bool:
    return node.op == "call_module" and str(node.target).startswith(f"{block}.")


def _is_known(module: nn.Module) -> bool:
    """Return whether a module is a normalisation whose forward is that of torch's class."""
    own = sites_own(module)
    known = type(own).__module__.startswith(_KNOWN) and "forward" not in vars(own)
    return known and (isinstance(own, nn.modules.batchnorm._NormBase) or _normalises(own))


def _using_their_state(model: nn.Module, paths: set[str], example: Example, on: On) -> set[str]:
    """Return which of these modules read one of their parameters or buffers of several elements in a forward pass.

    One that normalises needs its scale or its statistics, of whatever class it is. One that computes them from its
    input alone is known by the name of its class.
    """
    if not paths:
        return set()
    using = {path for path in paths if _is_stateless_norm(model.get_submodule(path))}

    def watch(copy: nn.Module) -> None:
        for path in paths:
            for module in _parts(copy.get_submodule(path)):
                _watch(module, lambda path=path: using.add(path))

    passages(model, [], example, on=on, prepare=watch)
    return using


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """Yield a module and those in it, without blocks and without layers that normalise nothing."""
    own = sites_own(module)
    if isinstance(own, (Attention, *_NO_NORMS)):
        return
    yield own
    for child in own.children():
        yield from _parts(child)


def _watch(module: nn.Module, tell: Any) -> None:
    """Let a module tell when one of its tensors is read."""
    state = {
        name
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None and tensor.is_floating_point()
    }
    if not state or isinstance(module, torch.jit.ScriptModule):
        return
    kind: Any = type(module)

    def read(self: nn.Module, name: str) -> Any:
        if name in state:
            tell()
        return kind.__getattr__(self, name)

    module.__class__ = type(kind.__name__, (kind,), {"__getattr__": read, "__module__": kind.__module__})


def _is_stateless_norm(module: nn.Module) -> bool:
    own = sites_own(module)
    return "forward" not in vars(own) and _normalises(own) and next(iter(own.state_dict()), None) is None


def _may_normalise(module: nn.Module, block: nn.Module) -> bool:
    """Return whether a module holds numbers for each channel of a block's output, and nothing larger."""
    own = sites_own(module)
    channels = getattr(block, "channels", 0)
    sizes = {tensor.numel() for tensor in (*own.parameters(), *own.buffers())}
    return channels in sizes and max(sizes) == channels and not isinstance(own, (Attention, *_NO_NORMS))


def _normalises(module: nn.Module) -> bool:
    """Return whether a module is a normalisation, also of another library."""
    return _has_statistics(module) or "norm" in type(sites_own(module)).__name__.lower()


def _has_statistics(module: nn.Module) -> bool:
    """Return whether a module is a BatchNorm, also a frozen one of another library."""
    own = sites_own(module)
    return isinstance(own, nn.modules.batchnorm._BatchNorm) or "running_mean" in own._buffers


def _relative(path: str, start: str) -> str:
    """Return a path as seen from another, with a leading dot for each name to go up."""
    names, above = path.split("."), start.split(".")
    shared = next(
        (i for i, (a, b) in enumerate(zip(names, above, strict=False)) if a != b), min(len(names), len(above))
    )
    return "." * (len(above) - shared) + ".".join(names[shared:])


def _absolute(relative: str, start: str) -> str:
    """Return the path that `_relative` was given."""
    up = len(relative) - len(relative.lstrip("."))
    return ".".join([*start.split(".")[: len(start.split(".")) - up], relative[up:]])
