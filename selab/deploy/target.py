"""What a runtime gets: the protocol that each exporter implements, its order and report, and their registry."""

import io
import logging
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from selab.deploy.spelling import Spelling
from selab.errors import DeviceError, ModelError, SelabError, UnknownNameError, nearest, one_line
from selab.records.exported import Partitions as Partitions

Precision = Literal["fp32", "int8"]
REGISTRY = {
    "onnxruntime": "selab.deploy.onnx:TARGET",
    "openvino": "selab.deploy.openvino:TARGET",
    "executorch": "selab.deploy.executorch:TARGET",
    "litert": "selab.deploy.litert:TARGET",
    "aoti": "selab.deploy.aoti:TARGET",
}
"""Runtime → `module:object` of its exporter, imported when it is asked for."""
FILE_TYPES = {"onnx": "onnxruntime"}
"""Names of file types that stand for a runtime."""
_EXTRAS = {"onnxruntime": "onnx"}


@dataclass(frozen=True, kw_only=True)
class Order:
    """What to write.

    Attributes:
        model: a network of one image, in eval mode, its blocks spelled as wanted; or an ONNX network.
        image: (N, C, H, W) of the input.
        path: of the file.
        name: of the network, for messages.
        precision: of weights and activations.
        images: for calibration, each as `image`; for int8 at least one.
        float_blocks: paths of modules that stay in fp32; None quantises the SE blocks too.
        threads: of the CPU, where the file is compiled for their number (`FIXED_THREADS`).
    """

    model: nn.Module
    image: tuple[int, ...]
    path: Path
    name: str
    precision: Precision = "fp32"
    images: Sequence[Tensor] = ()
    float_blocks: tuple[str, ...] | None = None
    threads: int = 1

    @property
    def example(self) -> Tensor:
        """The first image for calibration, or zeros."""
        return self.images[0] if self.images else torch.zeros(self.image)


REPLACE = "replace what fails, or choose another runtime"
"""The next step where a network cannot be exported."""
FIXED_THREADS = frozenset({"aoti"})
"""Runtimes whose files are compiled for a number of threads: with another one they run, several times slower."""


class Target(Protocol):
    """A runtime to export for."""

    @property
    def name(self) -> str:
        """The name in `Workload.runtime`."""

    @property
    def suffix(self) -> str:
        """Of its files, with the dot."""

    @property
    def spelling(self) -> Spelling:
        """How an SE block is written for it; by measurement, see docs/runtimes.md."""

    def write(self, order: Order) -> None:
        """Write the file, as a whole or not at all.

        Raises:
            DeviceError: a package that is needed is not installed.
            ModelError: the network cannot be exported; the message names the operator or module.
            RecordError: the file cannot be written.
        """

    def partitions(self, path: Path) -> Partitions:
        """Return what the runtime's compiler makes of a file."""


def target(name: str, *, option: str = "--runtime") -> Target:
    """Return the exporter for a runtime.

    Raises:
        UnknownNameError: there is no such runtime.
        DeviceError: a package that it needs is not installed.
    """
    runtime = FILE_TYPES.get(name, name)
    if runtime not in REGISTRY:
        known = (*FILE_TYPES, *REGISTRY)
        raise UnknownNameError(f"{option} {name}: unknown{nearest(name, known)}; allowed: {', '.join(known)}")
    module, _, attribute = REGISTRY[runtime].partition(":")
    with needed(runtime):
        found: Target = getattr(import_module(module), attribute)
    return found


@contextmanager
def needed(runtime: str) -> Iterator[None]:
    """Turn a missing package in the body into DeviceError with the command that installs it.

    Raises:
        DeviceError: a package is missing, or does not load.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "selab":
            raise
        raise DeviceError(
            f"runtime {runtime}: needs the package {error.name.split('.')[0]}, which is not installed; "
            f"run pip install 'selab[{_EXTRAS.get(runtime, runtime)}]'"
        ) from None
    except ImportError as error:
        raise DeviceError(
            f"runtime {runtime}: a package does not load with torch {torch.__version__}: {one_line(error)}; "
            f"run pip install 'selab[{_EXTRAS.get(runtime, runtime)}]' in an environment of its own"
        ) from None


@contextmanager
def exporting(order: Order, runtime: str) -> Iterator[None]:
    """Silence an exporter in the body, and turn what it raises into ModelError.

    Raises:
        DeviceError: a package is missing.
        ModelError: the network cannot be exported.
    """
    try:
        with needed(runtime), quiet():
            yield
    except (SelabError, KeyboardInterrupt):
        raise
    except Exception as error:
        where = module_of(error) or place_of(order.model, order.example, error)
        raise ModelError(
            f"{order.name}: cannot be exported for {runtime}{where}: {one_line(error)}; {REPLACE}"
        ) from error


def place_of(model: nn.Module, example: Tensor, error: BaseException) -> str:
    """Return the module that runs an operator which an exporter names in its error, in words; empty if none does."""
    named = {name.strip("_") for name in re.findall(r"\baten(?:::|\.)(\w+)", str(error))}
    if not named:
        return ""
    stack: list[str] = []
    found: list[str] = []

    def look(name: str) -> None:
        if name.strip("_") in named:
            found.append(stack[-1] if stack else "")

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            look(str(getattr(func, "__name__", "")))
            return func(*args, **(kwargs or {}))

    class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            look(str(func).split(".")[1])
            return func(*args, **(kwargs or {}))

    handles = []
    for path, module in model.named_modules():
        words = f"{path} ({type(module).__name__})" if path else type(module).__name__
        handles.append(module.register_forward_pre_hook(lambda *_, words=words: stack.append(words)))
        handles.append(module.register_forward_hook(lambda *_: stack.pop() and None))
    try:
        with torch.no_grad(), Functions(), Operators():  # type: ignore[no-untyped-call]
            model(example)
    except Exception:
        return ""
    finally:
        for handle in handles:
            handle.remove()
    return f" (in {found[0]})" if found and found[0] else ""


def module_of(error: BaseException) -> str:
    """Return the deepest module whose forward an exporter was in when it failed, in words; empty if none is known."""
    found = ""
    trace = error.__traceback__
    while trace is not None:
        this = trace.tb_frame.f_locals.get("self")
        if trace.tb_frame.f_code.co_name == "forward" and isinstance(this, nn.Module):
            found = type(this).__name__
        trace = trace.tb_next
    return f" (in {found})" if found else ""


@contextmanager
def quiet() -> Iterator[None]:
    """Drop what exporters say of themselves, on standard output, as warnings and as log records."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def scratch() -> Iterator[Path]:
    """Give a folder for the files that a tool wants to write, and remove it."""
    with tempfile.TemporaryDirectory(prefix="selab-") as folder:
        yield Path(folder)


@contextmanager
def muted() -> Iterator[None]:
    """Drop what native code writes to standard output and standard error in the body."""
    sys.stdout.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    saved = {stream: os.dup(stream) for stream in (1, 2)}
    try:
        for stream in saved:
            os.dup2(nowhere, stream)
        yield
    finally:
        for stream, kept in saved.items():
            os.dup2(kept, stream)
            os.close(kept)
        os.close(nowhere)


def only_module(order: Order, runtime: str) -> nn.Module:
    """Return the network of an order for a runtime that takes no ONNX network.

    Raises:
        ModelError: it is one.
    """
    from selab.graphs.module import OnnxNetwork

    if isinstance(order.model, OnnxNetwork):
        raise ModelError(
            f"{order.name}: is an ONNX network, which runtime {runtime} does not take; use onnxruntime or openvino"
        )
    return order.model


def counted(names: Sequence[Any]) -> dict[str, int]:
    """Return name → how often it is there, the most frequent first."""
    found: dict[str, int] = {}
    for name in map(str, names):
        found[name] = found.get(name, 0) + 1
    return dict(sorted(found.items(), key=lambda one: (-one[1], one[0])))
