"""Automatic site detection: find the ends of blocks in a network that declares no sites.

The network runs once on the meta device. Every operation on a feature map yields a *value* with its operands, and every
module records the value that it returned. An in-place operation yields a new value of the same tensor. Two kinds of
ends are found:

* the end of a residual branch: of two feature maps that are added, the one with more convolutions since their common
  ancestor;
* the end of a depthwise-separable block outside of such branches: a depthwise convolution, a pointwise one, and the
  elementwise operations after it, up to the next reader.

The site is the outermost module that returns exactly this value, so that a block there gates nothing else.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from selab.attention.base import Attention
from selab.attention.sites import CHILD
from selab.errors import InsertionError, ModelError
from selab.meta import evaluating, first_line, meta_twin

# Elementwise operations that (or whose in-place form) torch 2.13 does not tag `pointwise`, and normalisations.
_ALSO_ELEMENTWISE = {
    "gelu",
    "hardswish",
    "mish",
    "relu6",
    "threshold",
    "_prelu_kernel",
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "native_group_norm",
    "native_layer_norm",
}
_TO_CHANNELS_FIRST, _TO_CHANNELS_LAST = [0, 3, 1, 2], [0, 2, 3, 1]
_MAP_DIMS = 4
# How many of the ends that were left out an error message names.
_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class BlockEnd:
    """A module after which a block ends: its path, and how it was found."""

    path: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Ends:
    """The ends of blocks, in the order of the network.

    Attributes:
        found: modules that can be sites.
        left_out: descriptions of ends that cannot be sites, with reasons.
    """

    found: tuple[BlockEnd, ...]
    left_out: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Return:
    """A module that returned a value: the number of values when it began, and when it ended."""

    path: str
    began: int
    ended: int


@dataclass(eq=False, kw_only=True)
class _Value:
    """A tensor after one operation.

    Attributes:
        module: the path of the innermost module that was running.
        ancestors: a bit for each value that it was computed from, and its own.
        elementwise: whether it has its operand's shape and each element (of a channel) is computed separately.
        channels_first: whether the second dimension holds the channels, as far as is known.
        depthwise: whether it is a convolution with one group per channel; `pointwise`, of size 1.
    """

    index: int
    operation: str
    module: str
    shape: tuple[int, ...]
    operands: tuple["_Value", ...] = ()
    ancestors: int
    elementwise: bool = False
    channels_first: bool = True
    depthwise: bool = False
    pointwise: bool = False
    readers: list["_Value"] = field(default_factory=list)
    returned_by: list[_Return] = field(default_factory=list)

    def comes_from(self, other: "_Value") -> bool:
        return bool(self.ancestors >> other.index & 1)


def block_ends(model: nn.Module, input_nchw: tuple[int, ...]) -> tuple[BlockEnd, ...]:
    """Return the modules at which the blocks of a network end, in the order of the network.

    Args:
        model: on any device; not changed.
        input_nchw: the shape of an example input, (N, C, H, W).

    Raises:
        InsertionError: there are none; the message says which were left out, and what to do.
        ModelError: the forward pass fails with this input.
    """
    ends = trace_ends(model, input_nchw)
    if not ends.found:
        more = f" and {len(ends.left_out) - _SHOWN} more" if len(ends.left_out) > _SHOWN else ""
        seen = f" (left out: {'; '.join(ends.left_out[:_SHOWN])}{more})" if ends.left_out else ""
        raise InsertionError(
            f"{type(model).__name__}: tracing finds no block end, neither an addition of feature maps (N, C, H, W) "
            f"nor a depthwise-separable block{seen}; name modules: --insert PATTERN (`selab sites` lists them)"
        )
    return ends.found


def trace_ends(model: nn.Module, input_nchw: tuple[int, ...]) -> Ends:
    """Return what `block_ends` finds and the ends that were left out; no error if there is none.

    Raises:
        ModelError: the forward pass fails with this input.
    """
    twin = meta_twin(model)
    trace = _DataflowTrace(twin)
    dtype = next((p.dtype for p in twin.parameters() if p.is_floating_point()), torch.float32)
    try:
        with evaluating(twin), torch.no_grad():
            trace.run(torch.empty(input_nchw, device="meta", dtype=dtype))
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__}: forward fails with an input of shape {tuple(input_nchw)}: {first_line(error)}; "
            "give the shape that the network expects (input_nchw, --input)"
        ) from error
    return _Finder(trace).ends()


class _DataflowTrace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Record the values of one forward pass."""

    def __init__(self, twin: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.twin = twin
        self.values: list[_Value] = []
        self.calls: Counter[str] = Counter()
        self._open: list[tuple[str, int]] = []
        self._now: dict[int, _Value] = {}
        # While a tensor lives, no other has its id.
        self._kept: list[Tensor] = []

    def run(self, example: Tensor) -> None:
        for path, module in self.twin.named_modules():
            module.register_forward_pre_hook(self._opener(path))
            module.register_forward_hook(self._closer(path))
        self._note(example, _Value(index=0, operation="input", module="", shape=tuple(example.shape), ancestors=1))
        with self:
            self.twin(example)

    def _opener(self, path: str) -> Any:
        def enter(_module: nn.Module, _args: object) -> None:
            self.calls[path] += 1
            self._open.append((path, len(self.values)))

        return enter

    def _closer(self, path: str) -> Any:
        def leave(_module: nn.Module, _args: object, output: object) -> None:
            _, began = self._open.pop()
            value = self._now.get(id(output))
            if value is not None:
                value.returned_by.append(_Return(path=path, began=began, ended=len(self.values)))

        return leave

    def __torch_dispatch__(self, func: Any, _types: object, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operands = {id(one): self._now[id(one)] for one in tree_leaves((args, kwargs)) if id(one) in self._now}
        result = func(*args, **kwargs)
        if operands:
            # The first result is the feature map; statistics or indices follow.
            for tensor in tree_leaves(result[0] if isinstance(result, tuple) else result):
                if isinstance(tensor, Tensor):
                    self._note(tensor, self._value(func, args, tensor, tuple(operands.values())))
        return result

    def _note(self, tensor: Tensor, value: _Value) -> None:
        self.values.append(value)
        self._kept.append(tensor)
        self._now[id(tensor)] = value
        for operand in value.operands:
            operand.readers.append(value)

    def _value(self, func: Any, args: Any, tensor: Tensor, operands: tuple[_Value, ...]) -> _Value:
        index = len(self.values)
        name = func._schema.name.partition("::")[2]
        value = _Value(
            index=index,
            operation=name,
            module=self._open[-1][0],
            shape=tuple(tensor.shape),
            operands=operands,
            ancestors=1 << index,
            elementwise=torch.Tag.pointwise in func.tags or name.removesuffix("_") in _ALSO_ELEMENTWISE,
            channels_first=operands[0].channels_first,
        )
        for operand in operands:
            value.ancestors |= operand.ancestors
        if name == "convolution":
            x, weight, transposed, groups = args[0], args[1], args[6], args[8]
            value.channels_first = True
            value.depthwise = not transposed and groups == x.shape[1] > 1
            value.pointwise = not value.depthwise and weight.shape[2:].numel() == 1
        elif name == "permute" and list(args[1]) in (_TO_CHANNELS_FIRST, _TO_CHANNELS_LAST):
            value.channels_first = list(args[1]) == _TO_CHANNELS_FIRST
        elif name in ("permute", "transpose", "view", "_unsafe_view"):
            value.channels_first &= value.shape == operands[0].shape
        return value


@dataclass(frozen=True, kw_only=True)
class _Addition:
    """An addition of two feature maps: the sum, the end of the branch, and a bit for each value of the branch only."""

    total: _Value
    branch: _Value
    inside: int


class _Finder:
    """Find block ends in the values of a pass."""

    def __init__(self, trace: _DataflowTrace) -> None:
        self.values = trace.values
        self.modules: Mapping[str, nn.Module] = dict(trace.twin.named_modules())
        self.calls = trace.calls
        self.shared = _shared(trace.twin)
        self.convolutions = sum(1 << value.index for value in self.values if value.operation == "convolution")
        self.found: dict[str, tuple[int, BlockEnd]] = {}
        self.left_out: dict[str, None] = {}

    def ends(self) -> Ends:
        additions = list(self._additions())
        for addition in additions:
            if not any(self._is_part_of(addition, other) for other in additions):
                self._end_branch(addition)
        in_branches = 0
        for addition in additions:
            in_branches |= addition.inside
        for value in self.values:
            depthwise = self._depthwise_before(value) if value.pointwise else None
            if depthwise is not None and not in_branches >> value.index & 1:
                self._end_separable(depthwise, value)
        in_order = sorted(self.found.values(), key=lambda one: one[0])
        return Ends(found=tuple(end for _, end in in_order), left_out=tuple(self.left_out))

    # ------------------------------------------------------------------------------------------- residual additions

    def _additions(self) -> Iterator[_Addition]:
        for value in self.values:
            if not self._joins(value):
                continue
            one, other = value.operands
            ahead = self._convolutions_beyond(one, other) - self._convolutions_beyond(other, one)
            branch, shortcut = (one, other) if ahead > 0 else (other, one)
            place = f"the addition in {_named(value.module)}"
            if ahead == 0:
                self.left_out[f"{place}: both sides have as many convolutions, so neither is the branch"] = None
            elif not branch.channels_first:
                self.left_out[f"{place}: its feature maps are not (N, C, H, W)"] = None
            else:
                yield _Addition(total=value, branch=branch, inside=branch.ancestors & ~shortcut.ancestors)

    def _joins(self, value: _Value) -> bool:
        """Return whether a value adds two feature maps of one shape, not the input, with convolutions between them."""
        if value.operation not in ("add", "add_") or len(value.operands) != 2 or len(value.shape) != _MAP_DIMS:
            return False
        one, other = value.operands
        if one.shape != other.shape or 0 in (one.index, other.index):
            return False
        return self._convolutions_beyond(one, other) + self._convolutions_beyond(other, one) > 0

    def _convolutions_beyond(self, value: _Value, other: _Value) -> int:
        return (value.ancestors & ~other.ancestors & self.convolutions).bit_count()

    @staticmethod
    def _is_part_of(addition: _Addition, other: _Addition) -> bool:
        """Return whether an addition is inside the branch of another one of the same block."""
        return addition.total.module == other.total.module and bool(other.inside >> addition.total.index & 1)

    def _end_branch(self, addition: _Addition) -> None:
        place = addition.total.module
        value: _Value | None = addition.branch
        while value is not None and addition.inside >> value.index & 1:
            path = self._site(value)
            if path is not None:
                block = _common(place, path.rpartition(".")[0])
                return self._add(value, path, f"before the addition in {_named(block)}")
            value = self._trunk(value)
        self.left_out[f"the addition in {_named(place)}: no single module to attach to at the end of its branch"] = None
        return None

    # ------------------------------------------------------------------------------------ depthwise-separable blocks

    def _depthwise_before(self, pointwise: _Value) -> _Value | None:
        """Return the depthwise convolution before a pointwise one, across elementwise operations and gates."""
        value: _Value | None = pointwise.operands[0]
        while value is not None and not value.depthwise:
            value = self._trunk(value)
        return value

    def _end_separable(self, depthwise: _Value, pointwise: _Value) -> None:
        chain = [pointwise]
        while (following := self._following(chain[-1])) is not None:
            chain.append(following)
        readers = chain[-1].readers
        block = _named(_common(depthwise.module, pointwise.module))
        if readers and all(self._joins(reader) for reader in readers):
            # A shortcut of this form is not a block.
            return None
        if any(reader.operation == "cat" for reader in readers):
            self.left_out[f"the depthwise-separable block {block}: its feature map is concatenated with others"] = None
            return None
        for value in reversed(chain):
            path = self._site(value, outside=depthwise.module)
            if path is not None:
                return self._add(value, path, f"after the depthwise-separable block {block}")
        self.left_out[f"the depthwise-separable block {block}: no single module to attach to"] = None
        return None

    def _following(self, value: _Value) -> _Value | None:
        """Return the next elementwise operation (or gate) on a feature map, if all its readers lead there."""
        for reader in reversed(value.readers):
            if self._trunk(reader) is value and all(reader.comes_from(other) for other in value.readers):
                return reader
        return None

    # ------------------------------------------------------------------------------------------------------- of both

    def _trunk(self, value: _Value) -> _Value | None:
        """Return the feature map that an elementwise operation changes; of a gate and its operand, the operand.

        None for an operation that is not elementwise, or that adds two feature maps.
        """
        if not value.elementwise or self._joins(value):
            return None
        maps = [operand for operand in value.operands if operand.shape == value.shape]
        return next((one for one in maps if all(other.comes_from(one) for other in maps)), None)

    def _site(self, value: _Value, *, outside: str | None = None) -> str | None:
        """Return the outermost module that computed a value, returned it before it was read, and can hold a block.

        A module that only passes the value on (Identity, DropPath in eval mode) is used if no other computed it.

        Args:
            value: its output.
            outside: the path of a convolution that the module should not contain, if there is another module.
        """
        before = value.readers[0].index if value.readers else len(self.values)
        returns = [one for one in value.returned_by if one.path and one.ended <= before and self._is_free(one.path)]
        made = [one.path for one in returns if one.began <= value.index]
        if outside is not None:
            made = [path for path in made if not _holds(path, outside)] or made[:1]
        handed = [one.path for one in returns if one.began > value.index]
        return made[-1] if made else (handed[0] if handed else None)

    def _is_free(self, path: str) -> bool:
        """Return whether a module can hold a block: it runs once, and the block's name is not taken."""
        return self.calls[path] == 1 and path not in self.shared and not hasattr(self.modules[path], CHILD)

    def _add(self, value: _Value, path: str, reason: str) -> None:
        own = [one.path for one in value.returned_by if isinstance(self.modules[one.path], Attention)]
        if own:
            self.left_out[f"{path}: ends in an attention block already ({own[0]})"] = None
        else:
            self.found.setdefault(path, (value.index, BlockEnd(path=path, reason=reason)))


def _shared(model: nn.Module) -> set[str]:
    """Return the paths of modules that have several paths."""
    homes: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        homes.setdefault(id(module), []).append(path)
    return {path for paths in homes.values() if len(paths) > 1 for path in paths}


def _holds(path: str, other: str) -> bool:
    return f"{other}.".startswith(f"{path}.")


def _common(*paths: str) -> str:
    """Return the innermost module that contains all of these."""
    names: Sequence[tuple[str, ...]] = [tuple(path.split(".")) for path in paths]
    kept = []
    for level in zip(*names, strict=False):
        if len(set(level)) > 1:
            break
        kept.append(level[0])
    return ".".join(kept)


def _named(path: str) -> str:
    return path or "the network"
