"""Which implementation of an SE block runs for a map, and why not a faster one."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from selab.kernels import cpu
from selab.kernels.cpu import BlockParams, Norm

Impl = Literal["auto", "reference", "torch", "native", "operator"]
IMPLS: tuple[Impl, ...] = ("auto", "reference", "torch", "native", "operator")


def choose(impl: Impl, x: Tensor, shortcut: Tensor | None, params: BlockParams) -> tuple[Impl, str]:
    """What runs where `impl` is asked for, and why not a faster one (empty if there is none).

    Args:
        impl: `auto`, or one in particular; then `reference` with a reason says that it cannot run.
        x: (N, C, H, W).
        shortcut: of the join behind the block, or None.
        params: of the block.
    """
    if impl == "reference":
        return "reference", "asked for"
    compiling = torch.compiler.is_compiling()
    reason = "" if compiling else needs_reference(x)
    if reason:
        return "reference", reason
    if compiling and x.is_cpu and impl in ("auto", "torch"):
        return "torch", "the compiler makes the loops"
    if compiling or not x.is_cpu or impl == "operator":
        reason = _operator_refuses(x, shortcut, params)
        return ("reference", reason) if reason else ("operator", "")
    if impl == "torch":
        return "torch", "asked for"
    reason = cpu.native_refuses(x, shortcut, params)
    if reason and impl == "native":
        return "reference", reason
    return ("torch", reason) if reason else ("native", "")


def run(
    impl: Impl,
    x: Tensor,
    shortcut: Tensor | None,
    params: BlockParams,
    *,
    can_overwrite: bool,
    norm: Norm | None = None,
) -> Tensor:
    """The block by an implementation that `choose` named, the reference excepted: (N, C, H, W) → (N, C, H, W).

    Args:
        impl: `torch`, `native` or `operator`.
        x: (N, C, H, W).
        shortcut: of the join behind the block, or None.
        params: of the block.
        can_overwrite: whether the output may take x's place where no gradient is recorded.
        norm: what x waits for, where `native` runs without gradients.
    """
    if impl == "operator":
        out: Tensor = torch.ops.selab.gated(x, shortcut, *params[:10])[0]
        return out
    if torch.compiler.is_compiling():
        return cpu.expressed(x, shortcut, params)
    native = impl == "native"
    if records_gradients(x, shortcut, *params[:4]):
        joined: Tensor = cpu.Gated.apply(x, shortcut, *params[:4], params, native)  # type: ignore[no-untyped-call]
        return joined
    return cpu.infer(x, shortcut, params, native=native, in_place=can_overwrite, norm=norm)


CachedCall = Callable[[Tensor, Tensor | None], Tensor | None]


class CachedDispatch:
    """A module that keeps in `_cached_call` what it did the last time (`repeat`), until one of its attributes changes.

    Attributes:
        can_overwrite: whether nobody else needs the input, so that the output may take its place in inference.
        producers: the modules that return the input, or are given it with it: their hooks may have kept it.
    """

    can_overwrite: bool
    producers: tuple[nn.Module, ...] = ()

    def may_overwrite(self) -> bool:
        """Whether the output may take the input's place now."""
        this: Any = self
        return self.can_overwrite and not has_hooks(this, *self.producers)

    def replay(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor | None:
        """What was done natively the last time, for this map; None if nothing was, or anything has changed since."""
        decided = self.__dict__.get("_cached_call")
        if decided is None or torch.compiler.is_compiling():
            return None
        out: Tensor | None = decided(x, shortcut)
        return out

    def __setattr__(self, name: str, value: Any) -> None:
        """Forgets what was decided before the change."""
        self.__dict__.pop("_cached_call", None)
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        """Without what was decided: a copy has weights of its own."""
        return {name: value for name, value in self.__dict__.items() if name != "_cached_call"}


def cached_call(
    x: Tensor,
    shortcut: Tensor | None,
    params: BlockParams | str,
    owners: tuple[nn.Module, ...],
    *,
    layers: tuple[nn.Module, ...] = (),
    watched: tuple[nn.Module, ...] = (),
    norm: nn.BatchNorm2d | None = None,
    waiting: bool = True,
    can_overwrite: bool,
) -> CachedCall:
    """The native pass in inference once more, for maps like these: what has not changed is not decided again.

    Between two convolutions a cache has forgotten the interpreter's data, and every object that a decision looks at
    costs about as much as a row of the map. The function returns None as soon as anything is not as it was; then
    `choose` decides anew.

    Args:
        x: (N, C, H, W), that the native code has just been chosen for.
        shortcut: likewise, or None.
        params: of the block, or the activation of a pass without one, of `cpu.POST_ACTIVATIONS`.
        owners: modules whose children must stay the same and have no hooks.
        layers: the two modules that hold the block's weights.
        watched: modules that must not have hooks themselves.
        norm: the BatchNorm that x waits for, or None.
        waiting: whether x waits for it; without, it is the BatchNorm itself that computes, its activation with it.
        can_overwrite: whether the output may take x's place.
    """
    if norm is not None:
        owners = (*owners, norm)
    weights: list[object] = [None] * 4
    if layers:
        weights = [_tensor_in(layer._parameters, name) for layer in layers for name in ("weight", "bias")]
    if norm is not None:
        weights += [_tensor_in(norm._parameters, name) for name in ("weight", "bias")]
        weights += [_tensor_in(norm._buffers, name) for name in ("running_mean", "running_var")]
    statistics = None if norm is None else norm_of(norm)
    if statistics is not None and not waiting:
        statistics = statistics._replace(activation="")
    return _make_call(
        x,
        owners,
        shape_bytes=cpu.native_shape(x, params, statistics),
        watched=watched,
        attributes=() if norm is None else ((norm.__dict__, "eps", norm.eps), (norm.__dict__, "training", False)),
        weights=tuple(weights),
        norm=norm if waiting else None,
        kind=None,
        joined=shortcut is not None,
        can_overwrite=can_overwrite,
    )


def norm_of(module: nn.BatchNorm2d) -> Norm | None:
    """What a BatchNorm computes in inference; None for one without statistics of its own, or an unknown activation.

    One with an activation of its own, as timm's, has it as `act`.
    """
    held: dict[str, Any] = {**module._parameters, **module._buffers}
    mean, var = held.get("running_mean"), held.get("running_var")
    act = module._modules.get("act")
    activation = "" if act is None else NORM_ACTIVATIONS.get(type(act))
    if mean is None or var is None or activation is None or not held.keys() >= {"weight", "bias"}:
        return None
    return Norm(held["weight"], held["bias"], mean, var, module.eps, activation)


NORM_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.Identity: "",
    nn.ReLU: "relu",
    nn.Hardswish: "hardswish",
    nn.SiLU: "silu",
}
"""Layers behind a BatchNorm that the native code can compute with it, as `cpu.POST_ACTIVATIONS` calls them."""


def cached_deferral(x: Tensor, norm: nn.BatchNorm2d, watched: tuple[nn.Module, ...], kind: type[Tensor]) -> CachedCall:
    """Marks maps like this one with the BatchNorm that they wait for, and returns them; None as in `repeat`.

    Args:
        x: (N, C, H, W), without gradients.
        norm: in inference.
        watched: modules that must not have hooks themselves.
        kind: the class of a map that waits.
    """
    return _make_call(
        x,
        (norm,),
        shape_bytes=b"",
        watched=watched,
        attributes=((norm.__dict__, "training", False),),
        weights=(),
        norm=norm,
        kind=kind,
        joined=False,
        can_overwrite=True,
    )


def _make_call(
    x: Tensor, owners: tuple[nn.Module, ...], *, watched: tuple[nn.Module, ...], **conditions: Any
) -> CachedCall:
    children = (module for owner in owners for module in owner._modules.values() if module is not None)
    decision: CachedCall = cpu.native_call(
        flags=_FLAGS,
        hooks=(*_EVERYWHERE, *(hooks for module in (*children, *watched) for hooks in _hooks(module))),
        children=tuple((owner._modules, tuple(owner._modules.values())) for owner in owners),
        tensor=Tensor,
        dtype=torch.float32,
        size=x.shape,
        stride=x.stride(),
        levels=vars(torch.autograd.forward_ad),
        count=torch.get_num_threads,
        threads=torch.get_num_threads(),
        empty_like=torch.empty_like,
        **conditions,
    )
    return decision


def _tensor_in(held: Mapping[str, Tensor | None], name: str) -> tuple[object, str, Tensor | None, int]:
    found = held[name]
    return held, name, found, 0 if found is None else found.numel()


# Each says, by anything but zero or None, that operations do not run one by one, unobserved, in their own dtypes and
# without gradients. Forward-mode gradients have a level instead.
_FLAGS = (
    torch.is_grad_enabled,
    torch._C._len_torch_dispatch_stack,
    torch._C._len_torch_function_stack,
    torch._C._is_tracing,
    torch._C._is_any_autocast_enabled,
    torch._C._functorch.peek_interpreter_stack,
)
_EVERYWHERE = (nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks)


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks


def _operator_refuses(x: Tensor, shortcut: Tensor | None, params: BlockParams) -> str:
    """Why the operator cannot run, or does not pay."""
    # Loading it registers the operator, and only those load it who use it.
    from selab.kernels import ops

    reason = ops.gpu_reason() if x.is_cuda else ""
    return reason or ops.refuses(x, shortcut, *params[:6])


def has_hooks(*parts: nn.Module) -> bool:
    """Whether a hook waits for any of these modules to run."""
    return any(_EVERYWHERE) or any(any(_hooks(part)) for part in parts)


def needs_reference(x: Tensor) -> str:
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
