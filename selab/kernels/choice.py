"""Which implementation of an SE block runs for a map, and why not a faster one."""

from typing import Literal

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
    if compiling or not x.is_cpu or impl == "operator":
        reason = _operator_refuses(x, impl)
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
    native = impl == "native"
    if records_gradients(x, shortcut, *formula[:4]):
        joined: Tensor = cpu.Gated.apply(x, shortcut, *formula[:4], formula, native)  # type: ignore[no-untyped-call]
        return joined
    return cpu.infer(x, shortcut, formula, native=native, in_place=owns_input)


def _operator_refuses(x: Tensor, impl: Impl) -> str:
    """Why the operator cannot run, or does not pay."""
    if not x.is_cuda and impl != "operator":
        return "on a CPU the compiler makes as much of the reference"
    # Loading it registers the operator, and only those load it who use it.
    from selab.kernels import operators

    reason: str = operators.gpu_reason() if x.is_cuda else ""
    return reason


def hooked(*parts: nn.Module) -> bool:
    """Whether a hook waits for any of these modules to run."""
    everywhere = nn.modules.module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        return True
    return any(part._forward_hooks or part._forward_pre_hooks or part._backward_hooks for part in parts)


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
