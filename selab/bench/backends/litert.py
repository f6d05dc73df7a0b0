"""LiteRT (TensorFlow Lite) on a CPU, with the XNNPACK delegate."""

from typing import Any

from ai_edge_litert.interpreter import Interpreter
from torch import nn

from selab.bench.backends.deployed import DeployedBackend, Image, Loaded
from selab.deploy.target import muted
from selab.records.types import Workload


class LiteRtBackend(DeployedBackend):
    """LiteRT's interpreter, which applies its XNNPACK delegate by default."""

    name = "litert"
    title = "LiteRT"

    def load(self, model: nn.Module, workload: Workload, image: Image) -> Loaded:
        """Load a network with its input set."""
        network = self.file_of(model)
        with muted():
            interpreter: Any = Interpreter(model_path=str(network.path), num_threads=workload.threads)
            interpreter.allocate_tensors()
        (given,) = interpreter.get_input_details()

        def feed(image: Image) -> None:
            interpreter.set_tensor(given["index"], image)

        feed(image)
        places = [one["index"] for one in interpreter.get_output_details()]

        return Loaded(
            call=interpreter.invoke,
            feed=feed,
            outputs=lambda: [interpreter.get_tensor(place) for place in places],
            place=network.path.name,
        )


BACKEND = LiteRtBackend()
