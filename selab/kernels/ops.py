"""Register torch operators for an SE block with its residual join, and for its backward pass.

`torch.ops.selab.gated` is relu(shortcut + m * (scale * gate(fc2(act(fc1(mean(m))))) + offset)), m being relu(y) or y.
torch.compile, export and autocast see it as one operator, and `torch.ops.selab.gated_backward` as another; autocast
does not cast their inputs. `torch.ops.selab.add_relu` is the join of a block without SE, relu(branch + shortcut) in one
pass, for the networks that SE is compared with. On a CPU they run torch operations (`selab.kernels.cpu`); on CUDA they
are Triton kernels (`selab.kernels.triton`), imported on first use. fp64 is computed in fp64; other types are computed
in fp32 and rounded once, whatever types the weights have.

Passes over the feature maps on CUDA. Forward: y is read for the squeeze and once more in the join, where the shortcut
is read and out is written. Backward: the first pass reads dout, out and y, writes dz and adds up the gate's gradient;
the second reads dz and writes dy. Without a ReLU at the end there is no out to read and dz is dout; with one at the
beginning the second pass reads y as well; where the shortcut needs no gradient, dz is not written and the second pass
reads dout and out. Saved for the backward pass are y, and out if a ReLU ends the block: the maps that the separate
operators would save too.

Importing this module registers the operators.
"""

import functools
import importlib.util
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from selab.errors import DeviceError, ModelError
from selab.kernels import cpu, memory_format

_FORWARD, _BACKWARD, _JOIN = "selab::gated", "selab::gated_backward", "selab::add_relu"
_GPU_TYPES = (torch.float32, torch.bfloat16, torch.float16)
# The GPU's excitation keeps all hidden units of some images in registers.
_WIDEST = 512
torch.library.define(
    _FORWARD,
    "(Tensor y, Tensor? shortcut, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, str activation, str gate, float scale, "
    "float offset, bool relu_in, bool relu_out) -> (Tensor out, Tensor squeezed, Tensor hidden, Tensor logits)",
)
torch.library.define(
    _BACKWARD,
    "(Tensor dout, Tensor y, Tensor? out, Tensor w1, Tensor w2, Tensor squeezed, Tensor hidden, Tensor logits, "
    "str activation, str gate, float scale, float offset, bool relu_in, bool[6] needs) -> "
    "(Tensor dy, Tensor dshortcut, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2)",
)
torch.library.define(_JOIN, "(Tensor branch, Tensor shortcut) -> Tensor")

_HAS_TRITON = importlib.util.find_spec("triton") is not None


def gpu_reason() -> str:
    """Return why the Triton kernels cannot run on the current CUDA device; empty if they can.

    torch.compile can trace it.
    """
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    return _why_not(device.major, device.minor)


def _why_not(major: int, minor: int) -> str:
    if torch.version.hip is not None:
        return "the kernels are not tested on ROCm builds of torch"
    if not _HAS_TRITON:
        return "triton is not installed; pip install triton"
    if major < 7:
        return f"the device has compute capability {major}.{minor}, Triton needs 7.0"
    return ""


def refuses(
    y: Tensor,
    shortcut: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    gate: str,
) -> str:
    """Return why `selab::gated` does not support these arguments; empty if it does."""
    for what, word, allowed in (("activation", activation, cpu.ACTIVATIONS), ("gate", gate, cpu.GATES)):
        if word not in allowed:
            return f"{what} {word!r}: allowed: {', '.join(allowed)}"
    types = _GPU_TYPES if y.is_cuda else (*_GPU_TYPES, torch.float64)
    if y.dim() != 4 or y.dtype not in types:
        return f"y is {_shown(y)}: it must be (N, C, H, W) and of {', '.join(map(_plain, types))}"
    if shortcut is not None and (shortcut.shape != y.shape or shortcut.dtype != y.dtype or shortcut.device != y.device):
        return f"shortcut is {_shown(shortcut)}, y is {_shown(y)}: they must match"
    return _refuses_weights(y, w1, b1, w2, b2) or (_gpu_refuses(y, w1) if y.is_cuda else "")


def _refuses_weights(y: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> str:
    channels, hidden = y.shape[1], w1.shape[0]
    for name, tensor, shape, kind in (
        ("w1", w1, (hidden, channels), w1.dtype),
        ("b1", b1, (hidden,), w1.dtype),
        ("w2", w2, (channels, hidden), w2.dtype),
        ("b2", b2, (channels,), w2.dtype),
    ):
        if tensor is not None and (tensor.shape != shape or tensor.dtype != kind or tensor.device != y.device):
            return f"{name} is {_shown(tensor)}: it must be {shape} of {_plain(kind)} on {y.device}"
    return ""


def _gpu_refuses(y: Tensor, w1: Tensor) -> str:
    if w1.shape[0] > _WIDEST:
        return f"squeeze width {w1.shape[0]}: the GPU kernels take up to {_WIDEST}"
    if y.shape[1] * y.shape[2] * y.shape[3] >= 2**31:
        return f"y is {_shown(y)}: one image must have fewer than 2^31 elements"
    return "y has no elements" if y.numel() == 0 else ""


def _shown(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} of {_plain(tensor.dtype)} on {tensor.device}"


def _plain(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")


def _check(*arguments: Any) -> None:
    reason = refuses(*arguments[:8])
    if reason:
        raise ModelError(f"{_FORWARD}: {reason}; otherwise use the block's separate operators")


@functools.cache
def _gpu() -> ModuleType:
    reason = gpu_reason()
    if reason:
        raise DeviceError(f"{_FORWARD} on CUDA: {reason}; otherwise use the block's separate operators")
    from selab.kernels import triton

    return triton


@torch.library.impl(_FORWARD, "CPU")
def _forward_cpu(*arguments: Any) -> tuple[Tensor, ...]:
    _check(*arguments)
    y, shortcut, *rest = arguments
    wide = torch.promote_types(y.dtype, torch.float32)
    params = _widened(cpu.BlockParams(*rest), wide)
    joined = None if shortcut is None else memory_format.laid_out(shortcut, y).to(wide)
    with _without_autocast(y):
        out, kept = cpu.forward(memory_format.laid_out(y, y).to(wide), joined, params, native=False)
    hidden, channels = params.w1.shape
    parts = torch.split(kept, [channels, hidden, channels], 1)
    return memory_format.stored(out, y), *(part.clone(memory_format=torch.contiguous_format) for part in parts)


@torch.library.impl(_FORWARD, "CUDA")
def _forward_cuda(*arguments: Any) -> tuple[Tensor, ...]:
    _check(*arguments)
    y, shortcut, *rest = arguments
    outputs: tuple[Tensor, ...] = _gpu().forward(y, shortcut, cpu.BlockParams(*rest))
    return outputs


@torch.library.register_fake(_FORWARD)  # type: ignore[untyped-decorator]
def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    _check(*arguments)
    y, _, w1, *_ = arguments
    images, channels = y.shape[:2]
    wide = torch.promote_types(y.dtype, torch.float32)
    sizes = ((images, channels), (images, w1.shape[0]), (images, channels))
    return memory_format.empty_map(y), *(y.new_empty(size, dtype=wide) for size in sizes)


@torch.library.impl(_BACKWARD, "CPU")
def _backward_cpu(*arguments: Any) -> tuple[Tensor, ...]:
    with _without_autocast(arguments[0]):
        return _backward(_maps_by_torch, _BackwardArguments(*arguments))


@torch.library.impl(_BACKWARD, "CUDA")
def _backward_cuda(*arguments: Any) -> tuple[Tensor, ...]:
    with _without_autocast(arguments[0]):
        return _backward(_gpu().backward, _BackwardArguments(*arguments))


def _without_autocast(y: Tensor) -> torch.autocast:
    """Return a context without autocast: the operators choose their own types."""
    return torch.autocast(y.device.type, enabled=False)


class _BackwardArguments(NamedTuple):
    """The arguments of the backward operator, in the order of its schema."""

    dout: Tensor
    y: Tensor
    out: Tensor | None
    w1: Tensor
    w2: Tensor
    squeezed: Tensor
    hidden: Tensor
    logits: Tensor
    activation: str
    gate: str
    scale: float
    offset: float
    relu_in: bool
    needs: Sequence[bool]


def _backward(
    maps: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]], given: _BackwardArguments
) -> tuple[Tensor, ...]:
    """Return all gradients: `maps` computes those of feature maps, hidden values and logits."""
    dout, y, out, w1, w2, squeezed, hidden, logits, activation, gate, scale, offset, relu_in, needs = given
    needs = _made(needs, out)
    params = cpu.BlockParams(w1, None, w2, None, activation, gate, scale, offset, relu_in, out is not None)
    dy, dz, dlogits, dhidden = maps(dout, out, y, params, (squeezed, hidden, logits), needs)
    activate = F.silu if activation == "silu" else F.relu
    return _where(
        needs,
        lambda: dy,
        lambda: dz,
        lambda: torch.mm(dhidden.t(), squeezed).to(w1.dtype),
        lambda: dhidden.sum(0).to(w1.dtype),
        lambda: torch.mm(dlogits.t(), activate(hidden)).to(w2.dtype),
        lambda: dlogits.sum(0).to(w2.dtype),
        like=y,
    )


def _maps_by_torch(
    dout: Tensor, out: Tensor | None, y: Tensor, params: cpu.BlockParams, kept: Sequence[Tensor], needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run `cpu.backward` in fp32 or fp64; return the gradients of y, of the shortcut, of logits and hidden values."""
    wide = kept[0].dtype
    cut = None if out is None else memory_format.laid_out(out, y).to(wide)
    maps = memory_format.laid_out(dout, y).to(wide), cut, memory_format.laid_out(y, y).to(wide)
    dy, dz, dlogits, dhidden = cpu.backward(*maps, _widened(params, wide), torch.cat(tuple(kept), 1), native=False)
    return memory_format.stored(dy, y), memory_format.stored(dz, y) if needs[1] else dz, dlogits, dhidden


@torch.library.register_fake(_BACKWARD)  # type: ignore[untyped-decorator]
def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    _, y, out, w1, w2, *_, needs = arguments
    return _where(
        _made(needs, out),
        lambda: memory_format.empty_map(y),
        lambda: memory_format.empty_map(y),
        lambda: w1.new_empty(w1.shape),
        lambda: w1.new_empty(w1.shape[0]),
        lambda: w2.new_empty(w2.shape),
        lambda: w2.new_empty(w2.shape[0]),
        like=y,
    )


def _made(needs: Sequence[bool], out: Tensor | None) -> list[bool]:
    """Return which gradients the operator computes: without a final ReLU, the shortcut's is dout itself."""
    return [needs[0], needs[1] and out is not None, *needs[2:]]


def _where(needs: Sequence[bool], *make: Callable[[], Tensor], like: Tensor) -> tuple[Tensor, ...]:
    """Return the needed tensors, and an empty one in place of each other."""
    return tuple(one() if need else like.new_empty(0) for one, need in zip(make, needs, strict=True))


def _widened(params: cpu.BlockParams, dtype: torch.dtype) -> cpu.BlockParams:
    b1, b2 = (None if one is None else one.to(dtype) for one in (params.b1, params.b2))
    return params._replace(w1=params.w1.to(dtype), b1=b1, w2=params.w2.to(dtype), b2=b2)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    y, _, w1, b1, w2, b2, *ctx.settings, relu_out = inputs
    out, squeezed, hidden, logits = output
    ctx.save_for_backward(y, out if relu_out else None, w1, b1, w2, b2, squeezed, hidden, logits)
    ctx.mark_non_differentiable(squeezed, hidden, logits)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dout: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    settings = (None,) * 6
    if dout is None:
        return (None,) * 6 + settings
    y, out, w1, b1, w2, b2, *saved = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:6])
    if torch.is_grad_enabled():
        # For second derivatives, by operations that autograd records.
        activation, gate, scale, offset, relu_in = ctx.settings
        params = cpu.BlockParams(w1, b1, w2, b2, activation, gate, scale, offset, relu_in, out is not None)
        made = _recorded(dout, out, y, params)
    else:
        made = torch.ops.selab.gated_backward(dout, y, out, w1, w2, *saved, *ctx.settings, needs)
    gradients = [one if need else None for one, need in zip(made, needs, strict=True)]
    if needs[1] and out is None:
        gradients[1] = dout
    return (*gradients, *settings)


def _recorded(dout: Tensor, out: Tensor | None, y: Tensor, params: cpu.BlockParams) -> tuple[Tensor | None, ...]:
    """Return the gradients of y, of the shortcut and of the layers, in fp32 or fp64."""
    wide = torch.promote_types(y.dtype, torch.float32)
    widened = _widened(params, wide)
    with _without_autocast(y):
        maps = dout.to(wide), None if out is None else out.to(wide), y.to(wide)
        kept = cpu.between(maps[2], widened)
        dy, dz, dlogits, dhidden = cpu.backward(*maps, widened, kept, native=False)
        layers = cpu.layer_gradients(widened, kept, dlogits, dhidden)
    typed = (
        None if gradient is None or layer is None else gradient.to(layer.dtype)
        for gradient, layer in zip(layers, params[:4], strict=True)
    )
    return dy.to(y.dtype), dz.to(y.dtype), *typed


def _no_second_derivative(*_: Any) -> None:
    raise ModelError(
        f"{_BACKWARD}: has no derivative of its own; use the block's separate operators for second derivatives"
    )


torch.library.register_autograd(_FORWARD, _gradients, setup_context=_setup)
torch.library.register_autograd(_BACKWARD, _no_second_derivative)


# ----------------------------------------------------------------------------------------------- a join without a block
def refuses_join(branch: Tensor, shortcut: Tensor) -> str:
    """Return why `selab::add_relu` does not support these tensors on a GPU; empty if it does."""
    if branch.dim() != 4 or branch.dtype not in _GPU_TYPES or branch.numel() == 0:
        return f"branch is {_shown(branch)}: it must be (N, C, H, W) and of {', '.join(map(_plain, _GPU_TYPES))}"
    if shortcut.shape != branch.shape or shortcut.dtype != branch.dtype or shortcut.device != branch.device:
        return f"shortcut is {_shown(shortcut)}, branch is {_shown(branch)}: they must match"
    return gpu_reason()


@torch.library.impl(_JOIN, "CPU")
def _join_cpu(branch: Tensor, shortcut: Tensor) -> Tensor:
    return memory_format.stored(torch.relu(branch + shortcut), branch)


@torch.library.impl(_JOIN, "CUDA")
def _join_cuda(branch: Tensor, shortcut: Tensor) -> Tensor:
    out: Tensor = _gpu().add_relu(branch, shortcut)
    return out


@torch.library.register_fake(_JOIN)  # type: ignore[untyped-decorator]
def _join_fake(branch: Tensor, _shortcut: Tensor) -> Tensor:
    return memory_format.empty_map(branch)


def _setup_join(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG001 - torch's names
    ctx.save_for_backward(output)


def _gradients_join(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
    (out,) = ctx.saved_tensors
    dz = torch.ops.aten.threshold_backward(dout, out, 0)
    return dz, dz


torch.library.register_autograd(_JOIN, _gradients_join, setup_context=_setup_join)
