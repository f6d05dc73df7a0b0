"""Compare with other counters (fvcore, thop, torch) and explain every difference.

Each counter runs through its public interface on a copy of the model without memory, so it leaves nothing behind and
computes nothing. Where the values of tensors steer a network, all of them run a copy on real tensors.

Each difference is predicted from the recorded operators and the rule in the counter's source, never from its total. So
the remainder checks both sides: `total = ours + sum(differences) + remainder`. A difference of zero names a part of SE
that the counter leaves out.
"""

import io
import re
import warnings
from collections import Counter as Tally
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from selab.attention.gated_site import sites_own
from selab.cost.tracer import ModuleCall, Operation, OpTrace, op_trace
from selab.errors import ModelError
from selab.meta import (
    Example,
    FakePass,
    On,
    as_written,
    example_arguments,
    first_line,
    make_pass,
    meta_twin,
    set_mode,
)
from selab.meta.modes import DispatchMode
from selab.meta.state import restored
from selab.records.types import Counter, Difference

# fvcore 0.1.5 and torch 2.13 know these; another operator that holds MACs is zero for them.
_FVCORE_PRODUCTS = {"linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "einsum"}
_TORCH_ATTENTION = {
    f"aten::{name}"
    for name in (
        *("_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention"),
        *("_scaled_dot_product_cudnn_attention", "_scaled_dot_product_fused_attention_overrideable"),
        *("_flash_attention_forward", "_efficient_attention_forward"),
    )
}
_TORCH_PRODUCTS = {
    *("aten::convolution", "aten::convolution_backward", "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    *("aten::_scaled_mm", *_TORCH_ATTENTION),
}
# How Python prints an object or a function that has no text of its own.
_ADDRESS = re.compile(r"<(?:__torch__\.)?([\w.<> ]+?)(?: object)? at 0x[0-9a-fA-F]+>")
_GATES = {"sigmoid", "hardsigmoid", "tanh", "relu", "hardtanh", "clamp"}


def compare(
    model: nn.Module,
    example: Example,
    *,
    dtype: torch.dtype | None = None,
    traced: OpTrace | None = None,
    on: On = "fake",
) -> dict[str, Counter]:
    """Run the counters `fvcore`, `thop`, `torch` and `torch_backward` for one pass in eval mode.

    A counter that fails has its reason in `error`; the others are not affected.

    Args:
        model: not changed.
        example: an input's shape or an example, as for `selab.cost.count.count`.
        dtype: as for `count`; no MAC depends on it.
        traced: the operators of the same pass with `details`, if they were recorded already.
        on: as for `count`, and for all counters.

    Raises:
        ModelError: the model's own forward pass fails.
    """
    model = as_written(model)
    traced = traced or op_trace(model, example, dtype=dtype, details=True, on=on)
    # Some run the network outside of our own pass, which restores what forward changes beside it.
    with restored(model):
        return {
            "fvcore": fvcore_counter(model, example, traced, on=on),
            "thop": thop_counter(model, example, traced, on=on),
            "torch": torch_counter(model, example, traced, on=on),
            "torch_backward": torch_counter_backward(model, example, traced, on=on),
        }


def fvcore_counter(model: nn.Module, example: Example, traced: OpTrace, *, on: On = "fake") -> Counter:
    """Run fvcore's FlopCountAnalysis. Its "flops" are MACs, and include BatchNorm and adaptive pooling.

    Args:
        model: not changed.
        example: as for `selab.cost.count.count`.
        traced: operators of the same pass in eval mode, with `details`.
        on: as for `count`.
    """

    def run(twin: nn.Module, args: tuple[Any, ...]) -> tuple[int, dict[str, int]]:
        from fvcore.nn import FlopCountAnalysis

        analysis = FlopCountAnalysis(twin, args)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        with (
            ThreadPoolExecutor(max_workers=1) as beside,
            torch.no_grad(),
            _MetaBeside(beside) if on == "fake" else nullcontext(),
            _TraceableConvolutions() if on == "fake" else nullcontext(),
        ):
            return int(analysis.total()), {name: int(calls) for name, calls in analysis.unsupported_ops().items()}

    differences = _fvcore_differences(traced)
    return _counter("fvcore", "macs", _ours(traced), differences, lambda: run(*_twin(model, example, on)))


def thop_counter(model: nn.Module, example: Example, traced: OpTrace, *, on: On = "fake") -> Counter:
    """Run thop's profile. It counts MACs of the module types it knows, including BatchNorm; functions are zero.

    Its rules for recurrent layers are not predicted and stay in the remainder.

    Args:
        model: not changed.
        example: as for `selab.cost.count.count`.
        traced: operators of the same pass in eval mode, with `details`.
        on: as for `count`.
    """

    def run(twin: nn.Module, args: tuple[Any, ...]) -> tuple[int, dict[str, int]]:
        import thop

        macs, _ = thop.profile(twin, args, verbose=False)
        known = _thop_rules()
        unseen = Tally(
            o.name
            for o in traced.operations
            if type(_at(model, o.path)) not in known and (o.macs or o.other or not o.known)
        )
        return int(macs), dict(unseen)

    def predicted() -> list[Difference]:
        return _thop_differences(model, traced)

    return _counter("thop", "macs", _ours(traced), predicted, lambda: run(*_twin(model, example, on)))


def torch_counter(model: nn.Module, example: Example, traced: OpTrace, *, on: On = "fake") -> Counter:
    """Run torch's FlopCounterMode on a forward pass. It counts two FLOPs per MAC of convolutions and matrix products.

    Args:
        model: not changed.
        example: as for `selab.cost.count.count`.
        traced: operators of the same pass in eval mode.
        on: as for `count`.
    """

    def run() -> tuple[int, dict[str, int]]:
        fakes = _pass(model, example, on)
        # As in our own pass: torch chooses another attention where no gradient is needed, which its counter leaves out.
        with torch.enable_grad(), fakes.running(), FlopCounterMode(display=False) as counter:
            fakes()
        return counter.get_total_flops(), _torch_uncounted(traced)

    differences = [*_torch_missing(traced, backward=False), *_se_note(traced)]
    return _counter("torch", "flops", 2 * _ours(traced), differences, run)


def torch_counter_backward(model: nn.Module, example: Example, traced: OpTrace, *, on: On = "fake") -> Counter:
    """Run torch's FlopCounterMode on forward and backward of the sum of the outputs.

    torch 2.13 counts the weight gradient of a grouped convolution `groups` times.

    Args:
        model: not changed.
        example: as for `selab.cost.count.count`.
        traced: operators of the same pass in eval mode.
        on: as for `count`.
    """

    def run() -> tuple[int, dict[str, int]]:
        fakes = _pass(model, example, on)
        with torch.enable_grad(), fakes.running(), FlopCounterMode(display=False) as counter:
            outputs = [x for x in tree_leaves(fakes()) if isinstance(x, Tensor) and x.requires_grad]
            if outputs:
                torch.stack([x.sum() for x in outputs]).sum().backward()  # type: ignore[no-untyped-call]
        return counter.get_total_flops(), _torch_uncounted(traced)

    ours = 2 * (_ours(traced) + sum(o.backward_macs for o in traced.operations))
    grouped = sum(2 * o.macs * (o.groups - 1) for o in traced.operations if o.weight_gradient)
    # The gradients of queries, keys and values whether they are needed or not, and the scores once more.
    attention = [o for o in traced.operations if o.operator in _TORCH_ATTENTION and o.backward_macs]
    fused = sum(2 * (5 * o.macs // 2 - o.backward_macs) for o in attention)
    differences = [
        *_torch_missing(traced, backward=True),
        *_amounts({"weight gradients of grouped convolutions, counted `groups` times": grouped}),
        *_amounts({"fused attention, whose backward pass computes the scores again": fused}),
        *_se_note(traced),
    ]
    return _counter(
        "torch",
        "flops",
        ours,
        differences,
        run,
        direction="forward_backward",
    )


# --------------------------------------------------------------------------------------------- running what is not ours
def _counter(
    name: str,
    unit: Any,
    ours: int,
    differences: Sequence[Difference] | Callable[[], Sequence[Difference]],
    run: Callable[[], tuple[int, dict[str, int]]],
    *,
    direction: Any = "forward",
) -> Counter:
    """Run another counter and explain its total; an exception becomes its `error`."""
    installed = ""
    try:
        installed = version(name)
        with _quiet():
            total, uncounted = run()
            explained = tuple(differences() if callable(differences) else differences)
    except Exception as error:
        gone = isinstance(error, PackageNotFoundError)
        failed = "not installed" if gone else f"{name} fails on this model: {_reason(error)}"
        return Counter(
            name=name, version=installed, direction=direction, unit=unit, total=None, ours=ours, error=failed
        )
    return Counter(
        name=name,
        version=installed,
        direction=direction,
        unit=unit,
        total=total,
        ours=ours,
        differences=explained,
        remainder=total - ours - sum(difference.amount for difference in explained),
        uncounted=uncounted,
    )


def _reason(error: Exception) -> str:
    """Return one line on an exception, without the addresses of objects, which differ from run to run."""
    text = _ADDRESS.sub(r"\1", first_line(error))
    if "PackedParams" in text:
        return "torch.jit.trace cannot follow the packed weights of its layers"
    return f"{type(error).__name__}: {text}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress output and warnings of a counter: thop 0.1.1 imports distutils, fvcore 0.1.5 uses torch.jit."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _pass(model: nn.Module, example: Example, on: On) -> FakePass:
    made = make_pass(as_written(model), example, on)
    set_mode(made.model, training=False)
    return made


def _twin(model: nn.Module, example: Example, on: On) -> tuple[nn.Module, tuple[Any, ...]]:
    if on == "cpu":
        real = _pass(model, example, on)
        twin, args, kwargs = real.model, real.args, real.kwargs
    else:
        args, kwargs = example_arguments(model, example, device="meta")
        twin = meta_twin(as_written(model))
        set_mode(twin, training=False)
    if kwargs:
        raise ModelError("it takes positional inputs only; give the example as a tuple")
    return twin, args


class _MetaBeside(DispatchMode):
    """Let `torch.jit` trace a model on the meta device: run the kernels in another thread, outside of the trace.

    Most meta kernels of torch 2.13 are Python; inside a trace, their sizes would become traced tensors. Tracing state
    is per thread.
    """

    def __init__(self, beside: ThreadPoolExecutor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._beside = beside

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.is_view:
            # Made in the other thread, it would already have autograd's marks.
            return func(*args, **kwargs)
        if func is torch.ops.aten._convolution.default:
            func, args = torch.ops.aten.convolution.default, args[:9]

        def run() -> Any:
            with torch.no_grad():
                return func(*args, **kwargs)

        return self._beside.submit(run).result()


class _TraceableConvolutions(TorchFunctionMode):
    """Call `torch._convolution` for a convolution, the operator that fvcore counts.

    On a real device a trace finds it below the public operators; on the meta device of torch 2.13 it does not.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.conv1d, torch.conv2d, torch.conv3d):
            return _convolution(func, *args, **kwargs)
        if func in (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d):
            return _transposed_convolution(*args, **kwargs)
        return func(*args, **kwargs)


def _convolution(
    func: Any,
    input: Tensor,  # noqa: A002 (torch's own name for it)
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    if isinstance(padding, str):
        return func(input, weight, bias, stride, padding, dilation, groups)
    return _general_convolution(input, weight, bias, stride, padding, dilation, False, 0, groups)


def _transposed_convolution(
    input: Tensor,  # noqa: A002 (torch's own name for it)
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Any:
    return _general_convolution(input, weight, bias, stride, padding, dilation, True, output_padding, groups)


def _general_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Any:
    dims = weight.dim() - 2

    def each(value: Any) -> list[int]:
        values = [value] if isinstance(value, int) else list(value)
        return values * dims if len(values) == 1 else values

    backend_flags = (False, False, False, False)
    return torch._convolution(
        x,
        weight,
        bias,
        each(stride),
        each(padding),
        each(dilation),
        transposed,
        each(output_padding),
        groups,
        *backend_flags,
    )


# ---------------------------------------------------------------------------------------------- predicting their totals
def _ours(traced: OpTrace) -> int:
    return sum(o.macs for o in traced.operations)


def _amounts(amounts: Mapping[str, int]) -> list[Difference]:
    return [Difference(cause=cause, amount=amount) for cause, amount in amounts.items() if amount]


def _se_note(traced: OpTrace, *, squeeze_counted: bool = False) -> list[Difference]:
    """Return the parts of an SE block that a counter leaves out; `ours` has none of them either, so they are zero."""
    inside = [o for o in traced.operations if o.stage]
    parts = [] if squeeze_counted else sorted({f"squeeze by {o.name}" for o in inside if o.stage == "squeeze"})
    parts += sorted({f"gate by {o.name}" for o in inside if o.stage == "excitation" and o.name in _GATES - {"relu"}})
    parts += ["scale"] if any(o.stage == "scale" for o in inside) else []
    return [Difference(cause=f"SE {part}, not counted", amount=0) for part in parts]


def _fvcore_differences(traced: OpTrace) -> list[Difference]:
    """Predict fvcore's differences. Source: fvcore 0.1.5 `nn/flop_count.py` and `nn/jit_handles.py`."""
    amounts: Tally[str] = Tally()
    squeezes_counted = True
    attending = {o.path for o in traced.operations if o.operator == "aten::_safe_softmax"}
    for o in traced.operations:
        cause, amount = _fvcore_difference(o, o.path in attending)
        amounts[cause] += amount
        if o.stage == "squeeze" and not cause:
            squeezes_counted = False
    return [*_amounts(amounts), *_se_note(traced, squeeze_counted=squeezes_counted)]


def _fvcore_difference(o: Operation, attends: bool) -> tuple[str, int]:
    """Return fvcore's count of one operator minus ours in conv_linear, and the cause.

    Args:
        o: the operator call.
        attends: its module holds a scaled dot-product attention, whose two products fvcore does not see.
    """
    if o.function == "adaptive_avg_pool2d":
        kind = "SE squeeze by adaptive_avg_pool2d" if o.stage == "squeeze" else "adaptive_avg_pool2d"
        return f"{kind}, 1 per element", o.input_numel
    if o.name == "batch_norm" and o.function != "instance_norm" and not o.training:
        factor = 2 if o.affine else 1
        return f"BatchNorm, {factor} per element", factor * o.input_numel
    if o.name in ("batch_norm", "group_norm", "layer_norm"):
        factor = 5 if o.affine else 4
        title = {"group_norm": "GroupNorm", "layer_norm": "LayerNorm"}.get(o.name, "InstanceNorm")
        if o.training and o.function != "instance_norm":
            title = "BatchNorm with batch statistics"
        return f"{title}, {factor} per element", factor * o.input_numel
    if o.operator in ("aten::upsample_bilinear2d", "aten::grid_sampler_2d"):
        return f"{o.operator.removeprefix('aten::')}, 4 per element", 4 * o.output_numel
    if o.operator == "aten::upsample_nearest2d":
        return "upsample_nearest2d, 1 per element", o.output_numel
    if o.macs and o.name == "convolution":
        counted = not o.function.endswith("padding by name")
        return ("", 0) if counted else ("convolution whose padding is given by name, not counted", -o.macs)
    if o.macs and o.function == "multi_head_attention_forward":
        counted = o.name == "linear" or (o.operator == "aten::bmm" and not attends)
        return ("", 0) if counted else ("attention's products, not counted", -o.macs)
    if o.macs and o.function not in _FVCORE_PRODUCTS:
        return f"{o.function}, not counted", -o.macs
    return "", 0


def _thop_rules() -> Mapping[type[nn.Module], object]:
    from thop.profile import register_hooks

    rules: Mapping[type[nn.Module], object] = register_hooks
    return rules


def _thop_differences(model: nn.Module, traced: OpTrace) -> list[Difference]:
    """Predict thop's differences. Source: thop 0.1.1 `profile.py` and `vision/basic_hooks.py`."""
    known = _thop_rules()
    hooked, summed = _thop_visits(model, known)
    squeezes = {o.path for o in traced.operations if o.stage == "squeeze"}
    modules = {path: _at(model, path) for path in dict.fromkeys([c.path for c in traced.module_calls])}
    theirs: Tally[str] = Tally()
    for call in traced.module_calls:
        if type(modules[call.path]) in known:
            theirs[call.path] += _thop_price(modules[call.path], call)
    ours: Tally[str] = Tally()
    names: dict[str, str] = {}
    for o in traced.operations:
        if o.macs:
            ours[o.path] += o.macs
            names[o.path] = o.name
    amounts: Tally[str] = Tally()
    for path in dict.fromkeys([*theirs, *ours]):
        module = _at(model, path)
        title = type(module).__name__
        if type(module) not in known:
            amounts[f"{names[path]} in {title}, a type without a rule"] -= ours[path]
            continue
        times = hooked[id(module)] * summed[id(module)]
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            continue  # Its rules for recurrent layers are not predicted: they stay in the remainder.
        once = _thop_cause(module, theirs[path], ours[path], path in squeezes)
        amounts[once] += theirs[path] - ours[path]
        if times == 0:
            amounts[f"{title} inside a module that it counts as one, not visited"] -= theirs[path]
        else:
            amounts[f"{title} shared by several modules, counted {times} times"] += (times - 1) * theirs[path]
    counted = bool(squeezes) and all(theirs[path] for path in squeezes)
    return [*_amounts(amounts), *_se_note(traced, squeeze_counted=counted)]


def _at(model: nn.Module, path: str) -> nn.Module:
    """Return the module at a path of a trace; an inserted block stands around it."""
    return sites_own(model.get_submodule(path))


def _thop_visits(model: nn.Module, known: Mapping[type[nn.Module], object]) -> tuple[Tally[int], Tally[int]]:
    """Return how often thop hooks each module (once per parent), and how often it adds its result, by identity."""
    hooked: Tally[int] = Tally()
    summed: Tally[int] = Tally()

    def hook(module: nn.Module) -> None:
        for child in module.children():
            hook(child)
        hooked[id(module)] += 1

    def add(module: nn.Module) -> None:
        summed[id(module)] += 1
        for child in module.children():
            if type(child) in known and not isinstance(child, (nn.Sequential, nn.ModuleList)):
                summed[id(child)] += 1
            else:
                add(child)

    hook(model)
    add(model)
    return hooked, summed


def _thop_price(module: nn.Module, call: ModuleCall) -> int:
    """Return what thop adds for one call of a module of a known type."""
    given, made = call.input_shape or (), call.output_shape or ()
    match module:
        case nn.modules.conv._ConvNd():
            return prod(made) * (given[1] // module.groups) * prod(module.weight.shape[2:])
        case nn.Linear():
            return module.in_features * prod(made)
        case nn.modules.batchnorm._NormBase() | nn.LayerNorm():
            affine = getattr(module, "affine", False) or getattr(module, "elementwise_affine", False)
            return (4 if affine else 2) * prod(given)
        case nn.AdaptiveAvgPool1d() | nn.AdaptiveAvgPool2d() | nn.AdaptiveAvgPool3d():
            window = prod(a / b for a, b in zip(given[2:], made[2:], strict=True))
            return int((window + 1) * prod(made))
        case nn.AvgPool1d() | nn.AvgPool2d() | nn.AvgPool3d():
            return prod(made)
        case nn.PReLU():
            return prod(given)
        case nn.Softmax():
            features = given[module.dim if module.dim is not None else -1]
            return prod(given) // features * (3 * features - 1)
        case nn.Upsample():
            return prod(made) * {"nearest": 1, "linear": 5, "bilinear": 11, "bicubic": 224 + 35}.get(module.mode, 0)
    return 0


def _thop_cause(module: nn.Module, theirs: int, ours: int, is_squeeze: bool) -> str:
    title = type(module).__name__
    match module:
        case nn.modules.batchnorm._NormBase() | nn.LayerNorm():
            return f"{title}, {4 if any(True for _ in module.parameters()) else 2} per element"
        case nn.AdaptiveAvgPool1d() | nn.AdaptiveAvgPool2d() | nn.AdaptiveAvgPool3d():
            kind = f"SE squeeze by {title}" if is_squeeze else title
            return f"{kind}, 1 per element read and 1 per element written"
        case nn.AvgPool1d() | nn.AvgPool2d() | nn.AvgPool3d():
            return f"{title}, 1 per element written"
        case nn.modules.conv._ConvTransposeNd():
            return f"{title}, priced over its output instead of its input"
    return f"{title}, {theirs} MACs instead of {ours}" if ours else f"{title}, by a rule of its own"


def _torch_uncounted(traced: OpTrace) -> dict[str, int]:
    """Return the operators with arithmetic that FlopCounterMode does not count."""
    return dict(
        Tally(
            o.name
            for o in traced.operations
            if o.operator not in _TORCH_PRODUCTS and (o.macs or o.other or not o.known)
        )
    )


def _torch_missing(traced: OpTrace, *, backward: bool) -> list[Difference]:
    amounts: Tally[str] = Tally()
    for o in traced.operations:
        if o.macs and o.operator not in _TORCH_PRODUCTS:
            macs = o.macs + (o.backward_macs if backward else 0)
            amounts[f"{o.operator.removeprefix('aten::')}, not counted"] -= 2 * macs
    return _amounts(amounts)
