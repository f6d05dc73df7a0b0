"""Which implementation of an SE block runs for a map, and why not a faster one."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from selab.kernels import cpu
from selab.kernels.cpu import Formula

Impl = Literal["auto", "reference", "torch", "native", "operator"]
IMPLS: tuple[Impl, ...] = ("auto", "reference", "torch", "native", "operator")


def choose(impl: Impl, x: Tensor, shortcut: Tensor | None, formula: Formula) -> tuple[Impl, str]:
    """What runs where `impl` is asked for, and why not a faster one (empty if there is none).

    Args:
        impl: `auto`, or one in particular; then `reference` with a reason says that it cannot run.
        x: (N, C, H, W).
        shortcut: of the join behind the block, or None.
        formula: of the block.
    """
    if impl == "reference":
        return "reference", "asked for"
    compiling = torch.compiler.is_compiling()
    reason = "" if compiling else unusual(x)
    if reason:
        return "reference", reason
    if compiling and x.is_cpu and impl in ("auto", "torch"):
        return "torch", "the compiler makes the loops"
    if compiling or not x.is_cpu or impl == "operator":
        reason = _operator_refuses(x, shortcut, formula)
        return ("reference", reason) if reason else ("operator", "")
    if impl == "torch":
        return "torch", "asked for"
    reason = cpu.native_refuses(x, shortcut, formula)
    if reason and impl == "native":
        return "reference", reason
    return ("torch", reason) if reason else ("native", "")


def run(impl: Impl, x: Tensor, shortcut: Tensor | None, formula: Formula, *, owns_input: bool) -> Tensor:
    """The block by an implementation that `choose` named, the reference excepted: (N, C, H, W) → (N, C, H, W).

    Args:
        impl: `torch`, `native` or `operator`.
        x: (N, C, H, W).
        shortcut: of the join behind the block, or None.
        formula: of the block.
        owns_input: whether the output may take x's place where no gradient is recorded.
    """
    if impl == "operator":
        out: Tensor = torch.ops.selab.gated(x, shortcut, *formula[:10])[0]
        return out
    if torch.compiler.is_compiling():
        return cpu.expressed(x, shortcut, formula)
    native = impl == "native"
    if records_gradients(x, shortcut, *formula[:4]):
        joined: Tensor = cpu.Gated.apply(x, shortcut, *formula[:4], formula, native)  # type: ignore[no-untyped-call]
        return joined
    return cpu.infer(x, shortcut, formula, native=native, in_place=owns_input)


Repeat = Callable[[Tensor, Tensor | None], Tensor | None]


def repeat(
    x: Tensor,
    shortcut: Tensor | None,
    formula: Formula,
    layers: tuple[nn.Module, nn.Module],
    owners: tuple[nn.Module, ...],
    *,
    owns_input: bool,
) -> Repeat:
    """The native block in inference once more, for maps like these: what has not changed is not decided again.

    Between two convolutions a cache has forgotten the interpreter's data, and every object that a decision looks at
    costs about as much as a row of the map. The function returns None as soon as anything is not as it was; then
    `choose` decides anew.

    Args:
        x: (N, C, H, W), that the native code has just been chosen for.
        shortcut: likewise, or None.
        formula: of the block.
        layers: the modules that hold its weights.
        owners: modules whose children must stay the same and have no hooks.
        owns_input: whether the output may take x's place.
    """
    shape, stride, joined = x.shape, x.stride(), shortcut is not None
    children = tuple((owner._modules, tuple(owner._modules.values())) for owner in owners)
    watched = [module for _, modules in children for module in modules if module is not None]
    hooks = (*_EVERYWHERE, *(hooks for module in watched for hooks in _hooks(module)))
    one, two = (layer._parameters for layer in layers)
    w1, b1, w2, b2 = one["weight"], one["bias"], two["weight"], two["bias"]
    assert w1 is not None
    assert w2 is not None
    size, threads, facts = w1.numel(), torch.get_num_threads(), cpu.native_shape(x, formula)
    run, plain, empty_like, single = cpu.native_gated(), _is_plain_eager, torch.empty_like, torch.float32
    count = torch.get_num_threads

    def again(y: Tensor, r: Tensor | None) -> Tensor | None:
        if any(hooks) or not plain() or type(y) is not Tensor or count() != threads:
            return None
        if y.shape != shape or y.stride() != stride or y.dtype is not single or not y.is_cpu:
            return None
        if joined and (r is None or r.shape != shape or r.stride() != stride or r.dtype is not single):
            return None
        if one["weight"] is not w1 or two["weight"] is not w2 or one["bias"] is not b1 or two["bias"] is not b2:
            return None
        if w1.dtype is not single or w2.dtype is not single or w1.numel() != size or w2.numel() != size:
            return None
        for modules, before in children:
            if tuple(modules.values()) != before:
                return None
        out = y if owns_input else empty_like(y)
        run(
            facts,
            w1.data_ptr(),
            0 if b1 is None else b1.data_ptr(),
            w2.data_ptr(),
            0 if b2 is None else b2.data_ptr(),
            y.data_ptr(),
            0 if r is None else r.data_ptr(),
            out.data_ptr(),
            0,
        )
        return out

    return again


def _is_plain_eager() -> bool:
    """Whether operations run one by one, unobserved, in their own dtypes, and without gradients."""
    return not (
        torch.is_grad_enabled()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._is_tracing()
        or torch._C._is_any_autocast_enabled()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


_EVERYWHERE = (nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks)


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks


def _operator_refuses(x: Tensor, shortcut: Tensor | None, formula: Formula) -> str:
    """Why the operator cannot run, or does not pay."""
    # Loading it registers the operator, and only those load it who use it.
    from selab.kernels import operators

    reason = operators.gpu_reason() if x.is_cuda else ""
    return reason or operators.refuses(x, shortcut, *formula[:6])


def hooked(*parts: nn.Module) -> bool:
    """Whether a hook waits for any of these modules to run."""
    return any(_EVERYWHERE) or any(any(_hooks(part)) for part in parts)


def unusual(x: Tensor) -> str:
    """Why a map can only be given to torch's own operations; empty for a plain one on a CPU or a GPU."""
    if type(x) is not Tensor:
        return f"the map is a {type(x).__name__}"
    if not (x.is_cpu or x.is_cuda):
        return f"the map is on device {x.device.type!r}"
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return "a mode looks at every operation"
    if torch._C._is_tracing() or torch._C._functorch.peek_interpreter_stack() is not None:
        return "the network is being traced or transformed"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode gradients are taken"
    if x.is_cpu and torch.is_autocast_enabled("cpu"):
        return "autocast chooses the dtypes"
    if x.is_cpu and x.dtype not in (torch.float32, torch.float64):
        return f"{str(x.dtype).removeprefix('torch.')} on a CPU has the reference alone"
    return ""


def records_gradients(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is done with these."""
    return torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in tensors)
