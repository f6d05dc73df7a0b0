"""ONNX Runtime on a CPU, for networks that are ONNX files."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
from torch import nn

from selab.bench.backends import Timing
from selab.bench.machine import threads_and_affinity
from selab.bench.sampler import Arm, Clock, WallArm
from selab.errors import DeviceError, ModelError, OutOfMemoryError, SelabError, one_line
from selab.graphs.module import OnnxNetwork
from selab.records.types import Memory, Phase, Workload

# Only errors: onnxruntime warns on standard error about every node that it would place elsewhere.
_ERRORS = 3


@dataclass(frozen=True, kw_only=True)
class Session:
    """A network, ready to run.

    Attributes:
        binding: of the input and of the outputs; nothing is copied at a call.
    """

    session: Any
    binding: Any
    place: str

    def run(self) -> None:
        """Run the network once."""
        self.session.run_with_iobinding(self.binding)


class OnnxRuntimeBackend:
    """ONNX Runtime with all of its graph optimisations."""

    name = "onnxruntime"
    phases: tuple[Phase, ...] = ("forward",)

    @contextmanager
    def session(self, workload: Workload, *, seed: int) -> Iterator[None]:
        """Set affinity for the body; the threads are those of the sessions."""
        _check(workload)
        with threads_and_affinity(workload.threads):
            yield

    def prepare(self, model: nn.Module, workload: Workload, *, seed: int) -> Session:
        """Load an ONNX network and bind its input.

        Its threads stop waiting actively when a call ends: they would do so on the cores that the other network needs.
        """
        _check(workload)
        if not isinstance(model, OnnxNetwork):
            raise ModelError(f"runtime onnxruntime: {type(model).__name__} is no ONNX network; name a file, NAME.onnx")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _ERRORS
        options.inter_op_num_threads = 1
        options.intra_op_num_threads = workload.threads
        options.add_session_config_entry("session.force_spinning_stop", "1")
        with self.translated_errors(model.place):
            session = onnxruntime.InferenceSession(
                model.model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            (given,) = session.get_inputs()
            image = np.random.default_rng(seed).standard_normal((workload.batch, *workload.input_chw), np.float32)
            binding = session.io_binding()
            binding.bind_cpu_input(given.name, image)
            for output in session.get_outputs():
                binding.bind_output(output.name, "cpu")
        return Session(session=session, binding=binding, place=model.place)

    def check_output(self, prepared: Session, name: str) -> None:
        """Run the network once and check that its outputs are finite."""
        with self.translated_errors(name):
            prepared.run()
            outputs = prepared.binding.copy_outputs_to_cpu()
        floats = [one for one in outputs if np.issubdtype(one.dtype, np.floating)]
        if not floats:
            raise ModelError(f"{name}: returns no floating-point tensor, so there is nothing to measure")
        if not all(np.isfinite(one).all() for one in floats):
            raise ModelError(f"{name}: its output holds NaN or infinity; timings of such a network mean nothing")

    def timings(self, workload: Workload, phase: Phase, *, clock: Clock, cold: bool = False) -> Iterator[Timing]:
        """Yield the run of the forward pass, by the method `wall`."""

        def arm(prepared: Session, _phase: Phase) -> Arm:
            return WallArm(call=prepared.run, clock=clock)

        yield Timing(methods=("wall",), arm=arm)

    def training_step(self, workload: Workload, *, clock: Clock) -> Timing | None:
        """Return None: there is no training."""
        return None

    @contextmanager
    def translated_errors(self, what: str) -> Iterator[None]:
        """Turn what ONNX Runtime raises into ModelError or OutOfMemoryError."""
        try:
            yield
        except SelabError:
            raise
        except Exception as error:
            text = one_line(error)
            if "allocate" in text.lower() or isinstance(error, MemoryError):
                raise OutOfMemoryError(f"out of memory: {text}; use a smaller --batch or input") from error
            raise ModelError(f"{what}: ONNX Runtime fails: {text}") from error

    def memory(self, model: nn.Module, workload: Workload, *, seed: int, phases: Sequence[Phase]) -> Memory:
        """Return no figure: ONNX Runtime reports no peak."""
        return Memory(method="not measured: ONNX Runtime reports no peak")

    def saved_for_backward(self, prepared: Session) -> int:
        """Return 0: there is no backward pass."""
        return 0


def _check(workload: Workload) -> None:
    """Raise DeviceError for what this runtime does not have."""
    wrong = {
        f"--device {workload.device}": workload.device != "cpu",
        f"--dtype {workload.dtype}": workload.dtype != "fp32",
        "--channels-last": workload.memory_format != "contiguous",
        f"--mode {workload.mode}": workload.mode == "train",
        "--compile": workload.compiled,
        "--fused": workload.fused,
    }
    for option, is_wrong in wrong.items():
        if is_wrong:
            raise DeviceError(f"{option}: runtime onnxruntime has it not; it runs fp32 on a CPU; leave it out")


BACKEND = OnnxRuntimeBackend()
