"""The place of an inserted block: a module around the site, which keeps the site's checkpoint keys.

The site's own module stays a plain child of it, so a conversion of that module (to SyncBatchNorm, to a frozen
BatchNorm, to another dtype) neither drops the block nor changes it.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor, nn

from selab.attention.base import Attention
from selab.kernels.ownership import trust_container

INNER = "inner"
"""The name of the site's own module as a child of its `GatedSite`."""
BLOCK = "se"
"""The name of an inserted block as a child of a module, where the site has no attribute of that name."""

# What folding a BatchNorm into the convolution before it reads, and no forward pass does.
_FOLDED = {"running_mean", "running_var"}
_FOLDED_OF_CONVOLUTION = {"groups"}
# What it assigns.
_FOLDED_INTO = ("weight", "bias")
_CONVOLUTION_OR_LINEAR = (nn.modules.conv._ConvNd, nn.Linear)
# With these a module converts itself. What calls them walks over all modules, and would take the converted inner module
# for the site's place, or convert it twice.
CONVERSIONS = ("fuse", "reparameterize", "switch_to_deploy")
# What a module holds besides its children: its own tables, and what `selab.fuse` notes.
_NOT_REFERENCES = {"_modules", "_parameters", "_buffers", "producers", "consumers"}
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


class GatedSite(nn.Module):
    """A module with an attention block on its output, se(inner(...)), or on its first input, inner(se(x), ...).

    Everything but a call goes to the inner module: attributes are read from it and set on it, and containers can be
    indexed and iterated. Only what a folding of BatchNorm reads or assigns is refused: it would bypass the block, or
    fold across it.

    A conversion of the dtype and `requires_grad_`, called on this module itself, reach the inner module only. Called on
    the network they reach all its modules, as always.

    The state dict has the inner module's keys without `inner.`, and the block's keys under the block's name. So
    `named_modules` and `named_parameters` list `bn.inner` and `bn.inner.weight`, where `state_dict` has `bn.weight`.

    Shapes: the gated tensor is (N, C, H, W), or (N, H, W, C) with `channels_last`; or one
    image of it, without N.

    Args:
        inner: the site's own module.
        se: the block.
        side: which tensor is gated.
        channels_last: whether the gated tensor is (N, H, W, C).
    """

    if TYPE_CHECKING:
        # torch.jit.script takes annotations of a class for types of its own.
        inner: nn.Module
        se: nn.Module
        _side: Literal["input", "output"]
        _channels_last: bool
        _block_name: str

    def __init__(
        self, inner: nn.Module, se: Attention, side: Literal["input", "output"], *, channels_last: bool = False
    ) -> None:
        super().__init__()
        # Private names: a public one would hide the inner module's attribute of that name.
        own = self.__dict__
        own["_side"], own["_channels_last"] = side, channels_last
        own["_block_name"] = free_name(inner)
        self._modules[INNER] = inner
        self._modules[self._block_name] = se
        self.training = inner.training
        self._load_state_dict_post_hooks[0] = _after_loading

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Arguments of the inner module → its output; one of them, of shape (N, C, H, W), is gated."""
        inner: Any = self._modules[INNER]
        if self._side == "output":
            return self._gated(inner(*args, **kwargs))
        return inner(self._gated(args[0]), *args[1:], **kwargs)

    def _gated(self, x: Tensor) -> Tensor:
        block: Any = self._modules[self._block_name]
        if self._channels_last:
            last: Tensor = block(x.movedim(-1, -3)).movedim(-3, -1)
            return last
        out: Tensor = block(x)
        return out

    def extra_repr(self) -> str:
        """Return the gated side, for printing."""
        return f"{self._side}, channels last" if self._channels_last else self._side

    # ------------------------------------------------------------------------------------------------- attributes
    def __getattr__(self, name: str) -> Any:
        """Return a child, or an attribute of the inner module."""
        modules = self.__dict__.get("_modules", {})
        if name in modules:
            return modules[name]
        if name in self.__dict__.get("_buffers", {}):
            return self._buffers[name]
        inner = modules.get(INNER)
        if inner is None or not _is_public(inner, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if name in CONVERSIONS and hasattr(inner, name):
            raise AttributeError(
                f"{type(inner).__name__}.{name}: an attention block is inserted at this module, and merging it into "
                "another layer would drop the block; remove the blocks first (selab.remove_se), insert at the module "
                "that merges (as `auto` does), or call it on `.inner`"
            )
        _check_not_folded(inner, name)
        return getattr(inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute of the inner module, or a child."""
        modules = self.__dict__.get("_modules", {})
        inner = modules.get(INNER)
        own = name in modules or name in self.__dict__ or hasattr(type(self), name)
        own = own or name in self.__dict__.get("_buffers", {})
        if inner is None or own or (name.startswith("_") and not _is_public(inner, name)):
            super().__setattr__(name, value)
        else:
            _check_not_folded_into(inner, name, value, self._side)
            setattr(inner, name, value)

    def __delattr__(self, name: str) -> None:
        """Delete an attribute of the inner module."""
        if name in self._modules or name in self.__dict__:
            super().__delattr__(name)
        else:
            delattr(self._modules[INNER], name)

    def __dir__(self) -> list[str]:
        """Return the attributes of both modules."""
        return sorted({*object.__dir__(self), *self._modules, *dir(self._modules[INNER])})

    # ------------------------------------------------------------------------------------------------ conversions
    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Set `requires_grad` of the inner module's parameters."""
        self.inner.requires_grad_(requires_grad)
        return self

    def type(self, dst_type: torch.dtype | str) -> Self:
        """Convert the inner module, as `torch.nn.Module.type` does."""
        self.inner.type(dst_type)
        return self

    def float(self) -> Self:
        """Convert the inner module to float32."""
        self.inner.float()
        return self

    def double(self) -> Self:
        """Convert the inner module to float64."""
        self.inner.double()
        return self

    def half(self) -> Self:
        """Convert the inner module to float16."""
        self.inner.half()
        return self

    def bfloat16(self) -> Self:
        """Convert the inner module to bfloat16."""
        self.inner.bfloat16()
        return self

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move both modules to a device; convert the inner module only to a dtype."""
        parsed: Any = torch._C._nn._parse_to(*args, **kwargs)
        device, _, non_blocking, _ = parsed
        self.inner.to(*args, **kwargs)
        block = self._modules.get(self._block_name)
        if device is not None and block is not None:
            block.to(device=device, non_blocking=non_blocking)
        return self

    # ---------------------------------------------------------------------------------------------------- children
    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Replace one of the two children, or add a child to the inner module."""
        if name in self._modules:
            super().add_module(name, module)
        else:
            self.inner.add_module(name, module)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:  # noqa: ARG002
        """Refuse, before a caller such as `torch.nn.utils.prune` has changed anything."""
        self._refuse_to_hold("parameter", name)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:  # noqa: ARG002
        """Hold a buffer that counters such as thop add to every module; refuse one that belongs to the inner module.

        It is not part of the state dict, where the inner module's buffer of that name is.
        """
        if any(name.startswith(f"{parameter}_") for parameter in self.inner._parameters):
            # As torch.nn.utils.prune calls what it makes of a weight.
            self._refuse_to_hold("buffer", name)
        # Not by the class above, which asks whether there is an attribute of that name: the inner module may have it.
        self._buffers[name] = tensor
        self._non_persistent_buffers_set.add(name)

    def _refuse_to_hold(self, what: str, name: str) -> None:
        raise AttributeError(
            f"{what} {name!r}: an attention block is inserted at this module, so it is a {type(self).__name__}; "
            f"register it at the site's own {type(self.inner).__name__}, its attribute `.inner`"
        )

    # ------------------------------------------------------------------------------------------------ checkpoints
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the state under the site's own keys, as `torch.nn.Module.state_dict` does."""
        names = ("destination", "prefix", "keep_vars")
        given = dict(zip(names, args, strict=False)) | kwargs
        destination, prefix = given.get("destination"), given.get("prefix", "")
        keep_vars = given.get("keep_vars", False)
        if destination is None:
            made: Any = OrderedDict()
            made._metadata = OrderedDict()
            destination = made
        for before in self._state_dict_pre_hooks.values():
            before(self, prefix, keep_vars)
        for name, child in self._modules.items():
            if child is not None:
                path = prefix if name == INNER else f"{prefix}{name}."
                child.state_dict(destination=destination, prefix=path, keep_vars=keep_vars)
        metadata = getattr(destination, "_metadata", {})
        # A module below the site is looked up by its own path when the state is loaded again.
        for path in [path for path in metadata if path.startswith(prefix)]:
            rest = path[len(prefix) :]
            if rest and rest.partition(".")[0] not in (INNER, self._block_name):
                metadata[f"{prefix}{INNER}.{rest}"] = metadata[path]
        for after in self._state_dict_hooks.values():
            replaced = after(self, destination, prefix, metadata.get(prefix[:-1], {}))
            destination = destination if replaced is None else replaced
        return destination

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Give the site's keys to the inner module, as the caller of this method looks them up."""
        # A user's hooks see the site's own keys.
        for hook in self._load_state_dict_pre_hooks.values():
            hook(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        inner = self._modules[INNER]
        for key in [key for key in state_dict if key.startswith(prefix)]:
            rest = key[len(prefix) :]
            first = rest.partition(".")[0]
            if first != self._block_name and (first != INNER or hasattr(inner, INNER)):
                state_dict[f"{prefix}{INNER}.{rest}"] = state_dict.pop(key)
        self.__dict__["_loading"] = (prefix, missing_keys, unexpected_keys, error_msgs)
        if inner is not None:
            # The caller has no metadata under the inner module's path. It belongs to the site's path, and a class
            # reads it before its hooks run.
            inner.__dict__["_load_from_state_dict"] = partial(_load_with_metadata, inner, dict(local_metadata))

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what only a load in progress needs."""
        return {name: value for name, value in self.__dict__.items() if name != "_loading"}


class GatedMap(GatedSite):
    """A `GatedSite` whose inner module takes one tensor; `torch.jit.script` can compile it."""

    def forward(self, x: Tensor) -> Tensor:
        """The input of the inner module → its output; one of them is (N, C, H, W)."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            if self._side == "input":
                return self.inner(self.se(x))  # type: ignore[no-any-return]
            return self.se(self.inner(x))  # type: ignore[no-any-return]
        else:  # noqa: RET505 - the compiler skips this branch, not what follows the statement
            inner: Any = self._modules[INNER]
            if self._side == "output" and not self._channels_last:
                # The usual case, written so that nothing else holds the feature map between the two.
                block: Any = self._modules[self._block_name]
                return block(inner(x))  # type: ignore[no-any-return]
            if self._side == "output":
                return self._gated(inner(x))
            out: Tensor = inner(self._gated(x))
            return out


trust_container(GatedMap.forward)


class _Container:
    """Indexing and iteration of the inner module."""

    if TYPE_CHECKING:
        inner: Any

    def __len__(self) -> int:
        return len(self.inner)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.inner)

    def __getitem__(self, index: Any) -> Any:
        return self.inner[index]

    def __setitem__(self, index: Any, module: nn.Module) -> None:
        self.inner[index] = module

    def __contains__(self, item: object) -> bool:
        return item in self.inner


class GatedContainer(_Container, GatedSite):
    """A `GatedSite` whose inner module can be indexed and iterated."""


class GatedMapContainer(_Container, GatedMap):
    """A `GatedMap` whose inner module can be indexed and iterated."""


def gated_site(
    inner: nn.Module,
    se: Attention,
    side: Literal["input", "output"],
    *,
    one_tensor: bool,
    channels_last: bool = False,
) -> GatedSite:
    """Return the module that takes the place of a site.

    Args:
        inner: the site's own module.
        se: the block.
        side: which tensor is gated.
        one_tensor: whether the site is called with one tensor by position.
        channels_last: whether the gated tensor is (N, H, W, C).
    """
    container = all(hasattr(type(inner), name) for name in ("__len__", "__iter__", "__getitem__"))
    kind: type[GatedSite]
    if one_tensor and not channels_last:
        kind = GatedMapContainer if container else GatedMap
    else:
        kind = GatedContainer if container else GatedSite
    return kind(inner, se, side, channels_last=channels_last)


def free_name(module: nn.Module) -> str:
    """Return a name for an inserted block that is no attribute of a module: `se`, or `se_1` and so on."""
    name, number = BLOCK, 0
    while hasattr(module, name):
        number += 1
        name = f"{BLOCK}_{number}"
    return name


def has_block(place: nn.Module) -> bool:
    """Return whether the place of a block has both its own module and the block: a user may have deleted one."""
    block = place._block_name if isinstance(place, GatedSite) else BLOCK
    return place._modules.get(block) is not None and place._modules.get(INNER) is not None


def block_of(site: GatedSite) -> Attention:
    """Return the block that was inserted at a site."""
    found: Any = site._modules[site._block_name]
    block: Attention = found
    return block


def sites_own(module: nn.Module) -> nn.Module:
    """Return the module of a site itself, without the block that was inserted there."""
    return module.inner if isinstance(module, GatedSite) and module._modules.get(INNER) is not None else module


def named_sites(model: nn.Module, *, prefix: str = "", shared: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a network by the paths that they have without inserted blocks.

    A site with a block is yielded once, as its `GatedSite`, and what is below it under the site's path. Each path
    works with `get_submodule`.

    Args:
        model: any module.
        prefix: of every path.
        shared: whether a module with several paths is yielded for each of them.
    """
    yield from _named_sites(model, prefix, None if shared else set())


def _named_sites(module: nn.Module, path: str, seen: set[int] | None) -> Iterator[tuple[str, nn.Module]]:
    own = sites_own(module)
    if seen is not None:
        if id(own) in seen:
            return
        seen.add(id(own))
    yield path, module
    for name, child in named_children(module):
        yield from _named_sites(child, f"{path}.{name}" if path else name, seen)


def named_children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the children of a module; those of a `GatedSite` are its inner module's, and the block."""
    own = [(name, child) for name, child in sites_own(module)._modules.items() if child is not None]
    return (
        [*own, (module._block_name, block_of(module))] if isinstance(module, GatedSite) and has_block(module) else own
    )


def replace_modules(model: nn.Module, pairs: Iterable[tuple[nn.Module, nn.Module]]) -> None:
    """Put modules in the place of others, wherever a network holds them: as children, or in lists of modules.

    The order of children stays.

    Args:
        model: the network.
        pairs: each module with the one that takes its place.
    """
    new = {id(old): (old, replacement) for old, replacement in pairs}
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if id(child) in new:
                module._modules[name] = new[id(child)][1]
        seen: set[int] = set()
        for name, value in list(vars(module).items()):
            if type(value) in (list, tuple, dict) and name not in _NOT_REFERENCES:
                module.__dict__[name] = _replaced(value, new, seen)


def _replaced(value: Any, new: Mapping[int, tuple[nn.Module, nn.Module]], seen: set[int]) -> Any:
    """Return a value with modules replaced; lists and dictionaries are changed in place."""
    if id(value) in new:
        return new[id(value)][1]
    if type(value) not in (list, tuple, dict) or id(value) in seen:
        return value
    seen.add(id(value))
    if type(value) is dict:
        for key, one in list(value.items()):
            value[key] = _replaced(one, new, seen)
        return value
    found = [_replaced(one, new, seen) for one in value]
    if any(one is not other for one, other in zip(found, value, strict=True)):
        if type(value) is tuple:
            return tuple(found)
        value[:] = found
    return value


def move_hooks(source: nn.Module, target: nn.Module) -> None:
    """Add the hooks of one module to those of another, after its own."""
    for name in _HOOKS:
        hooks, there = getattr(source, name), getattr(target, name)
        if hooks and not there:
            # The same dictionary, so that the handles of the hooks still remove them.
            target.__dict__[name] = hooks
        else:
            there.update(hooks)


def _is_public(inner: nn.Module, name: str) -> bool:
    """Return whether others may read an attribute through the site: what libraries note on a module stays there."""
    if name.startswith("__"):
        return False
    if not name.startswith("_"):
        return True
    held = inner.__dict__
    return any(name in held.get(group, ()) for group in ("_modules", "_parameters", "_buffers"))


def _check_not_folded(inner: nn.Module, name: str) -> None:
    # A frozen BatchNorm of another library holds them as buffers.
    is_norm = name in _FOLDED and (isinstance(inner, nn.modules.batchnorm._NormBase) or name in inner._buffers)
    is_convolution = isinstance(inner, nn.modules.conv._ConvNd) and name in _FOLDED_OF_CONVOLUTION
    if is_norm or is_convolution:
        raise AttributeError(
            f"{type(inner).__name__}.{name}: an attention block is inserted at this module, and folding it into "
            "another layer would drop the block; remove the blocks first (selab.remove_se), or read it from `.inner`"
        )


def _check_not_folded_into(inner: nn.Module, name: str, value: object, side: str) -> None:
    if name not in _FOLDED_INTO or not isinstance(value, nn.Parameter):
        return
    # A BatchNorm after a convolution with a gated input can be folded into it: no block stands between the two.
    between = isinstance(inner, _CONVOLUTION_OR_LINEAR) and side == "output"
    if between or isinstance(inner, nn.modules.batchnorm._NormBase):
        raise AttributeError(
            f"{type(inner).__name__}.{name}: an attention block is inserted at this module, and a BatchNorm cannot be "
            "folded across it; remove the blocks first (selab.remove_se), or assign the parameter to `.inner`"
        )


def _load_with_metadata(
    inner: nn.Module,
    site_metadata: dict[str, Any],
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    *lists: Any,
) -> None:
    inner.__dict__.pop("_load_from_state_dict", None)
    inner._load_from_state_dict(state_dict, prefix, {**site_metadata, **local_metadata}, *lists)


def _after_loading(site: nn.Module, _keys: object) -> None:
    """Report keys under the site's own path: `bn.weight`, not `bn.inner.weight`."""
    loading = site.__dict__.pop("_loading", None)
    if loading is None:
        return
    prefix, missing, unexpected, errors = loading
    below = f"{prefix}{INNER}."
    for keys in (missing, unexpected):
        keys[:] = [prefix + key[len(below) :] if key.startswith(below) else key for key in keys]
    errors[:] = [text.replace(below, prefix) for text in errors]
