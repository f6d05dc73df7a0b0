"""Choose the implementation of an SE block for a feature map, and give the reason against a faster one."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from selab.kernels import cpu
from selab.kernels.cpu import BlockParams, Norm
from selab.kernels.ownership import Arrival, Claim, Route, is_exclusive, native_owner

Impl = Literal["auto", "reference", "torch", "native", "operator"]
IMPLS: tuple[Impl, ...] = ("auto", "reference", "torch", "native", "operator")


def choose(impl: Impl, x: Tensor, shortcut: Tensor | None, params: BlockParams) -> tuple[Impl, str]:
    """Return the implementation that runs, and the reason against a faster one (empty if there is none).

    Args:
        impl: `auto`, or the one requested; if that one cannot run, the answer is `reference` and the reason.
        x: (N, C, H, W).
        shortcut: the summand of the residual join after the block, (N, C, H, W), or None.
        params: of the block.
    """
    if impl == "reference":
        return "reference", "requested"
    if impl == "auto" and torch.compiler.is_exporting():
        # Quantisers, partitioners and other runtimes know the layers, not the compiler's loops.
        return "reference", "an exported program has the layers themselves"
    compiling = torch.compiler.is_compiling()
    reason = "" if compiling else needs_reference(x)
    if reason:
        return "reference", reason
    if x.dim() != 4:
        return "reference", "the feature map is not (N, C, H, W)"
    if compiling and x.is_cpu and impl in ("auto", "torch"):
        return "torch", "the compiler generates the loops"
    if compiling or not x.is_cpu or impl == "operator":
        reason = _operator_refuses(x, shortcut, params)
        return ("reference", reason) if reason else ("operator", "")
    if impl == "torch":
        return "torch", "requested"
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
    """Run a block by the implementation that `choose` returned, except for the reference.

    Args:
        impl: `torch`, `native` or `operator`.
        x: (N, C, H, W).
        shortcut: the summand of the residual join after the block, (N, C, H, W), or None.
        params: of the block.
        can_overwrite: whether the output may reuse x's memory where no gradient is recorded.
        norm: the deferred BatchNorm of x; only with `native`, without gradients.

    Returns:
        (N, C, H, W).
    """
    if impl == "operator":
        out: Tensor = torch.ops.selab.gated(x, shortcut, *params[:10])[0]
        return out
    if torch.compiler.is_compiling():
        return cpu.compilable(x, shortcut, params)
    native = impl == "native"
    if records_gradients(x, shortcut, *params[:4]):
        joined: Tensor = cpu.Gated.apply(x, shortcut, *params[:4], params, native)  # type: ignore[no-untyped-call]
        return joined
    return cpu.infer(x, shortcut, params, native=native, in_place=can_overwrite, norm=norm)


# ------------------------------------------------------------------------------------------------ cached decisions
CachedCall = Callable[[Tensor, Tensor | None, int], Tensor | None]


class CachedDispatch:
    """A module that caches its last native call and replays it until one of its attributes changes.

    Attributes:
        can_overwrite: whether no other module needs the input, so that the output may reuse its memory at inference.
        guarded: whether each call must prove that first, by `selab.kernels.ownership`; as `selab.fuse` sets it.
    """

    can_overwrite: bool
    guarded: bool = False

    def may_overwrite(self, x: Tensor, arrival: Arrival | None, *, pending: bool = False) -> bool:
        """Return whether the output may reuse the input's memory now.

        Args:
            x: the input.
            arrival: the call.
            pending: whether a deferred module has proved already that nothing else holds x.
        """
        this: Any = self
        if not self.can_overwrite or has_hooks(this):
            return False
        if pending or not self.guarded:
            return True
        return arrival is not None and is_exclusive(x, arrival.references, arrival.claim())

    def remember(self, call: CachedCall, *, join: nn.Module | None = None) -> None:
        """Cache a call; `join` is the module whose work it includes."""
        self.__dict__["_cached_call"] = (join, call)

    def replay(
        self, x: Tensor, shortcut: Tensor | None = None, *, join: nn.Module | None = None, references: int = 0
    ) -> Tensor | None:
        """Return the output of the cached call; None without one, or if anything has changed since.

        Args:
            x: (N, C, H, W).
            shortcut: (N, C, H, W) or None.
            join: as in `remember`.
            references: `sys.getrefcount(x)` at the start of `forward`.
        """
        # Written out, as everything on this path: between two convolutions every attribute of a module is a cache miss.
        cached = self.__dict__.get("_cached_call")
        if cached is None or cached[0] is not join or torch.compiler.is_compiling():
            return None
        out: Tensor | None = cached[1](x, shortcut, references)
        return out

    def __setattr__(self, name: str, value: Any) -> None:
        """Discard the cached call with every change."""
        self.__dict__.pop("_cached_call", None)
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the cached call out: a copy has weights of its own."""
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
    deferred: bool = True,
    relu: nn.Module | None = None,
    can_overwrite: bool,
    arrival: Arrival | None = None,
) -> CachedCall:
    """Return a function that repeats the native call at inference until an input property changes.

    It skips the decision: between two convolutions the interpreter's data have left the cache, and every object that a
    decision looks at costs about as much as a row of the feature map. It returns None as soon as anything differs.

    Args:
        x: (N, C, H, W), for which the native code was chosen.
        shortcut: (N, C, H, W) or None.
        params: of the block, or the activation of a pass without one, one of `cpu.POST_ACTIVATIONS`.
        owners: modules whose children must stay the same and have no hooks.
        layers: the two modules that hold the block's weights.
        watched: modules that must have no hooks themselves.
        norm: the BatchNorm to apply first, or None.
        deferred: whether x must be marked with `norm`; otherwise the call is the BatchNorm's own, and `params` is its
            activation.
        relu: the deferred ReLU of x, or None.
        can_overwrite: whether the output may reuse x's memory.
        arrival: the call, which must prove again that nothing else holds x; None if that is not needed.
    """
    claimed = arrival.claim() if arrival is not None and can_overwrite else None
    if norm is not None:
        owners = (*owners, norm)
    weights: list[object] = [None] * 4
    if layers:
        weights = [_tensor_in(layer._parameters, name) for layer in layers for name in ("weight", "bias")]
    if norm is not None:
        weights += [_tensor_in(norm._parameters, name) for name in ("weight", "bias")]
        weights += [_tensor_in(norm._buffers, name) for name in ("running_mean", "running_var")]
    # A layer with a forward of its own (...: none) must be called.
    attributes: list[tuple[dict[str, Any], str, object]] = [(layer.__dict__, "forward", ...) for layer in layers]
    if norm is not None:
        attributes += [(norm.__dict__, "eps", norm.eps), (norm.__dict__, "training", False)]
    statistics = None if norm is None else norm_of(norm)
    if statistics is not None and not deferred:
        statistics = statistics._replace(activation="")
    return _new_call(
        x,
        owners,
        shape_bytes=cpu.native_shape(x, params, statistics),
        watched=watched,
        attributes=tuple(attributes),
        weights=tuple(weights),
        norm=norm if deferred else None,
        relu=relu,
        mark=None,
        owner=None if arrival is None else native_owner(claimed, arrival.depth),
        kind=None,
        joined=shortcut is not None,
        can_overwrite=can_overwrite and (arrival is None or claimed is not None),
    )


def cached_deferral(
    x: Tensor,
    module: nn.Module,
    watched: tuple[nn.Module, ...],
    kind: type[Tensor],
    *,
    mark: str,
    norm: nn.BatchNorm2d | None = None,
    claimed: Claim | None = None,
    route: Route | None = None,
) -> CachedCall:
    """Return a function that marks feature maps like x with a deferred module; see `cached_call`.

    Args:
        x: (N, C, H, W), without gradients.
        module: a BatchNorm in inference, or a ReLU.
        watched: modules that must have no hooks themselves.
        kind: the class of a marked feature map.
        mark: the attribute of the feature map that names the module.
        norm: the BatchNorm that x must be marked with already, or None.
        claimed: when nothing else holds x; None if that is not to be proved.
        route: how the feature map reaches its consumer; given with `claimed`.
    """
    training: tuple[tuple[dict[str, Any], str, object], ...] = ()
    if isinstance(module, nn.BatchNorm2d):
        training = ((module.__dict__, "training", False),)
    if claimed is not None and route is not None:
        claimed = claimed._replace(frames=max(claimed.frames, route.frames, key=len))
    return _new_call(
        x,
        (module,),
        shape_bytes=b"",
        watched=watched if route is None else (*watched, *route.passed),
        attributes=training if route is None else (*training, *route.children),
        orders=() if route is None else route.orders,
        weights=(),
        norm=norm,
        relu=None,
        mark=(mark, module),
        owner=native_owner(claimed, 2),
        kind=kind,
        joined=False,
        can_overwrite=True,
    )


def _new_call(
    x: Tensor,
    owners: tuple[nn.Module, ...],
    *,
    watched: tuple[nn.Module, ...],
    orders: tuple[nn.Module, ...] = (),
    **conditions: Any,
) -> CachedCall:
    """Return the native object; `orders` are modules whose children must stay the same, whatever their hooks."""
    children = (module for owner in owners for module in owner._modules.values() if module is not None)
    call: CachedCall = cpu.native_call(
        flags=_FLAGS,
        hooks=(*_GLOBAL_HOOKS, *(hooks for module in (*children, *watched) for hooks in _hooks(module))),
        children=tuple((owner._modules, tuple(owner._modules.values())) for owner in (*owners, *orders)),
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
    return call


def _tensor_in(held: Mapping[str, Tensor | None], name: str) -> tuple[object, str, Tensor | None, int]:
    found = held[name]
    return held, name, found, 0 if found is None else found.numel()


# Each returns anything but zero or None while operations are recorded, observed, transformed or cast. Forward-mode AD
# has a level instead.
_FLAGS = (
    torch.is_grad_enabled,
    torch._C._len_torch_dispatch_stack,
    torch._C._len_torch_function_stack,
    torch._C._is_tracing,
    torch._C._is_any_autocast_enabled,
    torch._C._functorch.peek_interpreter_stack,
)
_GLOBAL_HOOKS = (nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks)


# ------------------------------------------------------------------------------------------- what a decision looks at
NORM_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.Identity: "",
    nn.ReLU: "relu",
    nn.Hardswish: "hardswish",
    nn.SiLU: "silu",
}
"""Activations after a BatchNorm that the native code can compute with it, by their names in `cpu.POST_ACTIVATIONS`."""


def norm_of(module: nn.BatchNorm2d) -> Norm | None:
    """Return what a BatchNorm computes at inference; None without running statistics or with an unknown activation.

    A BatchNorm with an activation of its own, as timm's, holds it as `act`.
    """
    held: dict[str, Any] = {**module._parameters, **module._buffers}
    mean, var = held.get("running_mean"), held.get("running_var")
    act = module._modules.get("act")
    activation = "" if act is None else NORM_ACTIVATIONS.get(type(act))
    if mean is None or var is None or activation is None or not held.keys() >= {"weight", "bias"}:
        return None
    return Norm(held["weight"], held["bias"], mean, var, module.eps, activation)


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks


def _operator_refuses(x: Tensor, shortcut: Tensor | None, params: BlockParams) -> str:
    # Importing it registers the operator; only its users pay for that.
    from selab.kernels import ops

    reason = ops.gpu_reason() if x.is_cuda else ""
    return reason or ops.refuses(x, shortcut, *params[:6])


def has_hooks(*modules: nn.Module) -> bool:
    """Return whether a hook is registered on any of these modules, or on all modules."""
    return any(_GLOBAL_HOOKS) or any(any(_hooks(module)) for module in modules)


def holds_weights(layer: nn.Module) -> bool:
    """Return whether a layer's weight and bias are its own parameters, used by the forward of its class.

    Pruning, weight norm and wrappers replace one of them; such a layer must be called.
    """
    return "weight" in layer._parameters and "bias" in layer._parameters and "forward" not in layer.__dict__


def needs_reference(x: Tensor) -> str:
    """Return why only the separate torch operations can take a tensor; empty for a plain one on a CPU or a GPU."""
    if type(x) is not Tensor:
        return f"the input is a {type(x).__name__}"
    if not (x.is_cpu or x.is_cuda):
        return f"unsupported device: {x.device.type}"
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return "a torch mode intercepts every operation"
    if torch._C._is_tracing() or torch._C._functorch.peek_interpreter_stack() is not None:
        return "the network is being traced or transformed"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode AD is active"
    if x.is_cpu and torch.is_autocast_enabled("cpu"):
        return "autocast is active"
    if x.is_cpu and x.dtype not in (torch.float32, torch.float64):
        return f"unsupported dtype on a CPU: {str(x.dtype).removeprefix('torch.')}"
    return ""


def records_gradients(*tensors: Tensor | None) -> bool:
    """Return whether autograd records operations on these tensors."""
    return torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in tensors)
