"""What the runtimes of exported networks have in common: inference on a CPU, of networks in files."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from selab.bench.backends import Timing
from selab.bench.machine import threads_and_affinity
from selab.bench.sampler import Arm, Clock, WallArm
from selab.errors import DeviceError, ModelError, OutOfMemoryError, SelabError, one_line
from selab.graphs.module import DeployedNetwork
from selab.records.types import Memory, Phase, Workload

Image = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A network, ready to run.

    Attributes:
        call: runs it once; nothing is copied or converted at a call but what the runtime itself does.
        feed: sets another input of the same shape.
        outputs: the outputs of the last call.
        place: of its file, for messages.
    """

    call: Callable[[], object]
    feed: Callable[[Image], object]
    outputs: Callable[[], Sequence[Any]]
    place: str


class DeployedBackend(ABC):
    """A runtime of exported networks.

    Attributes:
        title: of the runtime, in messages.
        phases: the forward pass; there is no training.
    """

    name: str
    title: str
    phases: tuple[Phase, ...] = ("forward",)

    @abstractmethod
    def load(self, model: nn.Module, workload: Workload, image: Image) -> Loaded:
        """Load a network with its input, (N, C, H, W) fp32, for so many threads as the workload says.

        Raises:
            ModelError: it is no network of this runtime.
        """

    @contextmanager
    def session(self, workload: Workload, *, seed: int) -> Iterator[None]:
        """Set threads and affinity for the body."""
        check(workload, self.name)
        with threads_and_affinity(workload.threads):
            yield

    def prepare(self, model: nn.Module, workload: Workload, *, seed: int) -> Loaded:
        """Load a network and its input, which is drawn from N(0, 1)."""
        check(workload, self.name)
        image = np.random.default_rng(seed).standard_normal((workload.batch, *workload.input_chw), np.float32)
        with self.translated_errors(str(getattr(model, "place", type(model).__name__))):
            return self.load(model, workload, image)

    def check_output(self, prepared: Loaded, name: str) -> None:
        """Run the network once and check that its outputs are finite."""
        with self.translated_errors(name):
            prepared.call()
            outputs = [np.asarray(one) for one in prepared.outputs()]
        floats = [one for one in outputs if np.issubdtype(one.dtype, np.floating)]
        if not floats:
            raise ModelError(f"{name}: returns no floating-point tensor, so there is nothing to measure")
        if not all(np.isfinite(one).all() for one in floats):
            raise ModelError(f"{name}: its output holds NaN or infinity; timings of such a network mean nothing")

    def timings(self, workload: Workload, phase: Phase, *, clock: Clock, cold: bool = False) -> Iterator[Timing]:
        """Yield the run of the forward pass, by the method `wall`."""

        def arm(prepared: Loaded, _phase: Phase) -> Arm:
            return WallArm(call=prepared.call, clock=clock)

        yield Timing(methods=("wall",), arm=arm)

    def training_step(self, workload: Workload, *, clock: Clock) -> Timing | None:
        """Return None: there is no training."""
        return None

    @contextmanager
    def translated_errors(self, what: str) -> Iterator[None]:
        """Turn what the runtime raises into ModelError or OutOfMemoryError."""
        try:
            yield
        except SelabError:
            raise
        except Exception as error:
            text = one_line(error)
            if "allocate" in text.lower() or isinstance(error, MemoryError):
                raise OutOfMemoryError(f"out of memory: {text}; use a smaller --batch or input") from error
            raise ModelError(f"{what}: {self.title} fails: {text}") from error

    def memory(self, model: nn.Module, workload: Workload, *, seed: int, phases: Sequence[Phase]) -> Memory:
        """Return no figure: such a runtime reports no peak."""
        return Memory(method=f"not measured: {self.title} reports no peak")

    def saved_for_backward(self, prepared: Loaded) -> int:
        """Return 0: there is no backward pass."""
        return 0

    def file_of(self, model: nn.Module) -> DeployedNetwork:
        """Return a network of this runtime.

        Raises:
            ModelError: it is another module.
        """
        if not isinstance(model, DeployedNetwork) or model.runtime != self.name:
            raise ModelError(f"runtime {self.name}: {type(model).__name__} is no network that was exported for it")
        return model


def check(workload: Workload, runtime: str) -> None:
    """Raise DeviceError for what no runtime of exported networks has."""
    wrong = {
        f"--device {workload.device}": workload.device != "cpu",
        f"--dtype {workload.dtype}": workload.dtype not in ("fp32", "int8"),
        "--channels-last": workload.memory_format != "contiguous",
        f"--mode {workload.mode}": workload.mode == "train",
        "--compile": workload.compiled,
        "--fused": workload.fused,
    }
    for option, is_wrong in wrong.items():
        if is_wrong:
            raise DeviceError(f"{option}: runtime {runtime} has it not; it runs fp32 or int8 on a CPU; leave it out")
