"""ExecuTorch on a CPU, with the XNNPACK delegate."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from selab.bench.backends.deployed import DeployedBackend, Image, Loaded
from selab.deploy.target import muted
from selab.records.types import Workload

# Importing it writes what it finds out about the processor to standard error.
with muted():
    from executorch.extension.pybindings import portable_lib


class ExecuTorchBackend(DeployedBackend):
    """ExecuTorch. Its delegate's threads are one pool of the process, which is made anew for a session."""

    name = "executorch"
    title = "ExecuTorch"

    @contextmanager
    def session(self, workload: Workload, *, seed: int) -> Iterator[None]:
        """Set threads and affinity for the body."""
        with super().session(workload, seed=seed):
            with muted():
                portable_lib._unsafe_reset_threadpool(workload.threads)
            yield

    def load(self, model: nn.Module, workload: Workload, image: Image) -> Loaded:
        """Load a program; its outputs are not copied."""
        network = self.file_of(model)
        program: Any = portable_lib._load_for_executorch(str(network.path))
        inputs: list[Any] = []
        last: list[Any] = []

        def feed(image: Image) -> None:
            inputs[:] = [torch.from_numpy(image)]

        def call() -> None:
            last[:] = program.forward(inputs, clone_outputs=False)

        feed(image)
        return Loaded(call=call, feed=feed, outputs=lambda: last, place=network.path.name)


BACKEND = ExecuTorchBackend()
