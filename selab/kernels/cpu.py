"""Compute SE blocks on a CPU in few passes over the feature maps: by native code, or by few torch operations.

The native code (native.c) is built on installation, if there is a C compiler. Without it the same steps run as torch
operations, which take one or two passes more. Both share one forward and one backward:

    m = relu(y) if relu_in else y;  s = mean(m);  u = fc1(s);  v = fc2(act(u));  g = scale * gate(v) + offset
    out = m * g (+ shortcut), rectified if relu_out

At inference the native code also computes a BatchNorm and an activation before the block, without storing their output.

The forward pass reads y for the mean and once more for the join. The backward pass first reads the gradient, the output
and y, writes the gradient of the sum and reduces the gates' gradients; then it reads the former and writes y's.

Source: arXiv 1709.01507, eq. 2-4.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from selab.kernels import memory_format

# As in native.c: a library that was built from older sources must not be called.
_INTERFACE = 6


def _load(name: str = "selab.kernels._native") -> tuple[Any, str]:
    """Return the native module, or None and the reason."""
    module: Any = None
    try:
        module = import_module(name)
        reason = "" if getattr(module, "INTERFACE", 1) == _INTERFACE else "the native code is out of date"
    except ImportError as error:
        built = find_spec(name) is not None
        reason = f"the native code does not load: {error}" if built else "the native code was not built"
    if not reason:
        return module, ""
    return None, f"{reason}; reinstall selab from source, with a C compiler available"


_native, _WHY_NOT = _load()
ACTIVATIONS = ("relu", "silu")
GATES = ("sigmoid", "hardsigmoid")
POST_ACTIVATIONS = ("", "relu", "hardswish", "silu")
"""Activations at the end of a pass over a feature map, in the order of the native code."""
PRE_ACTIVATIONS = POST_ACTIVATIONS[:3]
"""Activations at the start of a block's pass; they are computed twice."""
# With fewer elements, a second thread costs more than it saves.
_LEAST_PER_THREAD = 1 << 15
# Up to this many positions, a matrix product averages a channels-last feature map faster than a reduction.
_POSITIONS_BY_PRODUCT = 256


class BlockParams(NamedTuple):
    """Weights and settings of a block.

    Attributes:
        w1: (K, C); b1: (K) or None; w2: (C, K); b2: (C) or None.
        activation: `relu` or `silu`.
        gate: `sigmoid` or `hardsigmoid`, multiplied by `scale`, plus `offset`.
        relu_in: whether a ReLU is applied to the input.
        relu_out: whether a ReLU is applied to the output, after the residual addition.
    """

    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    activation: str = "relu"
    gate: str = "sigmoid"
    scale: float = 1.0
    offset: float = 0.0
    relu_in: bool = False
    relu_out: bool = False


class Norm(NamedTuple):
    """A BatchNorm at inference: activation((y - mean) / sqrt(var + eps) * weight + bias).

    Attributes:
        weight: (C) or None, like bias; mean and var are (C).
        activation: one of `POST_ACTIVATIONS`.
    """

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    var: Tensor
    eps: float
    activation: str = ""


def native_reason() -> str:
    """Return why the native code cannot run at all; empty if it can."""
    return _WHY_NOT


def native_refuses(y: Tensor, shortcut: Tensor | None, params: BlockParams) -> str:
    """Return why the native code does not support these tensors; empty if it does."""
    if _native is None:
        return _WHY_NOT
    if y.dtype != torch.float32 or params.w1.dtype != torch.float32:
        return f"the native code computes in float32 only, not in {str(y.dtype).removeprefix('torch.')}"
    if not memory_format.is_dense(y):
        return "the feature map is neither contiguous nor channels last"
    if shortcut is not None and (shortcut.dtype != y.dtype or shortcut.stride() != y.stride()):
        return "branch and shortcut differ in dtype or strides"
    if not (params.w1.is_contiguous() and params.w2.is_contiguous()):
        return "the weights are not contiguous"
    if params.w1.shape[1] != y.shape[1] or params.w2.shape != params.w1.shape[::-1]:
        return "the weights do not match the number of channels"
    return ""


def norm_refuses(y: Tensor, norm: Norm) -> str:
    """Return why the native code cannot apply a BatchNorm to this feature map; empty if it can."""
    refused = activated_refuses(y, None)
    if refused:
        return refused
    for one in norm[:4]:
        if one is not None and not (one.dtype == y.dtype and one.is_contiguous() and one.shape == y.shape[1:2]):
            return "the running statistics do not match the feature map"
    return ""


def infer(
    y: Tensor,
    shortcut: Tensor | None,
    params: BlockParams,
    *,
    native: bool,
    in_place: bool = False,
    norm: Norm | None = None,
) -> Tensor:
    """Run the block without gradients.

    Args:
        y: (N, C, H, W).
        shortcut: of the same shape, or None.
        params: of the block.
        native: whether to use the native code; `native_refuses` must have returned an empty string.
        in_place: whether the result may reuse y's memory.
        norm: the BatchNorm before the block, only with `native`; `norm_refuses` must have returned an empty string.

    Returns:
        (N, C, H, W), in the memory format of y.
    """
    if native:
        out = y if in_place else torch.empty_like(y)
        _run_native(y, shortcut, params, out, None, norm)
        return out
    m = F.relu(y) if params.relu_in else y
    gate = _factors(_excited(squeezed(m), params)[1], params)[:, :, None, None]
    if shortcut is None:
        out = m.mul_(gate) if (in_place or params.relu_in) and gate.dtype == m.dtype else m * gate
    else:
        out = torch.addcmul(shortcut, m, gate)
    return out.relu_() if params.relu_out else out


def forward(y: Tensor, shortcut: Tensor | None, params: BlockParams, *, native: bool) -> tuple[Tensor, Tensor]:
    """Run the block, and keep what its backward pass needs in addition to the feature maps.

    Args:
        y: (N, C, H, W).
        shortcut: of the same shape, or None.
        params: of the block.
        native: as in `infer`.

    Returns:
        The output (N, C, H, W); and (N, C + K + C), for each image the squeezed values (C), the hidden values before
        their activation (K) and the logits (C).
    """
    if native:
        out = torch.empty_like(y)
        kept = torch.empty(y.shape[0], 2 * y.shape[1] + params.w1.shape[0])
        _run_native(y, shortcut, params, out, kept)
        return out, kept
    m = F.relu(y) if params.relu_in else y
    s = squeezed(m)
    hidden, logits = _excited(s, params)
    gate = _factors(logits, params)[:, :, None, None]
    out = m * gate if shortcut is None else torch.addcmul(shortcut, m, gate)
    return out.relu_() if params.relu_out else out, torch.cat((s, hidden, logits), 1)


def backward(
    dout: Tensor, out: Tensor | None, y: Tensor, params: BlockParams, kept: Tensor, *, native: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of one block.

    Args:
        dout: gradient of the output, (N, C, H, W).
        out: the output if `relu_out` is set; None otherwise.
        y: as in `forward`.
        params: as in `forward`.
        kept: from `forward`.
        native: as in `forward`; only a native output has the memory format of y.

    Returns:
        Gradients of y and of the shortcut, both (N, C, H, W); of the logits, (N, C); of the hidden values, (N, K).
    """
    dout = memory_format.laid_out(dout, y)
    if native:
        return _native_backward(dout, out, y, params, kept)
    _, hidden, logits = _parts(kept, params)
    dz = dout if out is None else torch.ops.aten.threshold_backward(dout, out, 0)
    m = F.relu(y) if params.relu_in else y
    dlogits = _before_gate((dz * m).sum((2, 3)), logits, params)
    dhidden = _before_activation(dlogits @ params.w2, hidden, params)
    ds = (dhidden @ params.w1)[:, :, None, None] / (y.shape[2] * y.shape[3])
    dy = torch.addcmul(ds, dz, _factors(logits, params)[:, :, None, None])
    if params.relu_in:
        dy = torch.ops.aten.threshold_backward(dy, y, 0)
    return dy, dz, dlogits, dhidden


def between(y: Tensor, params: BlockParams) -> Tensor:
    """Return the values that `forward` keeps, (N, C + K + C), by operations that autograd records."""
    s = (F.relu(y) if params.relu_in else y).mean((2, 3))
    return torch.cat((s, *_excited(s, params)), 1)


def layer_gradients(
    params: BlockParams, kept: Tensor, dlogits: Tensor, dhidden: Tensor
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Return the gradients of w1, b1, w2 and b2, from (N, C + K + C), (N, C) and (N, K)."""
    s, hidden, _ = _parts(kept, params)
    h = F.silu(hidden) if params.activation == "silu" else F.relu(hidden)
    return (
        dhidden.t() @ s,
        None if params.b1 is None else dhidden.sum(0),
        dlogits.t() @ h,
        None if params.b2 is None else dlogits.sum(0),
    )


def _parts(kept: Tensor, params: BlockParams) -> tuple[Tensor, Tensor, Tensor]:
    hidden, channels = params.w1.shape
    squeezed_values, hidden_values, logits = torch.split(kept, [channels, hidden, channels], 1)
    return squeezed_values, hidden_values, logits


class Gated(torch.autograd.Function):
    """`forward` and `backward` as one autograd node.

    It saves y, the output if `relu_out` is set, and (N, C + K + C). For second derivatives its backward pass computes
    the values between the layers again, by operations that autograd records.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        y: Tensor,
        shortcut: Tensor | None,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        b2: Tensor | None,
        params: BlockParams,
        native: bool,
    ) -> Tensor:
        """(N, C, H, W), the shortcut alike or None, the layers, the params again, `native` → (N, C, H, W)."""
        out, kept = forward(y, shortcut, params, native=native)
        ctx.save_for_backward(y, out if params.relu_out else None, w1, b1, w2, b2, kept)  # type: ignore[arg-type]
        # Without the weights: tensors stored outside save_for_backward would leak.
        ctx.options = params[4:]  # type: ignore[attr-defined]
        ctx.joined = shortcut is not None  # type: ignore[attr-defined]
        ctx.native = native  # type: ignore[attr-defined]
        return out

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, dout: Tensor) -> tuple[Tensor | None, ...]:
        """(N, C, H, W) → the gradients of forward's arguments."""
        y, out, w1, b1, w2, b2, kept = ctx.saved_tensors  # type: ignore[attr-defined]
        params = BlockParams(w1, b1, w2, b2, *ctx.options)  # type: ignore[attr-defined]
        again = torch.is_grad_enabled()
        kept = between(y, params) if again else kept
        native = ctx.native and not again  # type: ignore[attr-defined]
        dy, dz, dlogits, dhidden = backward(dout, out, y, params, kept, native=native)
        layers = layer_gradients(params, kept, dlogits, dhidden)
        return dy, dz if ctx.joined else None, *layers, None, None  # type: ignore[attr-defined]


def activated_refuses(y: Tensor, shortcut: Tensor | None) -> str:
    """Return why the native code does not support this addition and activation; empty if it does."""
    if _native is None:
        return _WHY_NOT
    if y.dtype != torch.float32 or y.dim() != 4 or not memory_format.is_dense(y) or not y.is_cpu:
        return "the feature map is not float32, contiguous or channels last, and on a CPU"
    if shortcut is not None and not _is_alike(y, shortcut):
        return "branch and shortcut differ in dtype, shape or memory"
    return ""


def activated(
    y: Tensor, shortcut: Tensor | None, norm: Norm | None, activation: str = "relu", *, in_place: bool = False
) -> Tensor:
    """Compute activation(norm(y) + shortcut) in one native pass, without gradients: (N, C, H, W) → (N, C, H, W).

    Args:
        y: (N, C, H, W), for which `activated_refuses` has returned an empty string.
        shortcut: of the same shape, or None.
        norm: the BatchNorm before it, without an activation of its own, or None.
        activation: one of `POST_ACTIVATIONS`.
        in_place: whether the result reuses y's memory.
    """
    out = y if in_place else torch.empty_like(y)
    _run_native(y, shortcut, activation, out, None, norm)
    return out


def add_relu(branch: Tensor, shortcut: Tensor, *, in_place: bool = False) -> Tensor:
    """Compute relu(branch + shortcut) without gradients: (N, C, H, W) twice → (N, C, H, W).

    Args:
        branch: (N, C, H, W).
        shortcut: of the same shape.
        in_place: whether the result reuses the branch's memory.
    """
    if not activated_refuses(branch, shortcut):
        return activated(branch, shortcut, None, in_place=in_place)
    return (branch.add_(shortcut) if in_place and branch.dtype == shortcut.dtype else branch + shortcut).relu_()


class AddReLU(torch.autograd.Function):
    """`add_relu` as one autograd node; saves its output."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, branch: Tensor, shortcut: Tensor) -> Tensor:
        """(N, C, H, W) twice → (N, C, H, W)."""
        out = add_relu(branch, shortcut)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, dout: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C, H, W) → the same gradient for both."""
        (out,) = ctx.saved_tensors  # type: ignore[attr-defined]
        dz = torch.ops.aten.threshold_backward(dout, out, 0)
        return dz, dz


# ------------------------------------------------------------------------------------------------------------ by torch
def squeezed(m: Tensor) -> Tensor:
    """Return mean(m), (N, C, H, W) → (N, C), by the fastest operation for its memory format and size.

    A reduction over one dimension is faster than one over two; small channels-last feature maps are averaged by a
    matrix product with a constant row.
    """
    n, c, h, w = m.shape
    if m.is_contiguous():
        return m.flatten(2).mean(2)
    if memory_format.is_channels_last(m) and h * w <= _POSITIONS_BY_PRODUCT and m.dtype in _EXACT:
        # Divided after the sum, as by torch: it overflows alike.
        row = m.new_ones(()).expand(n, 1, h * w)
        return torch.bmm(row, m.permute(0, 2, 3, 1).reshape(n, h * w, c))[:, 0] / (h * w)
    return m.mean((2, 3))


_EXACT = (torch.float32, torch.float64)


def compilable(y: Tensor, shortcut: Tensor | None, params: BlockParams) -> Tensor:
    """Run the block in the form for torch.compile: (N, C, H, W), the shortcut alike or None → (N, C, H, W).

    For few images the two layers are products and sums, which the compiler puts into one loop with activation and gate.
    Each matrix product would be a library call, whose overhead is longer than its work. A dynamic batch takes matrix
    products: a choice by its size would limit the compiled or exported program to the sizes that choose alike.
    """
    # Imports sympy; the compiler has it already.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    m = F.relu(y) if params.relu_in else y
    s = m.mean((2, 3))
    if statically_known_true(s.shape[0] <= _IMAGES_BY_SUMS):
        hidden = _by_sums(s, params.w1, params.b1)
        h = F.silu(hidden) if params.activation == "silu" else F.relu(hidden)
        logits = _by_sums(h, params.w2, params.b2)
    else:
        logits = _excited(s, params)[1]
    out = m * _factors(logits, params)[:, :, None, None]
    out = out if shortcut is None else shortcut + out
    return F.relu(out) if params.relu_out else out


# Up to this many images, a compiled layer is a generated loop.
_IMAGES_BY_SUMS = 4


def _by_sums(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = (x[:, None, :] * weight).sum(2)
    return out if bias is None else out + bias


def _excited(s: Tensor, params: BlockParams) -> tuple[Tensor, Tensor]:
    """Return the hidden values before their activation (N, K), and the logits (N, C), for (N, C)."""
    hidden = F.linear(s, params.w1, params.b1)
    h = F.silu(hidden) if params.activation == "silu" else F.relu(hidden)
    return hidden, F.linear(h, params.w2, params.b2)


def _factors(logits: Tensor, params: BlockParams) -> Tensor:
    gate = F.hardsigmoid(logits) if params.gate == "hardsigmoid" else torch.sigmoid(logits)
    return gate if (params.scale, params.offset) == (1.0, 0.0) else gate * params.scale + params.offset


def _before_gate(dfactors: Tensor, logits: Tensor, params: BlockParams) -> Tensor:
    """Return the logits' gradient for that of the gates' factors, both (N, C), by torch's own operators."""
    dgate = dfactors if params.scale == 1.0 else dfactors * params.scale
    if params.gate == "hardsigmoid":
        # As hardsigmoid_backward, which has a sixth in single precision in double precision too.
        return torch.where((logits > -3) & (logits < 3), dgate / 6, 0)
    dlogits: Tensor = torch.ops.aten.sigmoid_backward(dgate, torch.sigmoid(logits))
    return dlogits


def _before_activation(dh: Tensor, hidden: Tensor, params: BlockParams) -> Tensor:
    """Return the gradient of the hidden values before their activation, (N, K), by torch's own operators."""
    aten = torch.ops.aten
    if params.activation != "silu":
        dhidden: Tensor = aten.threshold_backward(dh, hidden, 0)
    elif torch.is_grad_enabled():
        # torch has no derivative of silu_backward.
        s = torch.sigmoid(hidden)
        dhidden = dh * (s * (1 + hidden * (1 - s)))
    else:
        dhidden = aten.silu_backward(dh, hidden)
    return dhidden


# ------------------------------------------------------------------------------------------------------------ natively
def _is_alike(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.stride() == other.stride()


def _threads(y: Tensor) -> int:
    return max(1, min(torch.get_num_threads(), y.numel() // _LEAST_PER_THREAD))


def _at(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def native_shape(y: Tensor, params: BlockParams | str, norm: Norm | None = None) -> bytes:
    """Return the packed sizes and settings for the native code, with the current number of torch threads.

    Args:
        y: (N, C, H, W).
        params: of the block, or the activation of a pass without one, one of `POST_ACTIVATIONS`.
        norm: the BatchNorm before it, or None.
    """
    n, c, h, w = y.shape
    before, eps = (0, 0.0) if norm is None else (PRE_ACTIVATIONS.index(norm.activation), norm.eps)
    laid, threads = not y.is_contiguous(), _threads(y)
    shape: bytes
    if isinstance(params, str):
        behind = POST_ACTIVATIONS.index(params)
        shape = _native.shape(n, c, h * w, 0, laid, False, before, behind, 0, 0, threads, 1.0, 0.0, eps)
        return shape
    shape = _native.shape(
        n,
        c,
        h * w,
        params.w1.shape[0],
        laid,
        True,
        PRE_ACTIVATIONS.index("relu") if params.relu_in else before,
        POST_ACTIVATIONS.index("relu" if params.relu_out else ""),
        ACTIVATIONS.index(params.activation),
        GATES.index(params.gate),
        threads,
        params.scale,
        params.offset,
        eps,
    )
    return shape


def native_squeezed(y: Tensor, norm: Norm | None = None) -> Tensor:
    """Return the mean of a feature map by the native code, without gradients: (N, C, H, W) → (N, C).

    Args:
        y: (N, C, H, W), for which `activated_refuses` has returned an empty string.
        norm: the BatchNorm before it, or None; `norm_refuses` must have returned an empty string.
    """
    means = y.new_empty(y.shape[:2])
    statistics = (None,) * 4 if norm is None else norm[:4]
    _native.squeezed(_scale_shape(y, norm), *(_at(one) for one in (*statistics, y, means)))
    return means


def native_scaled(y: Tensor, gates: Tensor, norm: Norm | None = None, *, in_place: bool = False) -> Tensor:
    """Return each channel times its gate by the native code, without gradients: (N, C, H, W) → (N, C, H, W).

    Args:
        y: as in `native_squeezed`.
        gates: (N, C), of the dtype of y and contiguous.
        norm: as in `native_squeezed`.
        in_place: whether the result reuses y's memory.
    """
    out = y if in_place else torch.empty_like(y)
    statistics = (None,) * 4 if norm is None else norm[:4]
    _native.scaled(_scale_shape(y, norm), *(_at(one) for one in (*statistics, y, None, gates, out)))
    return out


def _scale_shape(y: Tensor, norm: Norm | None) -> bytes:
    n, c, h, w = y.shape
    before, eps = (0, 0.0) if norm is None else (PRE_ACTIVATIONS.index(norm.activation), norm.eps)
    laid = not y.is_contiguous()
    shape: bytes = _native.shape(n, c, h * w, 0, laid, True, before, 0, 0, 0, _threads(y), 1.0, 0.0, eps)
    return shape


def native_call(**facts: Any) -> Any:
    """Return the native object behind `selab.kernels.dispatch.cached_call`."""
    return _native.CachedCall(**facts)


def _run_native(
    y: Tensor,
    shortcut: Tensor | None,
    params: BlockParams | str,
    out: Tensor,
    kept: Tensor | None,
    norm: Norm | None = None,
) -> None:
    """Write `out` and, unless None, `kept`."""
    layers = (None,) * 4 if isinstance(params, str) else params[:4]
    statistics = (None,) * 4 if norm is None else norm[:4]
    _native.gated(native_shape(y, params, norm), *(_at(one) for one in (*layers, *statistics, y, shortcut, out, kept)))


def _native_backward(
    dout: Tensor, out: Tensor | None, y: Tensor, params: BlockParams, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dy = torch.empty_like(y)
    dz = dout if out is None else torch.empty_like(y)
    hidden, channels = params.w1.shape
    dlogits, dhidden = y.new_empty(y.shape[0], channels), y.new_empty(y.shape[0], hidden)
    _native.gated_backward(
        native_shape(y, params),
        params.w1.data_ptr(),
        params.w2.data_ptr(),
        dout.data_ptr(),
        _at(out),
        y.data_ptr(),
        kept.data_ptr(),
        0 if out is None else dz.data_ptr(),
        dy.data_ptr(),
        dlogits.data_ptr(),
        dhidden.data_ptr(),
    )
    return dy, dz, dlogits, dhidden
