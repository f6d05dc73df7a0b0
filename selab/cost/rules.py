"""Counting rules: the multiply-accumulates and FLOPs of one call of each operator.

A rule sees shapes only. It returns the arithmetic as `Work`; bytes and the backward pass follow from the shapes and
from the attributes of the rule. `register_rule` adds rules for operators of other libraries.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from math import prod
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from selab.errors import SpecError
from selab.meta import first_line

META = torch.device("meta")


# --------------------------------------------------------------------------------------------------- rules of the cost
class Work(NamedTuple):
    """The arithmetic of one operator call.

    Attributes:
        macs: of convolutions and matrix products.
        other: all other arithmetic, in fused multiply-adds.
        other_flops: the same in floating-point operations.
    """

    macs: int = 0
    other: int = 0
    other_flops: int = 0


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How one operator is counted.

    Attributes:
        name: the row in tables.
        work: (arguments, output) → arithmetic of one call.
        makes: arguments → the empty output, where this is much cheaper than the operator's meta kernel. If it returns
            None, that kernel is called; it also has the better error message.
        role: `reduction` and `product` mark the squeeze and the scale of an SE block.
        operands: positions of the factors of a convolution or matrix product.
        linear: whether the gradient passes through without arithmetic.
        affine: position of a normalisation's scale; its shift follows it.
    """

    name: str
    work: Callable[[Sequence[Any], Tensor], Work]
    makes: Callable[[Sequence[Any], Mapping[str, Any]], Any] | None = None
    role: Literal["", "convolution", "reduction", "product"] = ""
    operands: tuple[int, ...] = ()
    linear: bool = False
    affine: int | None = None


def _per_output(count: int, flops: int | None = None) -> Callable[[Sequence[Any], Tensor], Work]:
    flops = count if flops is None else flops
    return lambda _args, out: Work(0, count * out.numel(), flops * out.numel())


def _per_input(count: int) -> Callable[[Sequence[Any], Tensor], Work]:
    return lambda args, _out: Work(0, count * args[0].numel(), count * args[0].numel())


def _nothing(_args: Sequence[Any], _out: Tensor) -> Work:
    return Work()


def _convolution_work(args: Sequence[Any], out: Tensor) -> Work:
    """One MAC per weight and output position; if transposed, per weight and input position."""
    x, weight, transposed = args[0], args[1], args[6]
    positions = x if transposed else out
    return Work(positions.numel() // positions.shape[1] * weight.numel())


def _product_work(left: int) -> Callable[[Sequence[Any], Tensor], Work]:
    return lambda args, out: Work(out.numel() * args[left].shape[-1])


def _batch_norm_work(args: Sequence[Any], out: Tensor) -> Work:
    computes_statistics = bool(args[5])
    return _normalisation_work(computes_statistics)(args, out)


def _normalisation_work(computes_statistics: bool) -> Callable[[Sequence[Any], Tensor], Work]:
    statistics = 2 if computes_statistics else 0
    return _per_output(1 + statistics, 2 + statistics)


def _window_work(args: Sequence[Any], out: Tensor) -> Work:
    """One per element of every window."""
    dims = out.dim() - (1 if out.dim() == args[0].dim() - 1 else 2)
    read = out.numel() * prod(_each(args[1], dims))
    return Work(0, read, read)


def _adaptive_work(args: Sequence[Any], out: Tensor) -> Work:
    """One per element of every window: window i of n over a length L spans floor(i L / n) to ceil((i + 1) L / n)."""
    x = args[0]
    dims = len(args[1])
    read = prod(x.shape[:-dims])
    for length, windows in zip(x.shape[-dims:], out.shape[-dims:], strict=True):
        read *= sum(-(-(i + 1) * length // windows) - i * length // windows for i in range(windows))
    return Work(0, read, read)


# ------------------------------------------------------------------------------------------------ shapes of the outputs
def _each(value: int | Sequence[int], dims: int) -> Sequence[int]:
    """Return one number per dimension; a single number holds for all."""
    values = [value] if isinstance(value, int) else value
    return values if len(values) == dims else [values[0]] * dims


def _empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """Return an empty meta tensor in the dimension order of another one, so that views of it are valid."""
    if like.is_contiguous() or like.dim() != len(shape):
        return torch.empty(shape, dtype=like.dtype, device=META)
    strides = [0] * len(shape)
    step = 1
    for dim in sorted(range(len(shape)), key=lambda d: (like.stride(d), -d)):
        strides[dim] = step
        step *= max(1, shape[dim])
    return torch.empty_strided(shape, strides, dtype=like.dtype, device=META)


def _same(args: Sequence[Any], _kwargs: Mapping[str, Any]) -> Tensor | None:
    x = args[0]
    return _empty(x.shape, x) if x.dtype.is_floating_point else None


def _broadcast(args: Sequence[Any], _kwargs: Mapping[str, Any]) -> Tensor | None:
    first = args[0]
    if not first.dtype.is_floating_point:
        return None
    shape = first.shape
    for other in args[1:]:
        if isinstance(other, Tensor) and other.shape != shape:
            if other.dtype != first.dtype:
                return None
            sizes = [
                b if a == 1 else a if b in (1, a) else -1
                for a, b in zip_longest(reversed(shape), reversed(other.shape), fillvalue=1)
            ]
            if -1 in sizes:
                return None
            shape = torch.Size(reversed(sizes))
        elif isinstance(other, Tensor) and other.dtype != first.dtype:
            return None
    return _empty(shape, first)


def _convolved(args: Sequence[Any], _kwargs: Mapping[str, Any]) -> Tensor | None:
    x, weight, _, stride, padding, dilation, transposed, output_padding, groups = args
    dims = x.dim() - 2
    inner, outer = (0, 1) if transposed else (1, 0)
    if weight.dim() != x.dim() or x.shape[1] != weight.shape[inner] * (1 if transposed else groups):
        return None
    if len(stride) != dims:
        stride, padding, dilation = _each(stride, dims), _each(padding, dims), _each(dilation, dims)
        output_padding = _each(output_padding, dims)
    shape = [x.shape[0], weight.shape[outer] * (groups if transposed else 1)]
    sizes, kernel = x.shape[2:], weight.shape[2:]
    for size, k, s, p, d, extra in zip(sizes, kernel, stride, padding, dilation, output_padding, strict=True):
        reach = d * (k - 1)
        length = (size - 1) * s - 2 * p + reach + extra + 1 if transposed else (size + 2 * p - reach - 1) // s + 1
        if length < 1:
            return None
        shape.append(length)
    return _empty(shape, x)


def _normalised(args: Sequence[Any], _kwargs: Mapping[str, Any]) -> Any:
    x, channels, training = args[0], args[0].shape[1], args[5]
    if any(t is not None and t.shape[0] != channels for t in args[1:5]):
        return None
    saved = torch.empty(channels if training else 0, dtype=x.dtype, device=META)
    return _empty(x.shape, x), saved, saved


def _reduced(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    x = args[0]
    if kwargs or not x.dtype.is_floating_point:
        return None
    dims = args[1] if len(args) > 1 else None
    gone = {d % x.dim() for d in ([dims] if isinstance(dims, int) else dims)} if dims else set(range(x.dim()))
    keep = len(args) > 2 and args[2]
    shape = [1 if d in gone else n for d, n in enumerate(x.shape) if keep or d not in gone]
    return torch.empty(shape, dtype=x.dtype, device=META)


def _multiplied(left: int) -> Callable[[Sequence[Any], Mapping[str, Any]], Tensor | None]:
    def makes(args: Sequence[Any], _kwargs: Mapping[str, Any]) -> Tensor | None:
        a, b = args[left], args[left + 1]
        if a.dim() != b.dim() or a.shape[-1] != b.shape[-2] or a.shape[:-2] != b.shape[:-2]:
            return None
        return torch.empty((*a.shape[:-1], b.shape[-1]), dtype=a.dtype, device=META)

    return makes


def _pooled(ceil_at: int, dilation_at: int | None) -> Callable[[Sequence[Any], Mapping[str, Any]], Tensor | None]:
    def makes(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        x = args[0]
        if x.dim() != 4 or kwargs:
            return None
        kernel = _each(args[1], 2)
        stride = _each(args[2], 2) if len(args) > 2 and args[2] else kernel
        padding = _each(args[3], 2) if len(args) > 3 else (0, 0)
        dilation = _each(args[dilation_at], 2) if dilation_at and len(args) > dilation_at else (1, 1)
        ceil = len(args) > ceil_at and args[ceil_at]
        shape = list(x.shape[:2])
        for size, k, s, p, d in zip(x.shape[2:], kernel, stride, padding, dilation, strict=True):
            span = size + 2 * p - d * (k - 1) - 1
            length = (span + (s - 1 if ceil else 0)) // s + 1
            # With ceil_mode a last window that would start in the right padding is dropped.
            length -= bool(ceil and (length - 1) * s >= size + p)
            if length < 1:
                return None
            shape.append(length)
        return _empty(shape, x)

    return makes


def _max_pooled(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    out = _pooled(5, 4)(args, kwargs)
    return None if out is None else (out, torch.empty(out.shape, dtype=torch.int64, device=META))


def _joined(args: Sequence[Any], _kwargs: Mapping[str, Any]) -> Tensor | None:
    tensors = args[0]
    first = tensors[0]
    dim = (args[1] if len(args) > 1 else 0) % first.dim()
    if any(t.dim() != first.dim() or t.dtype != first.dtype for t in tensors):
        return None
    rest = [n for d, n in enumerate(first.shape) if d != dim]
    if any([n for d, n in enumerate(t.shape) if d != dim] != rest for t in tensors):
        return None
    shape = list(first.shape)
    shape[dim] = sum(t.shape[dim] for t in tensors)
    return _empty(shape, first)


def _copied(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    x = args[0]
    if kwargs.get("memory_format") is torch.contiguous_format:
        return torch.empty(x.shape, dtype=x.dtype, device=META)
    return _empty(x.shape, x) if not kwargs else None


def _converted(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    # A model that moves its input to the device of its weights must not make a real tensor of it.
    x = args[0]
    out = _empty(x.shape, x)
    return out if kwargs.get("dtype") in (None, x.dtype) else out.to(kwargs["dtype"])


# ------------------------------------------------------------------------------------------------------------ the table
def _named(names: str, rule: Callable[[str], Rule]) -> dict[str, Rule]:
    """Return one rule for several aten operators and their in-place forms, each under its own name."""
    return {f"aten::{name}{place}": rule(name.strip("_")) for name in names.split() for place in ("", "_")}


RULES: dict[str, Rule] = {
    # The full name of an operator, without its overload → its rule; `register_rule` adds to it.
    # Convolutions and matrix products.
    "aten::convolution": Rule(
        name="convolution", work=_convolution_work, makes=_convolved, role="convolution", operands=(0, 1)
    ),
    "aten::addmm": Rule(name="linear", work=_product_work(1), makes=_multiplied(1), operands=(1, 2)),
    "aten::mm": Rule(name="linear", work=_product_work(0), makes=_multiplied(0), operands=(0, 1)),
    "aten::linear": Rule(name="linear", work=_product_work(0), operands=(0, 1)),
    "aten::bmm": Rule(name="matmul", work=_product_work(0), makes=_multiplied(0), operands=(0, 1)),
    "aten::baddbmm": Rule(name="matmul", work=_product_work(1), operands=(1, 2)),
    "aten::mv": Rule(name="matmul", work=_product_work(0), operands=(0, 1)),
    "aten::addmv": Rule(name="matmul", work=_product_work(1), operands=(1, 2)),
    "aten::dot": Rule(name="matmul", work=_product_work(0), operands=(0, 1)),
    # One fused multiply-add per output element.
    **_named("add sub rsub", lambda name: Rule(name=name, work=_per_output(1), makes=_broadcast, linear=True)),
    **_named("mul", lambda name: Rule(name=name, work=_per_output(1), makes=_broadcast, role="product")),
    **_named("addcmul", lambda name: Rule(name=name, work=_per_output(1, 2), makes=_broadcast, role="product")),
    **_named("div maximum minimum", lambda name: Rule(name=name, work=_per_output(1), makes=_broadcast)),
    **_named(
        "relu sigmoid hardsigmoid hardtanh silu hardswish tanh gelu elu celu selu mish leaky_relu softplus "
        "log_sigmoid softsign threshold clamp clamp_min clamp_max exp log sqrt rsqrt reciprocal neg abs erf square",
        lambda name: Rule(name=name, work=_per_output(1), makes=_same),
    ),
    **_named(
        "_prelu_kernel relu6 pow sin cos exp2 expm1 log2 log1p log10 sign floor ceil round trunc frac remainder fmod "
        "eq ne lt le gt ge logical_and logical_or logical_not logical_xor bitwise_and bitwise_or bitwise_not where "
        "masked_fill native_dropout bernoulli cumsum",
        lambda name: Rule(name=name.removesuffix("_kernel"), work=_per_output(1)),
    ),
    **_named("addcdiv lerp glu", lambda name: Rule(name=name, work=_per_output(2))),
    # One per element read.
    **_named("mean sum amax amin", lambda name: Rule(name=name, work=_per_input(1), makes=_reduced, role="reduction")),
    **_named("max min argmax argmin any all", lambda name: Rule(name=name, work=_per_input(1), role="reduction")),
    **_named("prod norm linalg_vector_norm", lambda name: Rule(name=name, work=_per_input(1), role="reduction")),
    **_named("var std var_mean std_mean", lambda name: Rule(name=name, work=_per_input(2), role="reduction")),
    **_named("_softmax _safe_softmax", lambda _: Rule(name="softmax", work=_per_output(3), makes=_same)),
    **_named("_log_softmax", lambda name: Rule(name=name, work=_per_output(3), makes=_same)),
    **_named("logsumexp", lambda name: Rule(name=name, work=_per_input(3), role="reduction")),
    # One per element of every window.
    "aten::max_pool2d_with_indices": Rule(name="max_pool", work=_window_work, makes=_max_pooled, role="reduction"),
    "aten::max_pool3d_with_indices": Rule(name="max_pool", work=_window_work, role="reduction"),
    "aten::avg_pool2d": Rule(name="avg_pool", work=_window_work, makes=_pooled(4, None), role="reduction"),
    "aten::avg_pool3d": Rule(name="avg_pool", work=_window_work, role="reduction"),
    "aten::_adaptive_avg_pool2d": Rule(name="adaptive_avg_pool", work=_adaptive_work, role="reduction"),
    "aten::_adaptive_avg_pool3d": Rule(name="adaptive_avg_pool", work=_adaptive_work, role="reduction"),
    "aten::adaptive_max_pool2d": Rule(name="adaptive_max_pool", work=_adaptive_work, role="reduction"),
    "aten::adaptive_max_pool3d": Rule(name="adaptive_max_pool", work=_adaptive_work, role="reduction"),
    # Scale and shift per element, and the statistics where they are computed.
    "aten::native_batch_norm": Rule(name="batch_norm", work=_batch_norm_work, makes=_normalised, affine=1),
    "aten::native_group_norm": Rule(name="group_norm", work=_normalisation_work(True), affine=1),
    "aten::native_layer_norm": Rule(name="layer_norm", work=_normalisation_work(True), affine=2),
    # Interpolation: the neighbours that each output element is made of.
    "aten::upsample_linear1d": Rule(name="upsample", work=_per_output(2)),
    "aten::upsample_bilinear2d": Rule(name="upsample", work=_per_output(4)),
    "aten::_upsample_bilinear2d_aa": Rule(name="upsample", work=_per_output(4)),
    "aten::upsample_trilinear3d": Rule(name="upsample", work=_per_output(8)),
    "aten::upsample_bicubic2d": Rule(name="upsample", work=_per_output(16)),
    # Data movement: bytes, no arithmetic.
    "aten::cat": Rule(name="cat", work=_nothing, makes=_joined, linear=True),
    "aten::clone": Rule(name="copy", work=_nothing, makes=_copied, linear=True),
    "aten::_to_copy": Rule(name="copy", work=_nothing, makes=_converted, linear=True),
    "aten::copy_": Rule(name="copy", work=_nothing, linear=True),
    **{
        f"aten::{name}": Rule(name=friendly, work=_nothing, linear=True)
        for friendly, names in {
            "pad": "constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d "
            "replication_pad1d replication_pad2d replication_pad3d",
            "upsample": "upsample_nearest1d upsample_nearest2d upsample_nearest3d",
            "gather": "index index_select gather embedding take",
            "shuffle": "pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle im2col col2im",
            "copy": "flip roll repeat stack tril triu split_with_sizes_copy slice_scatter select_scatter",
            "fill": "zeros ones full zeros_like ones_like full_like new_zeros new_ones new_full "
            "zero_ fill fill_ arange linspace",
        }.items()
        for name in names.split()
    },
}


# These touch no data: views, uninitialised memory, and reading a single weight.
_FREE = {
    f"aten::{name}"
    for name in (
        *("_unsafe_view", "unsafe_split", "unsafe_chunk", "unsafe_split_with_sizes"),
        *("empty", "empty_like", "new_empty", "empty_strided", "_local_scalar_dense"),
    )
}

VIEW = Rule(name="view", work=_nothing, linear=True)
# Operator → rule, for those that were met.
FOUND: dict[Any, Rule] = {}


def register_rule(
    operator: str,
    work: Callable[[Sequence[Any], Tensor], Work],
    *,
    name: str = "",
    role: Literal["", "convolution", "reduction", "product"] = "",
    operands: tuple[int, ...] = (),
    linear: bool = False,
    affine: int | None = None,
    replace: bool = False,
) -> None:
    """Add a rule for an operator that selab does not count, such as one of your own library.

    Such operators are listed in `Cost.unknown` with zero cost. The output's shape comes from the operator's own meta
    (fake) kernel, which must exist.

    Args:
        operator: `library::name` without an overload, such as `aten::relu` or `torchvision::deform_conv2d`.
        work: called with the operator's positional arguments (tensors are on the meta device) and its first output.
            Returns the arithmetic of one call as `Work`: `macs` for products of convolutions and matrices, `other` and
            `other_flops` for everything else. It must not read values, only shapes.
        name: the row in tables; by default the operator's name.
        role: `reduction` and `product` mark the squeeze and the scale of an SE block.
        operands: positions of the two factors of a convolution or a matrix product. Each one that needs a gradient
            costs the forward's MACs in the backward pass.
        linear: whether the gradient passes through without arithmetic, as for an addition or a copy.
        affine: position of a normalisation's scale, if its shift follows it.
        replace: whether an existing rule may be replaced. That changes every count from then on.

    Raises:
        SpecError: a malformed name, an operator that has a rule, or a rule that cannot be called. A rule that returns
            something else than `Work` of whole numbers raises SpecError when a network is counted.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> import selab
        >>> from selab.cost import Work, register_rule
        >>> @torch.library.custom_op("doc_example::square", mutates_args=())
        ... def square(x: torch.Tensor) -> torch.Tensor:
        ...     return x * x
        >>> @square.register_fake
        ... def _(x):
        ...     return torch.empty_like(x)
        >>> class Net(nn.Module):
        ...     def forward(self, x):
        ...         return square(x)
        >>> selab.count(Net(), (1, 3, 4, 4)).unknown
        {'doc_example.square': 1}
        >>> register_rule("doc_example::square", lambda args, out: Work(other=out.numel(), other_flops=out.numel()))
        >>> selab.count(Net(), (1, 3, 4, 4)).macs.all
        48
    """
    place = f"register_rule {operator!r}"
    if not isinstance(operator, str) or not re.fullmatch(r"\w+::\w+", operator):
        raise SpecError(f"{place}: expected library::name without an overload, such as aten::relu")
    if not callable(work):
        raise SpecError(f"{place}: the rule is a {type(work).__name__}; expected a function (args, out) -> Work")
    if (operator in RULES or operator in _FREE) and not replace:
        known = RULES.get(operator, VIEW).name
        raise SpecError(f"{place}: is counted already, as {known!r}; give replace=True to count it by another rule")
    RULES[operator] = Rule(
        name=name or operator.partition("::")[2],
        work=_checked(operator, work),
        role=role,
        operands=operands,
        linear=linear,
        affine=affine,
    )
    FOUND.clear()


def _checked(operator: str, work: Callable[[Sequence[Any], Tensor], Work]) -> Callable[[Sequence[Any], Tensor], Work]:
    """Return a rule that refuses to return nonsense."""

    def rule(args: Sequence[Any], out: Tensor) -> Work:
        place = f"the counting rule of {operator}"
        try:
            found = work(args, out)
        except Exception as error:
            raise SpecError(f"{place} fails: {type(error).__name__}: {first_line(error)}") from error
        if not isinstance(found, Work):
            raise SpecError(f"{place} returned {found!r}; expected selab.cost.Work(macs, other, other_flops)")
        for field, value in found._asdict().items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise SpecError(f"{place} returned {field}={value!r}; expected a whole number, 0 or more")
        return found

    return rule


def rule_of(func: Any) -> Rule | None:
    """Return the rule of an operator; None where there is none."""
    name = func._schema.name
    rule = RULES.get(name) or (VIEW if func.is_view or name in _FREE else None)
    if rule is not None:
        FOUND[func] = rule
    return rule


def is_counted(func: Any) -> bool:
    """Return whether a call of this operator is an `Operation`: neither a view nor uninitialised memory."""
    return rule_of(func) is not VIEW
