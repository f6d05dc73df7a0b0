"""The values of one forward pass on fake tensors: which operation made each, from what, and who returned it.

Every operation on a tensor that depends on the input yields a *value* with its operands. Every module records the value
that it returned. An in-place operation yields a new value of the same tensor.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from selab.attention.gated_site import named_sites
from selab.meta import FakePass
from selab.meta.modes import DispatchMode

INPUT = "input"
_MAP_DIMS = 4
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
    "clone",
    "_to_copy",
    "alias",
    "detach",
    "copy",
}
BATCH_NORMS = {
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm",
}
_UPSAMPLES = ("upsample", "_upsample", "pixel_shuffle", "grid_sampler", "max_unpool")
_RESHAPES = {"view", "_unsafe_view", "reshape", "_reshape_alias", "unflatten", "flatten"}
# These read no more of an operand than its shape.
_CONSTANTS = {
    *("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like"),
    *("new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided"),
}
# These make a tensor of the same values everywhere, which is often written into afterwards.
_FILLED = {"zeros", "ones", "full", "empty"}
# Products of matrices and the like: the result's dimensions are not those of an operand.
_MIXES = {"bmm", "baddbmm", "matmul", "einsum", "unfold", "im2col", "col2im", "gather", "index", "as_strided"}
_TO_CHANNELS_FIRST, _TO_CHANNELS_LAST = (0, 3, 1, 2), (0, 2, 3, 1)

# A dimension is a product of factors: the letter that it came from, and a size. "?" is a letter of nothing known.
Factor = tuple[str, int]
Dims = tuple[tuple[Factor, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Return:
    """A module that returned a value: the number of values when it began, and when it ended."""

    path: str
    began: int
    ended: int


@dataclass(eq=False, kw_only=True)
class Value:
    """A tensor after one operation.

    Attributes:
        operation: the operator's name without its overload and without the underscore of in-place forms.
        module: the path of the innermost module that was running.
        ancestors: a bit for each value that it was computed from, and its own.
        terms: the operands that it is the (weighted) sum of, if it is one.
        dim: of a concatenation or a stack, the dimension along which the operands are joined.
        elementwise: whether it has its operand's shape and each element (of a channel) is computed separately.
        dims: where its dimensions come from, as far as is known.
        is_image: whether it is a feature map (N, C, H, W), as far as is known.
        depthwise: whether it is a convolution with one group per channel; `pointwise`, of size 1.
        linear: whether it is a linear function of its only operand, or a sum.
        upsamples: whether it has a higher resolution than its operand.
        around: of a feature map whose channels were last for elementwise operations only, the one before; `detours`
            are those after it.
    """

    index: int
    operation: str
    module: str
    shape: tuple[int, ...]
    operands: tuple["Value", ...] = ()
    ancestors: int
    terms: tuple["Value", ...] = ()
    dim: int | None = None
    elementwise: bool = False
    dims: Dims | None = None
    is_image: bool = False
    depthwise: bool = False
    pointwise: bool = False
    linear: bool = False
    upsamples: bool = False
    around: "Value | None" = None
    detours: list["Value"] = field(default_factory=list)
    readers: list["Value"] = field(default_factory=list)
    returned_by: list[Return] = field(default_factory=list)

    def comes_from(self, other: "Value") -> bool:
        """Return whether it was computed from another value, or is it."""
        return bool(self.ancestors >> other.index & 1)

    @property
    def is_map(self) -> bool:
        """Whether it has four dimensions."""
        return len(self.shape) == _MAP_DIMS

    @property
    def uncropped(self) -> "Value | None":
        """The feature map of which it is a part, or which it pads, with the same channels."""
        if self.operation not in ("slice", "narrow", "constant_pad_nd") or len(self.operands) != 1:
            return None
        before = self.operands[0]
        return before if before.is_map and before.shape[:2] == self.shape[:2] else None


class DataflowTrace(DispatchMode):
    """Record the values of one forward pass.

    Attributes:
        values: in the order in which they were computed.
        calls: how often each module ran.
        outputs: the values that the network returned.
    """

    def __init__(self, fakes: FakePass) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fakes = fakes
        self.values: list[Value] = []
        self.calls: Counter[str] = Counter()
        self.outputs: tuple[Value, ...] = ()
        self._batch: int | None = None
        self._open: list[tuple[str, int]] = []
        self._now: dict[int, Value] = {}
        # While a tensor lives, no other has its id.
        self._kept: list[Tensor] = []
        # Storage → the tensor that was made with it, which does not depend on the input.
        self._made: dict[int, Tensor] = {}

    def run(self) -> None:
        """Run the network once."""
        for path, module in named_sites(self.fakes.model):
            module.register_forward_pre_hook(self._opener(path))
            module.register_forward_hook(self._closer(path))
        for tensor in tree_leaves((self.fakes.args, self.fakes.kwargs)):
            if isinstance(tensor, Tensor):
                index = len(self.values)
                shape = tuple(tensor.shape)
                value = Value(index=index, operation=INPUT, module="", shape=shape, ancestors=1 << index)
                if value.is_map:
                    self._batch = shape[0] if self._batch is None else self._batch
                    value.dims, value.is_image = _image_dims(shape), True
                self._note(tensor, value)
        with self.fakes.running(), self:
            result = self.fakes()
        self.outputs = tuple(self._now[id(one)] for one in tree_leaves(result) if id(one) in self._now)

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
                value.returned_by.append(Return(path=path, began=began, ended=len(self.values)))

        return leave

    def __torch_dispatch__(self, func: Any, _types: object, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {key: value for key, value in kwargs.items() if key != "out"}
        operands = {id(one): self._now[id(one)] for one in tree_leaves((args, given)) if id(one) in self._now}
        result = func(*args, **kwargs)
        name = _operation(func)
        if operands and name not in _CONSTANTS:
            # The first result is the feature map; statistics or indices follow.
            results = tree_leaves(result[0] if isinstance(result, tuple) else result)
            for tensor in results if result is not None else tree_leaves(args[:1]):
                if isinstance(tensor, Tensor):
                    self._note(tensor, self._value(func, args, given, tensor, tuple(operands.values())))
                    if func._schema.is_mutable:
                        self._write_through(tensor)
        elif (name in _FILLED or name in _CONSTANTS) and result.dim() == _MAP_DIMS:
            self._made[result.untyped_storage()._cdata] = result
            self._kept.append(result)
        return result

    def _write_through(self, part: Tensor) -> None:
        """Note that a tensor has changed with a part of it, as where images are copied into a batch of zeros."""
        whole = self._made.get(part.untyped_storage()._cdata)
        if whole is None or whole is part or whole.shape == part.shape:
            return
        operands = tuple(self._now[id(one)] for one in (part, whole) if id(one) in self._now)
        value = Value(
            index=len(self.values),
            operation="copy",
            module=self._open[-1][0] if self._open else "",
            shape=tuple(whole.shape),
            operands=operands,
            ancestors=1 << len(self.values) | union_ancestors(operands),
        )
        images = (one for one in self.values if one.operation == INPUT and len(one.shape) == _MAP_DIMS - 1)
        if value.is_map and any(value.comes_from(one) and one.shape[0] == value.shape[1] for one in images):
            # Images (C, H, W) become a batch.
            value.dims, value.is_image = _image_dims(value.shape), True
            self._batch = value.shape[0] if self._batch is None else self._batch
        self._note(whole, value)

    def _note(self, tensor: Tensor, value: Value) -> None:
        self.values.append(value)
        self._kept.append(tensor)
        self._now[id(tensor)] = value
        for operand in value.operands:
            operand.readers.append(value)

    def _value(self, func: Any, args: Any, kwargs: Any, tensor: Tensor, operands: tuple[Value, ...]) -> Value:
        index = len(self.values)
        name = _operation(func)
        value = Value(
            index=index,
            operation=name,
            module=self._open[-1][0] if self._open else "",
            shape=tuple(tensor.shape),
            operands=operands,
            ancestors=1 << index,
            elementwise=torch.Tag.pointwise in func.tags or name in _ALSO_ELEMENTWISE,
        )
        for operand in operands:
            value.ancestors |= operand.ancestors
        if name in ("cat", "stack"):
            value.dim = _dim(args, kwargs, len(value.shape))
            value.elementwise = name == "cat" and value.shape == operands[0].shape
        value.terms = self._terms(name, args, kwargs, value)
        value.linear = _is_linear(name, value)
        value.upsamples = name.startswith(_UPSAMPLES)
        if name == "convolution":
            x, weight, transposed, groups = args[0], args[1], args[6], args[8]
            value.depthwise = not transposed and groups == x.shape[1] > 1
            value.pointwise = not value.depthwise and weight.shape[2:].numel() == 1
            value.upsamples = bool(transposed) and value.shape[2:] != operands[0].shape[2:]
        value.dims = _dims_after(name, args, kwargs, value)
        if name == "permute" and _order(name, args, len(value.shape)) == _TO_CHANNELS_FIRST:
            value.around = _before_channels_last(value)
            if value.around is not None:
                value.around.detours.append(value)
        value.is_image = _is_image(value.dims) and self._batch in (None, value.shape[0])
        return value

    def _terms(self, name: str, args: Any, kwargs: Any, value: Value) -> tuple[Value, ...]:
        """Return the operands of full shape that a value is the sum of; nothing if there are fewer than two."""
        sides: list[Iterable[Any]]
        if name in ("add", "sub", "rsub", "lerp"):
            sides = [(one,) for one in [*args, *kwargs.values()][:2]]
        elif name in ("addcmul", "addcdiv"):
            factors = [*args, *(kwargs[key] for key in ("tensor1", "tensor2") if key in kwargs)]
            sides = [factors[:1], factors[1:3]]
        elif name in ("sum", "mean"):
            return _stacked(args, kwargs, value)
        else:
            return ()
        terms = []
        for side in sides:
            maps = [self._now[id(one)] for one in side if id(one) in self._now]
            maps = [one for one in maps if one.shape == value.shape]
            trunk = next((one for one in maps if all(other.comes_from(one) for other in maps)), None)
            if trunk is None:
                return ()
            terms.append(trunk)
        return tuple(dict.fromkeys(terms)) if len(set(map(id, terms))) > 1 else ()


def _operation(func: Any) -> str:
    """Return an operator's name without its namespace, its overload and the underscore of in-place forms."""
    name: str = func._schema.name
    return name.partition("::")[2].removesuffix("_")


def _before_channels_last(value: Value) -> Value | None:
    """Return the feature map whose channels were moved to the end, normalised or activated there, and moved back."""
    before = value.operands[0]
    while before.elementwise and len(before.operands) == 1:
        before = before.operands[0]
    if before.operation != "permute" or before.operands[0].shape != value.shape:
        return None
    return before.operands[0]


def _dim(args: Any, kwargs: Any, rank: int) -> int:
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    return int(dim) % rank


def _stacked(args: Any, kwargs: Any, value: Value) -> tuple[Value, ...]:
    """Return what a sum or mean over the dimension of a stack adds."""
    given = args[1] if len(args) > 1 else kwargs.get("dim")
    axes = [given] if isinstance(given, int) else given
    if not isinstance(axes, Sequence) or len(axes) != 1:
        return ()
    stack = value.operands[0]
    while stack.elementwise and stack.operands and stack.operation not in ("stack", "cat"):
        like = [one for one in stack.operands if one.shape == stack.shape]
        if len(like) != 1:
            return ()
        stack = like[0]
    if stack.dim is None or stack.dim != axes[0] % len(stack.shape):
        return ()
    terms = []
    for one in stack.operands:
        term = one.operands[0] if one.operation == "unsqueeze" and stack.operation == "cat" else one
        if term.shape != value.shape:
            return ()
        terms.append(term)
    return tuple(terms) if len(terms) > 1 else ()


def _is_linear(name: str, value: Value) -> bool:
    if value.terms:
        return True
    alone = len(value.operands) == 1
    # Of a statistic or a bias that the input does not change, addition and product are those of constants.
    constant = ("add", "sub", "rsub", "mul", "div", "neg", "addcmul")
    same = ("clone", "_to_copy", "alias", "detach", "constant_pad_nd", "slice", "avg_pool2d", "unsqueeze", "stack")
    return (alone and name in {"convolution", *BATCH_NORMS, *constant, *same}) or name == "stack"


# ------------------------------------------------------------------------------------------- where dimensions come from
def _image_dims(shape: Sequence[int]) -> Dims:
    return tuple(((letter, size),) for letter, size in zip("NCHW", shape, strict=True))


def _is_image(dims: Dims | None) -> bool:
    """Return whether the dimensions are (N, C, H, W). A dimension of size 1 is any of them.

    Parts of height and width may have become channels, as in a space-to-depth layer, or have come from them.
    """
    if dims is None or len(dims) != _MAP_DIMS:
        return False
    batch, _, height, width = ([letter for letter, size in dim if size > 1] for dim in dims)
    return (
        not set(batch) - {"N"}
        and (not height or (height[0] == "H" and not set(height) - {"H", "C"}))
        and (not width or (width[0] == "W" and not set(width) - {"W", "C"}))
    )


def _dims_after(name: str, args: Any, kwargs: Any, value: Value) -> Dims | None:
    like = next((one for one in value.operands if one.shape == value.shape and one.dims is not None), value.operands[0])
    dims, shape = like.dims, value.shape
    if name == "convolution":
        return _dims_after_convolution(value)
    order = _order(name, args, len(like.shape))
    if order is not None:
        if dims is not None:
            return tuple(dims[axis] for axis in order)
        # Nobody moves the channels of anything else to the second place or away from it.
        if order == _TO_CHANNELS_FIRST:
            return _image_dims(shape)
        return tuple(_image_dims(like.shape)[axis] for axis in order) if order == _TO_CHANNELS_LAST else None
    if dims is None or name in _MIXES or "attention" in name:
        return None
    if name in _RESHAPES:
        return _reshaped(dims, shape)
    if name == "unsqueeze":
        axis = int(args[1]) % len(shape)
        return (*dims[:axis], (), *dims[axis:])
    if name == "stack" and value.dim is not None:
        return (*dims[: value.dim], (("?", shape[value.dim]),), *dims[value.dim :])
    if name in ("select", "unbind") or (name in ("sum", "mean") and len(shape) == len(dims) - 1):
        given = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        axis = int(given if isinstance(given, int) else given[0]) % len(dims)
        return (*dims[:axis], *dims[axis + 1 :])
    if name == "squeeze":
        kept = tuple(dim for dim in dims if math.prod(size for _, size in dim) != 1)
        return kept if len(kept) == len(shape) else None
    if name in ("mm", "addmm") and len(value.operands) != 1:
        return None
    return _resized(dims, shape)


def _order(name: str, args: Any, rank: int) -> tuple[int, ...] | None:
    """Return the order of the dimensions after a permutation."""
    if name == "permute":
        return tuple(int(axis) % rank for axis in args[1])
    if name in ("transpose", "swapaxes", "t"):
        one, other = (int(axis) % rank for axis in (args[1:3] if len(args) > 2 else (0, rank - 1)))
        order = list(range(rank))
        order[one], order[other] = other, one
        return tuple(order)
    return None


def _dims_after_convolution(value: Value) -> Dims | None:
    if not value.is_map:
        return None
    before = value.operands[0]
    known = before.dims is not None and all(letter != "?" for dim in before.dims for letter, _ in dim)
    if not known or _is_image(before.dims):
        return _image_dims(value.shape)
    dims = _resized(before.dims or (), value.shape)
    return None if dims is None else (dims[0], (("C", value.shape[1]),), *dims[2:])


def _resized(dims: Dims, shape: Sequence[int]) -> Dims | None:
    """Return the dimensions of a value whose sizes changed but not their order."""
    if len(dims) != len(shape):
        return None
    return tuple(
        dim if math.prod(size for _, size in dim) == new else ((_letter(dim), new),)
        for dim, new in zip(dims, shape, strict=True)
    )


def _letter(dim: Iterable[Factor]) -> str:
    letters = {letter for letter, _ in dim}
    return letters.pop() if len(letters) == 1 else "?"


def _reshaped(dims: Dims, shape: Sequence[int]) -> Dims | None:
    """Return the factors of each dimension after a reshape; None if a factor would have to be cut unevenly."""
    factors = [factor for dim in dims for factor in dim if factor[1] != 1]
    reshaped = []
    for size in shape:
        dim: list[Factor] = []
        while size > 1:
            if not factors:
                return None
            letter, there = factors.pop(0)
            if there > size:
                if there % size:
                    return None
                factors.insert(0, (letter, there // size))
                there = size
            elif size % there:
                return None
            dim.append((letter, there))
            size //= there
        reshaped.append(tuple(dim))
    return None if factors else tuple(reshaped)


def bits(number: int) -> Iterator[int]:
    """Return the positions of the bits that are set."""
    while number:
        low = number & -number
        yield low.bit_length() - 1
        number ^= low


def union_ancestors(values: Iterable[Value]) -> int:
    """Return a bit for each value that any of these comes from, or is."""
    every = 0
    for value in values:
        every |= value.ancestors
    return every


def common_ancestors(values: Sequence[Value]) -> int:
    """Return a bit for each value that all of these come from, or are."""
    common = values[0].ancestors
    for value in values[1:]:
        common &= value.ancestors
    return common
