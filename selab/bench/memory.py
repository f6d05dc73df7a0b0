"""Peak memory of a pass, measured in the workload's runtime."""

from collections.abc import Sequence

from torch import nn

from selab.bench.backends import backend
from selab.records.types import PHASES, Memory, Phase, Workload


def memory(model: nn.Module, workload: Workload, *, seed: int = 0, phases: Sequence[Phase] = PHASES) -> Memory:
    """Measure a model's memory on a private copy of it.

    Args:
        model: left unchanged.
        workload: batch, input, device, dtype, memory format and runtime.
        seed: of the input.
        phases: `forward` for the peak of that pass; any other for what backward needs. The rest stays None.

    Returns:
        Peaks above the memory in use before the pass, in bytes, and the bytes saved for backward. On the CPU, scratch
        memory that a kernel library takes from the system directly is not included. A failure (such as out of memory)
        is reported in `error`, next to what was measured before it.

    Raises:
        UnknownNameError: there is no such runtime.
        DeviceError: the runtime is not installed.
    """
    return backend(workload.runtime).memory(model, workload, seed=seed, phases=phases)
