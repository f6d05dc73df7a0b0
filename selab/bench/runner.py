"""PyTorch networks as closures to be timed: on a device, in a dtype and a memory format."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from selab.bench.heap import hold_heap
from selab.errors import DeviceError, ModelError, OutOfMemoryError, SelabError
from selab.fusion.fuse import fuse
from selab.meta import first_line
from selab.meta.real import real_copy
from selab.records.types import RUNTIMES, TORCH, Phase, Workload

Call = Callable[[], object]
ResolvedMode = Literal["train", "eval"]
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Types in which the whole network is kept: no autocast.
FULL_PRECISION = ("fp32", "tf32")


def mode_of(phase: Phase, workload: Workload) -> ResolvedMode:
    """Return the mode of a phase: the workload's, or by default `eval` for forward and `train` otherwise."""
    if workload.mode != "auto":
        return workload.mode
    return "eval" if phase == "forward" else "train"


def check_device(device: str, dtype: str = "fp32", *, runtime: str = TORCH) -> None:
    """Raise DeviceError, with the next step, if the device is not available or does not have the type.

    TF32 is a mode of NVIDIA's tensor cores. int8 is for networks that are exported.
    """
    if dtype == "int8" and runtime == TORCH:
        others = ", ".join(name for name in RUNTIMES if name != TORCH)
        raise DeviceError(f"--dtype int8: PyTorch runs none here; name a runtime: --runtime {others}")
    if dtype == "tf32" and device != "cuda":
        raise DeviceError(f"--dtype tf32: is a mode of CUDA devices; with --device {device} use fp32 or bf16")
    if device == "cuda" and not torch.cuda.is_available():
        built = "this torch has no CUDA" if torch.version.cuda is None else "torch finds no CUDA device"
        raise DeviceError(
            f"--device cuda: {built} (torch {torch.__version__}); use --device cpu, or a machine with one"
        )


@contextmanager
def fp32_mode(device: str, dtype: str) -> Iterator[None]:
    """Compute fp32 products and convolutions of a CUDA device in IEEE fp32 or, for `tf32`, in TF32, within the body.

    By default torch computes convolutions in TF32 and matrix products in fp32. A measurement of `fp32` would then be
    neither.
    """
    if device != "cuda":
        yield
        return
    # These set the newer fp32_precision as well; torch refuses to read them where only one of the newer was set.
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = dtype == "tf32"
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A private copy of a network, ready to run, with its input.

    Attributes:
        run: the network, compiled if asked; `network` is the module itself.
        input: (N, C, H, W), drawn from N(0, 1).
    """

    network: nn.Module
    run: Callable[[Tensor], object]
    input: Tensor
    workload: Workload

    def autocast(self, *, capture: bool = False) -> AbstractContextManager[object]:
        """Return the workload's autocast; a graph capture does not cache cast weights: the cache would outlive it."""
        if self.workload.dtype in FULL_PRECISION:
            return nullcontext()
        dtype = DTYPES[self.workload.dtype]
        return torch.autocast(self.workload.device, dtype=dtype, cache_enabled=not capture)


def prepare(model: nn.Module, workload: Workload, *, seed: int = 0) -> Prepared:
    """Copy the model to the device and make its input; the model itself is left unchanged.

    Raises:
        DeviceError: no such device.
        OutOfMemoryError: the copy or the input does not fit.
    """
    check_device(workload.device, workload.dtype)
    if workload.held_heap:
        hold_heap()
    memory_format = torch.channels_last if workload.memory_format == "channels_last" else torch.contiguous_format
    with translated_errors("preparing the network"):
        network = real_copy(model).to(workload.device)
        if workload.memory_format == "channels_last":
            network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if workload.fused:
            fuse(network, input_nchw=(workload.batch, *workload.input_chw))
        generator = torch.Generator().manual_seed(seed)
        example = torch.randn((workload.batch, *workload.input_chw), generator=generator)
        example = example.to(workload.device).contiguous(memory_format=memory_format)
    run = torch.compile(network) if workload.compiled else network
    return Prepared(network=network, run=run, input=example, workload=workload)


def output_tensors(output: object) -> list[Tensor]:
    """Return all floating-point tensors in an output, in any container."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def check_output(prepared: Prepared, name: str) -> None:
    """Run the network once in eval mode.

    Raises:
        ModelError: it fails, returns no tensor, or returns a value that is not finite.
        OutOfMemoryError: the pass does not fit.
    """
    prepared.network.eval()
    what = f"{name}: forward with an input of shape {_shape(prepared)}"
    # A network may keep what its first pass makes, and autograd refuses tensors that inference mode made. The graph of
    # a compiled network is of one mode: that of the phase `forward`.
    without_gradients = torch.inference_mode() if prepared.workload.compiled else torch.no_grad()
    with translated_errors(what), without_gradients, prepared.autocast():
        outputs = output_tensors(prepared.run(prepared.input))
    if not outputs:
        raise ModelError(f"{name}: forward returns no floating-point tensor, so there is nothing to measure")
    if not all(bool(torch.isfinite(tensor).all()) for tensor in outputs):
        raise ModelError(
            f"{name}: its output holds NaN or infinity for an input of shape {_shape(prepared)}; timings of such a "
            "network mean nothing: check its weights and its dtype"
        )


def _shape(prepared: Prepared) -> tuple[int, ...]:
    return tuple(prepared.input.shape)


def phase_call(prepared: Prepared, phase: Phase, *, capture: bool = False) -> Call:
    """Return one pass as a closure; the network is put into the phase's mode.

    * `forward` in eval mode is inference, without autograd; in train mode autograd records.
    * `backward` is the gradient of a fixed random cotangent with respect to all parameters, over a graph that is
      built once and retained. `training_step` has that of a new graph.
    * `forward_backward` is both, one after the other. No gradient is accumulated, no weight moves.
    """
    mode = mode_of(phase, prepared.workload)
    prepared.network.train(mode == "train")
    if phase != "forward":
        step = training_step(prepared, capture=capture)
        if phase == "forward_backward":
            return lambda: step.backward(step.forward())
        kept = step.forward()
        return lambda: step.backward(kept, retain_graph=True)

    def forward() -> object:
        with prepared.autocast(capture=capture):
            return prepared.run(prepared.input)

    def infer() -> object:
        with torch.inference_mode():
            return forward()

    return infer if mode == "eval" else forward


@dataclass(frozen=True, kw_only=True)
class TrainingStep:
    """Forward and backward of a network as two calls. No gradient is accumulated, no weight moves.

    Attributes:
        parameters: those that need a gradient.
        cotangents: fixed and random, one for each tensor of the output.
    """

    prepared: Prepared
    parameters: Sequence[nn.Parameter]
    cotangents: Sequence[Tensor]
    capture: bool

    def forward(self) -> list[Tensor]:
        """Return the tensors of the output; autograd records."""
        with self.prepared.autocast(capture=self.capture):
            return output_tensors(self.prepared.run(self.prepared.input))

    def backward(self, outputs: Sequence[Tensor], *, retain_graph: bool = False) -> object:
        """Return the gradients of all parameters; the graph is freed unless it is retained."""
        return torch.autograd.grad(
            outputs, self.parameters, self.cotangents, retain_graph=retain_graph, allow_unused=True
        )


def training_step(prepared: Prepared, *, capture: bool = False) -> TrainingStep:
    """Return forward and backward as two calls; the network is put into the mode of training, or the workload's.

    Raises:
        ModelError: no parameter needs a gradient.
    """
    prepared.network.train(mode_of("backward", prepared.workload) == "train")
    parameters = [p for p in prepared.network.parameters() if p.requires_grad]
    if not parameters:
        raise ModelError(f"{type(prepared.network).__name__}: no parameter needs a gradient, so there is no backward")
    step = TrainingStep(prepared=prepared, parameters=parameters, cotangents=(), capture=capture)
    # The graph of this pass ends here: it would count towards a peak.
    return replace(step, cotangents=[torch.randn_like(tensor) for tensor in step.forward()])


def _device_fault(what: str, error: BaseException) -> DeviceError:
    """A kernel failed, at this call or an earlier one; afterwards this process can no longer use the device."""
    return DeviceError(
        f"{what}: {first_line(error)}; the device cannot be used any more in this process: run it again with "
        "CUDA_LAUNCH_BLOCKING=1 to find the kernel"
    )


@contextmanager
def device_faults(what: str) -> Iterator[None]:
    """Turn the failure of a kernel into DeviceError, also one that only what is done at the end of the body meets."""
    try:
        yield
    except torch.AcceleratorError as error:
        raise _device_fault(what, error) from error


class translated_errors(AbstractContextManager[None]):  # noqa: N801 - used like a function, as contextlib's own
    """Turn exceptions of torch or a network into OutOfMemoryError or ModelError, with a message of one line.

    On the CPU torch reports exhausted memory as a plain RuntimeError.

    Args:
        what: the attempted action, for the message.
    """

    def __init__(self, what: str = "this workload") -> None:
        self._what = what

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Translate a known exception; any other passes."""
        if error is None or isinstance(error, SelabError):
            return
        text = first_line(error)
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in text:
            raise OutOfMemoryError(f"out of memory: {text}; use a smaller --batch or --resolution") from error
        if isinstance(error, torch.AcceleratorError):
            raise _device_fault(self._what, error) from error
        if isinstance(error, (RuntimeError, ValueError, TypeError, AttributeError, LookupError)):
            raise ModelError(f"{self._what} fails: {text}") from error
