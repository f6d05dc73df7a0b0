"""OpenVINO on a CPU."""

from typing import Any

import openvino
from torch import nn

from selab.bench.backends.deployed import DeployedBackend, Image, Loaded
from selab.records.types import Workload


class OpenVinoBackend(DeployedBackend):
    """OpenVINO's CPU plug-in: one stream, for latency.

    Without the hint it computes fp32 networks in bf16 on processors that have it.
    """

    name = "openvino"
    title = "OpenVINO"

    def load(self, model: nn.Module, workload: Workload, image: Image) -> Loaded:
        """Load a network with its input set."""
        network = self.file_of(model)
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": workload.threads,
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,
        }
        compiled = openvino.Core().compile_model(str(network.path), "CPU", settings)
        request: Any = compiled.create_infer_request()
        held: list[Any] = []

        def feed(image: Image) -> None:
            # The request refers to the array and does not keep it alive.
            held[:] = [image]
            request.set_input_tensor(openvino.Tensor(image, shared_memory=True))

        feed(image)

        def call() -> None:
            request.start_async()
            request.wait()

        def outputs() -> list[Any]:
            return [request.get_output_tensor(place).data for place in range(len(compiled.outputs))]

        return Loaded(call=call, feed=feed, outputs=outputs, place=network.path.name)


BACKEND = OpenVinoBackend()
