"""What a network costs, counted: one forward pass in which no kernel runs.

The model runs its own `forward` on an input of the meta device while its parameters stay where they are. Every aten
operator is intercepted before its kernel: its output is an empty meta tensor of the right shape, its cost follows from
the shapes by the rules of `RULES`, and the weights are looked at for their shapes alone. So there is no copy of the
model, no arithmetic and no memory, whatever the batch and the resolution.

What one operator costs, in words:

* **conv_linear**: one MAC per multiplication of a convolution, a fully connected layer or a matrix product; biases are
  not counted. `paper` adds the additions of SE's global average pooling, nothing else.
* **all**: `conv_linear`, and one per fused multiply-add that any other operator needs: one per output element of an
  elementwise operation, one per element read of a reduction or a pooling window, one per element of a normalisation
  (a scale and a shift) and two more where it computes its own statistics, three for softmax (exponential, sum,
  division). Moving data (views, copies, concatenation, padding, shuffling) is no arithmetic.
* **flops**: two per MAC of conv_linear, two per element for the scale and shift of a normalisation and for `addcmul`
  and its like, otherwise the same as `all`.
* **bytes**: compulsory traffic: distinct inputs read once (parameters included, expanded dimensions once), output
  written once. Views move nothing. Indices, masks and statistics that an operator returns beside its result are left
  out, for inference does not need them.
* **activations**: output elements of the convolutions (Radosavovic et al., arXiv 2003.13678), and of those alone: a
  squeeze-and-excitation of 1x1 convolutions has some, the same of fully connected layers has none.

The backward pass is derived from the forward's: each operand of a convolution or a matrix product that needs a gradient
(the input of the first layer does not, nor does a frozen weight) costs the forward's MACs once, however many groups
there are. Any other operator costs its forward's arithmetic once per input that needs a gradient, a normalisation's
scale and shift one per element each; additions, views and copies hand the gradient on for nothing. `paper` adds one per
squeezed element, the mean's gradient spread back.
"""

import random
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import zip_longest
from math import prod
from typing import Any, Literal, NamedTuple

import msgspec
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from selab.attention import Attention
from selab.errors import ModelError, nearest
from selab.probe import evaluating, first_line, meta_twin
from selab.record import Cost, Frozen, Macs, OperatorCost, SECost, StageCost
from selab.se import GatedJoin

Example = Tensor | Sequence[Any] | Mapping[str, Any]
Stage = Literal["", "squeeze", "excitation", "scale"]

_META = torch.device("meta")


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
        name: the operator in a table.
        work: (arguments, output) → its arithmetic.
        makes: arguments → its empty output, where this is much cheaper than the operator's own meta kernel; None from
            it hands the call to that kernel, which also has the better error message.
        role: `reduction` and `product` are what an SE block's squeeze and scale are made of.
        operands: positions of the factors of a convolution or matrix product.
        linear: the gradient passes through without arithmetic.
        affine: position of a normalisation's scale; its shift stands behind it.
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
    """Every weight meets every output position; where transposed, every input position."""
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
    """A number per dimension, from a list that may hold one for all."""
    values = [value] if isinstance(value, int) else value
    return values if len(values) == dims else [values[0]] * dims


def _empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """An empty meta tensor in the dimension order of another one, so that a model's views find what they expect."""
    if like.is_contiguous() or like.dim() != len(shape):
        return torch.empty(shape, dtype=like.dtype, device=_META)
    strides = [0] * len(shape)
    step = 1
    for dim in sorted(range(len(shape)), key=lambda d: (like.stride(d), -d)):
        strides[dim] = step
        step *= max(1, shape[dim])
    return torch.empty_strided(shape, strides, dtype=like.dtype, device=_META)


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
    saved = torch.empty(channels if training else 0, dtype=x.dtype, device=_META)
    return _empty(x.shape, x), saved, saved


def _reduced(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    x = args[0]
    if kwargs or not x.dtype.is_floating_point:
        return None
    dims = args[1] if len(args) > 1 else None
    gone = {d % x.dim() for d in ([dims] if isinstance(dims, int) else dims)} if dims else set(range(x.dim()))
    keep = len(args) > 2 and args[2]
    shape = [1 if d in gone else n for d, n in enumerate(x.shape) if keep or d not in gone]
    return torch.empty(shape, dtype=x.dtype, device=_META)


def _multiplied(left: int) -> Callable[[Sequence[Any], Mapping[str, Any]], Tensor | None]:
    def makes(args: Sequence[Any], _kwargs: Mapping[str, Any]) -> Tensor | None:
        a, b = args[left], args[left + 1]
        if a.dim() != b.dim() or a.shape[-1] != b.shape[-2] or a.shape[:-2] != b.shape[:-2]:
            return None
        return torch.empty((*a.shape[:-1], b.shape[-1]), dtype=a.dtype, device=_META)

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
    return None if out is None else (out, torch.empty(out.shape, dtype=torch.int64, device=_META))


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
        return torch.empty(x.shape, dtype=x.dtype, device=_META)
    return _empty(x.shape, x) if not kwargs else None


def _converted(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    # A model that moves its input to the device of its weights must not make a real tensor of it.
    x = args[0]
    out = _empty(x.shape, x)
    return out if kwargs.get("dtype") in (None, x.dtype) else out.to(kwargs["dtype"])


# ------------------------------------------------------------------------------------------------------------ the table


def _named(names: str, rule: Callable[[str], Rule]) -> dict[str, Rule]:
    """One rule for several aten operators, each with its own name in a table, and for their in-place forms."""
    return {f"aten::{name}{place}": rule(name.strip("_")) for name in names.split() for place in ("", "_")}


RULES: dict[str, Rule] = {
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
"""Operator → rule. A custom operator is counted by adding its rule under its full name, `library::name`."""

# These touch no data: views of every kind, memory that nobody wrote yet, and reading a single weight.
_FREE = {
    f"aten::{name}"
    for name in (
        *("_unsafe_view", "unsafe_split", "unsafe_chunk", "unsafe_split_with_sizes"),
        *("empty", "empty_like", "new_empty", "empty_strided", "_local_scalar_dense"),
    )
}


# ------------------------------------------------------------------------------------------------------------ the trace


class Operation(Frozen, frozen=True, kw_only=True):
    """One operator call of the forward pass, and what it costs.

    Attributes:
        name: the operator in a table.
        operator: its full name, `aten::convolution`.
        path: the module that called it.
        function: the outermost public function that called it; empty unless the trace was asked for `details`.
        stage: the part of an SE block that it is; empty outside of one.
        block: the path of that SE block; None outside of one.
        known: whether there is a rule for it; without one all its costs are zero.
        input_numel: elements of its first input.
        output_numel: elements of its first output.
        macs: of convolutions and matrix products.
        other: all other arithmetic, in fused multiply-adds.
        other_flops: the same in floating-point operations.
        bytes: inputs read once, output written once.
        stage_macs: of its MACs (`all`), those that the SE block adds to the network; less than all of them only where
            one operator scales and does the network's own addition as well.
        stage_bytes: the same of its bytes.
        groups: of a convolution, otherwise 1.
        training: a normalisation that computes its own statistics.
        affine: a normalisation with scale and shift.
        operand_gradients: operands of a convolution or a matrix product that need a gradient.
        weight_gradient: whether the second operand is one of them.
        input_gradient: whether any input needs a gradient.
        backward_other: all other arithmetic of its backward pass, in fused multiply-adds.
        backward_other_flops: the same in floating-point operations.
    """

    name: str
    operator: str
    path: str
    function: str
    stage: Stage
    block: str | None
    known: bool
    input_numel: int
    output_numel: int
    macs: int
    other: int
    other_flops: int
    bytes: int
    stage_macs: int
    stage_bytes: int
    groups: int
    training: bool
    affine: bool
    operand_gradients: int = 0
    weight_gradient: bool = False
    input_gradient: bool = False
    backward_other: int = 0
    backward_other_flops: int = 0


@dataclass(frozen=True, kw_only=True)
class ModuleCall:
    """One call of a module: the shapes of its first input and of its output, None where that is no tensor."""

    path: str
    input_shape: tuple[int, ...] | None
    output_shape: tuple[int, ...] | None


@dataclass(frozen=True, kw_only=True)
class Trace:
    """All operators of one forward pass, in order; views and memory that nobody wrote are left out.

    Attributes:
        calls: how often each module ran.
        module_calls: empty unless the trace was asked for `details`.
        se_blocks: paths of the SE blocks.
    """

    operations: tuple[Operation, ...]
    calls: Mapping[str, int]
    module_calls: tuple[ModuleCall, ...]
    se_blocks: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """A module in the network: its path, and the SE block that its operators belong to.

    Attributes:
        gates: calling this module hands the block its map.
        joins: it also does work of the network itself, such as a residual addition.
    """

    path: str
    block: str | None = None
    gates: bool = False
    joins: bool = False


_VIEW = Rule(name="view", work=_nothing, linear=True)
_FOUND: dict[Any, Rule] = {}


def _rule_of(func: Any) -> Rule | None:
    name = func._schema.name
    rule = RULES.get(name) or (_VIEW if func.is_view or name in _FREE else None)
    if rule is not None:
        _FOUND[func] = rule
    return rule


def is_counted(func: Any) -> bool:
    """Whether a call of this operator is an `Operation` of a trace: not a view, nor memory that nobody wrote."""
    return _rule_of(func) is not _VIEW


def _tensors_in(values: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The distinct tensors among arguments and in their lists."""
    found: dict[int, Tensor] = {}
    for value in (*values, *kwargs.values()) if kwargs else values:
        if isinstance(value, Tensor):
            found[id(value)] = value
        elif isinstance(value, (list, tuple)):
            for item in value:
                if isinstance(item, Tensor):
                    found[id(item)] = item
    return list(found.values())


def _numel(x: Tensor) -> int:
    """Elements in memory: a dimension that `expand` made is there once."""
    count = x.numel()
    if count and not x.is_contiguous():
        for size, stride in zip(x.shape, x.stride(), strict=True):
            if stride == 0:
                count //= size
    return count


class _Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Stands between a model and the kernels: shapes go through, arithmetic does not."""

    def __init__(self, model: nn.Module, *, dtype: torch.dtype | None, se_blocks: Collection[str], details: bool):
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self.calls: defaultdict[str, int] = defaultdict(int)
        self.module_calls: list[ModuleCall] = []
        self.functions = _Functions() if details else None
        self._itemsize = None if dtype is None else dtype.itemsize
        self.places = _places(model, se_blocks)
        self._stack: list[tuple[nn.Module, _Place]] = [(model, _Place(path=""))]
        # The map of each SE block: the shape that its scale has and that its squeeze reads.
        self._maps: dict[str, torch.Size] = {}
        # Tensors on a real device that the forward pass itself made: constants. All other real ones are the model's,
        # which must not be written. Kept alive, for they are known by their identity.
        self._constants: dict[int, Tensor] = {}
        # What ran with gradients switched off, as the inside of a torch.autograd.Function does.
        self._hidden: list[tuple[int, Rule, Sequence[Any], list[Tensor], list[Tensor]]] = []
        # The source of the copy that was the last operator.
        self._copied: Tensor | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch 2.13 otherwise imports torch._dynamo at the first operator, which takes longer than any count.
        return False

    # The module hooks.

    def enter(self, module: nn.Module, args: Any) -> None:
        place = self.places.get(id(module))
        if place is None:
            return
        self._stack.append((module, place))
        self.calls[place.path] += 1
        if place.gates and place.block is not None and args and isinstance(args[0], Tensor):
            self._maps[place.block] = args[0].shape

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if id(module) not in self.places:
            return
        # A model that catches an exception leaves the modules below it without a word.
        while self._stack.pop()[0] is not module:
            pass
        if self.functions is not None:
            first = args[0] if args else None
            self.module_calls.append(
                ModuleCall(
                    path=self.places[id(module)].path,
                    input_shape=tuple(first.shape) if isinstance(first, Tensor) else None,
                    output_shape=tuple(output.shape) if isinstance(output, Tensor) else None,
                )
            )

    @property
    def where(self) -> str:
        """The module that is running, for a message."""
        module, place = self._stack[-1]
        return f"{place.path} ({type(module).__name__})" if place.path else f"its own forward ({type(module).__name__})"

    # The operators.

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        rule = _FOUND.get(func) or _rule_of(func)
        tensors = _tensors_in(args, kwargs)
        index = -1
        if rule is _VIEW:
            result = func(*args, **kwargs)
            self._note_constants(func, args, result)
        else:
            if all(id(x) in self._constants for x in tensors):
                result = func(*args, **kwargs)
                self._note_constants(func, args, result)
            else:
                result = self._make(func, rule, args, kwargs, tensors)
            out = result[0] if isinstance(result, (tuple, list)) else result
            if isinstance(out, Tensor):
                self._drop_copy_of_autograd(func, args)
                index = len(self.operations)
                self.operations.append(self._operation(func, rule, args, tensors, out))
        self._copied = args[0] if func._schema.name == "aten::clone" and torch.is_grad_enabled() else None
        if not torch.is_grad_enabled() and func._schema.name != "aten::detach":
            outs = [x for x in (result if isinstance(result, (tuple, list)) else (result,)) if isinstance(x, Tensor)]
            self._hidden.append((index, rule or _VIEW, args, tensors, outs))
        return result

    def _drop_copy_of_autograd(self, func: Any, args: Any) -> None:
        """Forgets a copy that an operator in place follows on its source: autograd keeps it, inference makes none."""
        if self._copied is not None and func._schema.is_mutable and args[0] is self._copied:
            self.operations.pop()

    def _make(self, func: Any, rule: Rule | None, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        """The empty output of an operator; the model's own tensors are never written."""
        in_place = func._schema.is_mutable and func._schema.name.endswith("_")
        if rule is not None and in_place and len(tensors) == 1:
            return args[0]
        if rule is not None and rule.makes is not None:
            made = rule.makes(args, kwargs)
            if made is not None and not in_place:
                return made
            if made is not None and made.shape == args[0].shape:
                return args[0]
        twins = {id(x): x if x.is_meta else torch.empty_like(x, device=_META) for x in tensors}

        def twin(value: Any) -> Any:
            if isinstance(value, Tensor):
                return twins[id(value)]
            if isinstance(value, torch.device):
                return _META
            return [twin(v) for v in value] if isinstance(value, (list, tuple)) else value

        result = func(*(twin(value) for value in args), **{key: twin(value) for key, value in kwargs.items()})
        return args[0] if in_place else result

    def _note_constants(self, func: Any, args: Any, result: Any) -> None:
        of_constants = not args or not isinstance(args[0], Tensor) or id(args[0]) in self._constants
        if of_constants or func._schema.name == "aten::lift_fresh":
            for x in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(x, Tensor) and not x.is_meta:
                    self._constants[id(x)] = x

    def _operation(self, func: Any, rule: Rule | None, args: Any, tensors: list[Tensor], out: Tensor) -> Operation:
        _, place = self._stack[-1]
        function = self.functions.current if self.functions is not None else ""
        if rule is None:
            return _uncounted(func._schema.name, place.path, function, tensors, out)
        work = rule.work(args, out)
        moved = self._bytes(out)
        for x in tensors:
            moved += self._bytes(x)
        stage, stage_macs, stage_bytes = self._stage(place, rule, work, tensors, out, moved)
        return Operation(
            name=rule.name,
            operator=func._schema.name,
            path=place.path,
            function=function,
            stage=stage,
            block=place.block if stage else None,
            known=True,
            input_numel=tensors[0].numel() if tensors else 0,
            output_numel=out.numel(),
            macs=work.macs,
            other=work.other,
            other_flops=work.other_flops,
            bytes=moved,
            stage_macs=stage_macs,
            stage_bytes=stage_bytes,
            groups=args[8] if rule.role == "convolution" else 1,
            training=rule.name == "batch_norm" and bool(args[5]),
            affine=rule.affine is not None and args[rule.affine] is not None,
            **(_gradients(rule, work, args, tensors, out, _needs_gradient) if torch.is_grad_enabled() else {}),
        )

    def _bytes(self, x: Tensor) -> int:
        itemsize = self._itemsize if self._itemsize and x.dtype.is_floating_point else x.dtype.itemsize
        return _numel(x) * itemsize

    def _stage(
        self, place: _Place, rule: Rule, work: Work, tensors: list[Tensor], out: Tensor, moved: int
    ) -> tuple[Stage, int, int]:
        """Which part of an SE block an operator is, and what of its MACs and bytes SE adds to the network."""
        if place.block is None:
            return "", 0, 0
        macs = work.macs + work.other
        if rule.role == "reduction":
            shape = self._maps.setdefault(place.block, tensors[0].shape)
            if tensors[0].shape == shape:
                return "squeeze", macs, moved
        shape = self._maps.get(place.block, torch.Size())
        if out.shape != shape:
            return "excitation", macs, moved
        if rule.role != "product":
            return ("", 0, 0) if place.joins else ("excitation", macs, moved)
        maps = [x for x in tensors if x.shape == shape and _numel(x) == x.numel()]
        if rule.name == "addcmul" and len(maps) == 2:
            # addcmul(shortcut, branch, gate) is the network's own addition with a factor more: the addition reads both
            # maps and writes one all the same.
            return "scale", macs - out.numel(), moved - self._bytes(out) - sum(self._bytes(x) for x in maps)
        return "scale", macs, moved

    # Gradients.

    def reveal_hidden(self) -> None:
        """Finds, at the end, which operators without gradients were the inside of a `torch.autograd.Function`.

        Such a function runs with gradients switched off and marks its results afterwards, so an operator of its inside
        lies between an input that needs a gradient and a result that has one. Under `torch.no_grad` no result has one.
        """
        if not any(x.requires_grad for *_, outs in self._hidden for x in outs):
            return
        carrying: set[int] = set()
        for _, _, _, tensors, outs in self._hidden:
            if any(x.requires_grad or id(x) in carrying for x in tensors):
                carrying.update(id(x) for x in outs if x.is_floating_point())
        reaching: set[int] = set()
        for index, rule, args, tensors, outs in reversed(self._hidden):
            if not any(x.requires_grad or id(x) in reaching for x in outs):
                continue
            reaching.update(id(x) for x in tensors)
            if index >= 0:
                operation = self.operations[index]
                work = Work(operation.macs, operation.other, operation.other_flops)
                found = _gradients(rule, work, args, tensors, outs[0], lambda x: x.requires_grad or id(x) in carrying)
                self.operations[index] = _replaced(operation, found)


class _Functions(TorchFunctionMode):
    """Remembers which public function is running, the outermost."""

    def __init__(self) -> None:
        super().__init__()
        self.current = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before, name = self.current, getattr(func, "__name__", str(func))
        # fvcore 0.1.5 does not know convolutions whose padding is a word.
        self.current = f"{name}, padding by name" if "conv" in name and _has_word(args, kwargs) else name
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.current = before


def _has_word(args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> bool:
    return any(isinstance(value, str) for value in (*args, *(kwargs or {}).values()))


def _needs_gradient(x: Tensor) -> bool:
    return x.requires_grad


def _gradients(
    rule: Rule, work: Work, args: Any, tensors: list[Tensor], out: Tensor, needs: Callable[[Tensor], bool]
) -> dict[str, Any]:
    """The fields of an operation that tell its backward pass; none where no input needs a gradient."""
    needing = sum(needs(x) for x in tensors)
    if not needing or not out.dtype.is_floating_point:
        return {}
    if rule.operands:
        operands = [needs(args[position]) for position in rule.operands]
        return {"operand_gradients": sum(operands), "weight_gradient": operands[1], "input_gradient": operands[0]}
    if rule.linear:
        other, flops = 0, 0
    elif rule.affine is None:
        other, flops = needing * work.other, needing * work.other_flops
    else:
        # The scale's gradient is a sum of products, the shift's a sum.
        scale, shift = (x is not None and needs(x) for x in args[rule.affine : rule.affine + 2])
        through = needs(args[0])
        other = through * work.other + (scale + shift) * out.numel()
        flops = through * work.other_flops + (2 * scale + shift) * out.numel()
    return {"input_gradient": True, "backward_other": other, "backward_other_flops": flops}


def _replaced(operation: Operation, fields: dict[str, Any]) -> Operation:
    return msgspec.structs.replace(operation, **fields)


def _uncounted(operator: str, path: str, function: str, tensors: list[Tensor], out: Tensor) -> Operation:
    return Operation(
        name=operator.replace("::", "."),
        operator=operator,
        path=path,
        function=function,
        stage="",
        block=None,
        known=False,
        input_numel=tensors[0].numel() if tensors else 0,
        output_numel=out.numel(),
        macs=0,
        other=0,
        other_flops=0,
        bytes=0,
        stage_macs=0,
        stage_bytes=0,
        groups=1,
        training=False,
        affine=False,
    )


def _places(model: nn.Module, se_blocks: Collection[str]) -> dict[int, _Place]:
    modules = dict(model.named_modules())
    for path in se_blocks:
        if path not in modules:
            raise ModelError(f"{type(model).__name__}: has no module {path!r} to count as SE{nearest(path, modules)}")
    places: dict[int, _Place] = {}
    inside: str | None = None
    for path, module in modules.items():
        # named_modules goes depth first, so what follows a block with its prefix is inside of it.
        if inside is None or (inside and not path.startswith(f"{inside}.")):
            inside = path if isinstance(module, Attention) or path in se_blocks else None
        if inside is not None:
            places[id(module)] = _Place(path=path, block=inside, gates=path == inside)
        elif isinstance(module, GatedJoin):
            places[id(module)] = _Place(path=path, block=f"{path}.se", gates=True, joins=True)
        else:
            places[id(module)] = _Place(path=path)
    return places


@contextmanager
def _undisturbed(model: nn.Module, training: bool) -> Iterator[None]:
    """The surroundings of a count: gradients on, so that autograd tells which tensors need one; states given back."""
    python_state = random.getstate()
    with (
        _eager(),
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.enable_grad(),
        evaluating(model),
    ):
        if training:
            model.train()
        try:
            yield
        finally:
            random.setstate(python_state)


@contextmanager
def _eager() -> Iterator[None]:
    """Lets compiled modules run as they were written; a model can hold one only if torch._dynamo is there."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        # torch 2.13 warns that hooks on all modules see torch.compile's wrapper twice; ours do not mind.
        warnings.filterwarnings("ignore", message=".*when there are global hooks on modules", category=UserWarning)
        yield


@contextmanager
def _hooked(tracer: _Tracer) -> Iterator[None]:
    """Hooks on all modules at once, so that none of the model's own is touched."""
    before = register_module_forward_pre_hook(tracer.enter)
    try:
        after = register_module_forward_hook(tracer.leave)
        try:
            yield
        finally:
            after.remove()
    finally:
        before.remove()


def as_written(model: nn.Module) -> nn.Module:
    """The module that `torch.compile` wrapped; any other module itself."""
    written = getattr(model, "_orig_mod", model)
    return written if isinstance(written, nn.Module) else model


def meta_arguments(model: nn.Module, example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments on the meta device.

    Args:
        model: its first floating-point parameter gives the dtype where the example is a shape.
        example: a shape such as (N, C, H, W); a tensor; positional arguments in a tuple or list; keyword arguments in a
            mapping. Tensors in them are looked at for shape and dtype alone.

    Raises:
        ModelError: no tensor has this shape.
    """
    if isinstance(example, Tensor):
        return (_on_meta(example),), {}
    if isinstance(example, Mapping):
        return (), {key: _on_meta(value) for key, value in example.items()}
    if all(isinstance(size, int) for size in example):
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
        try:
            return (torch.empty(tuple(example), dtype=dtype, device=_META),), {}
        except (RuntimeError, TypeError) as error:
            reason = "too large" if "verflow" in str(error) else first_line(error)
            raise ModelError(
                f"no input of shape {tuple(example)}: {reason}; pass the input that the network expects"
            ) from error
    return tuple(_on_meta(value) for value in example), {}


def _on_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_like(value, device=_META, requires_grad=False)
    return type(value)(_on_meta(item) for item in value) if type(value) in (list, tuple) else value


def trace(
    model: nn.Module,
    example: Example,
    *,
    dtype: torch.dtype | None = None,
    training: bool = False,
    se_blocks: Collection[str] = (),
    details: bool = False,
) -> Trace:
    """Every operator of one forward pass with its cost; no kernel runs and the model stays as it was.

    Args:
        model: any module on any device, the meta device included.
        example: an input's shape or an example, as for `meta_arguments`.
        dtype: of all floating-point tensors when bytes are counted; their own where None.
        training: count the forward pass in train mode instead of eval mode.
        se_blocks: paths of modules that are SE blocks besides those of `selab.se`.
        details: record module calls and function names too, which explaining other counters needs.

    Raises:
        ModelError: the forward pass fails; names the module in which it did.
    """
    args, kwargs = meta_arguments(model, example)
    model = as_written(model)
    if any(isinstance(module, nn.RNNBase) for module in model.modules()):
        # Recurrent operators compare the devices of input and weights before they can be intercepted.
        model = meta_twin(model)
    tracer = _Tracer(model, dtype=dtype, se_blocks=se_blocks, details=details)
    try:
        with _undisturbed(model, training), _hooked(tracer), tracer.functions or nullcontext(), tracer:
            model(*args, **kwargs)
            tracer.reveal_hidden()
    except Exception as error:
        given = ", ".join(str(tuple(x.shape)) for x in _tensors_in(args, kwargs))
        raise ModelError(
            f"{type(model).__name__}: counting fails in {tracer.where} with an input of shape {given}: "
            f"{first_line(error)}; pass the input that the network expects"
        ) from error
    return Trace(
        operations=tuple(tracer.operations),
        calls=dict(tracer.calls),
        module_calls=tuple(tracer.module_calls),
        se_blocks=tuple(place.path for place in tracer.places.values() if place.path == place.block),
    )


# ------------------------------------------------------------------------------------------------------------- the cost


def count(
    model: nn.Module,
    example: Example,
    *,
    dtype: torch.dtype | None = None,
    training: bool = False,
    se_blocks: Collection[str] = (),
) -> Cost:
    """What one forward pass of a network costs, and what its backward pass would; see the module's rules.

    In `by_operator` and `by_module`, MACs are those of the convention `all`.

    Args:
        model: any module on any device, the meta device included; left as it was.
        example: an input's shape such as (N, C, H, W), a tensor, a tuple of positional or a mapping of keyword
            arguments.
        dtype: of all floating-point tensors when bytes are counted; their own where None.
        training: count the forward pass in train mode instead of eval mode.
        se_blocks: paths of modules that are SE blocks besides those of `selab.se`.

    Raises:
        ModelError: the forward pass fails, or `se_blocks` names no module.
    """
    return cost_of(model, trace(model, example, dtype=dtype, training=training, se_blocks=se_blocks))


def cost_of(model: nn.Module, traced: Trace) -> Cost:
    """The cost of a network from the trace of its forward pass."""
    model = as_written(model)
    operations = traced.operations
    by_module = _grouped(operations, lambda operation: operation.path)
    params, buffer_elements = _sizes(model)
    return Cost(
        params=params,
        buffer_elements=buffer_elements,
        macs=_macs(operations),
        macs_backward=_macs_backward(operations),
        flops=sum(2 * o.macs + o.other_flops for o in operations),
        flops_backward=sum(2 * o.macs * o.operand_gradients + o.backward_other_flops for o in operations),
        bytes=sum(o.bytes for o in operations),
        activations=sum(o.output_numel for o in operations if o.name == "convolution"),
        se=_se_cost(model, traced),
        by_operator=_grouped(operations, lambda operation: operation.name),
        by_module={
            path: OperatorCost(
                calls=traced.calls.get(path, cost.calls), macs=cost.macs, flops=cost.flops, bytes=cost.bytes
            )
            for path, cost in by_module.items()
        },
        unknown=dict(Counter(o.name for o in operations if not o.known)),
    )


def _macs(operations: Sequence[Operation]) -> Macs:
    products = sum(o.macs for o in operations)
    squeezed = sum(o.other for o in operations if o.stage == "squeeze")
    return Macs(conv_linear=products, paper=products + squeezed, all=products + sum(o.other for o in operations))


def _macs_backward(operations: Sequence[Operation]) -> Macs:
    products = sum(o.macs * o.operand_gradients for o in operations)
    squeezed = sum(o.backward_other for o in operations if o.stage == "squeeze")
    return Macs(
        conv_linear=products, paper=products + squeezed, all=products + sum(o.backward_other for o in operations)
    )


def _sizes(model: nn.Module) -> tuple[int, int]:
    """Elements of parameters and of persistent buffers, shared ones once."""
    params: dict[int, int] = {}
    buffers: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                params[id(parameter)] = parameter.numel()
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                buffers[id(buffer)] = buffer.numel()
    return sum(params.values()), sum(buffers.values())


def _se_cost(model: nn.Module, traced: Trace) -> SECost:
    params = {id(p): p for path in traced.se_blocks for p in model.get_submodule(path).parameters()}
    inside = [o for o in traced.operations if o.stage]

    def stage(name: Stage) -> StageCost:
        own = [o for o in inside if o.stage == name]
        return StageCost(macs=sum(o.stage_macs for o in own), bytes=sum(o.stage_bytes for o in own))

    return SECost(
        blocks=len({o.block for o in inside}),
        params=sum(p.numel() for p in params.values()),
        squeeze=stage("squeeze"),
        excitation=stage("excitation"),
        scale=stage("scale"),
    )


def _grouped(operations: Sequence[Operation], key: Callable[[Operation], str]) -> dict[str, OperatorCost]:
    sums: dict[str, list[int]] = {}
    for o in operations:
        if o.known:
            total = sums.setdefault(key(o), [0, 0, 0, 0])
            total[0] += 1
            total[1] += o.macs + o.other
            total[2] += 2 * o.macs + o.other_flops
            total[3] += o.bytes
    return {
        name: OperatorCost(calls=calls, macs=macs, flops=flops, bytes=moved)
        for name, (calls, macs, flops, moved) in sums.items()
    }
