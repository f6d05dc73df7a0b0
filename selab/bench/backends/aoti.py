"""Programs of PyTorch's inductor, compiled ahead of time for this machine's CPU."""

from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from selab.bench.backends.deployed import DeployedBackend, Image, Loaded
from selab.records.types import Workload


class AotiBackend(DeployedBackend):
    """AOTInductor; its loops run on torch's threads."""

    name = "aoti"
    title = "AOTInductor"

    def load(self, model: nn.Module, workload: Workload, image: Image) -> Loaded:
        """Load a program. It is compiled code: only files that this project has just written are given here."""
        network = self.file_of(model)
        program: Any = torch._inductor.aoti_load_package(str(network.path))
        given: list[Any] = []
        last: list[Any] = []

        def feed(image: Image) -> None:
            given[:] = [torch.from_numpy(image)]

        def call() -> None:
            with torch.inference_mode():
                last[:] = [program(*given)]

        feed(image)
        return Loaded(call=call, feed=feed, outputs=lambda: tree_leaves(last), place=network.path.name)


BACKEND = AotiBackend()
