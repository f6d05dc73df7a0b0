"""ONNX Runtime on a CPU, with all of its graph optimisations."""

import onnxruntime
from torch import nn

from selab.bench.backends.deployed import DeployedBackend, Image, Loaded
from selab.errors import ModelError
from selab.graphs.module import OnnxNetwork
from selab.records.types import Workload

# Only errors: onnxruntime warns on standard error about every node that it would place elsewhere.
_ERRORS = 3


class OnnxRuntimeBackend(DeployedBackend):
    """ONNX Runtime.

    Its threads stop waiting actively when a call ends: they would do so on the cores that the other network needs.
    """

    name = "onnxruntime"
    title = "ONNX Runtime"

    def load(self, model: nn.Module, workload: Workload, image: Image) -> Loaded:
        """Load an ONNX network, its input and outputs bound."""
        if not isinstance(model, OnnxNetwork):
            raise ModelError(f"runtime onnxruntime: {type(model).__name__} is no ONNX network; name a file, NAME.onnx")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _ERRORS
        options.inter_op_num_threads = 1
        options.intra_op_num_threads = workload.threads
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = onnxruntime.InferenceSession(
            model.model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        (given,) = session.get_inputs()
        binding = session.io_binding()

        def feed(image: Image) -> None:
            binding.bind_cpu_input(given.name, image)

        feed(image)
        for output in session.get_outputs():
            binding.bind_output(output.name, "cpu")

        def call() -> None:
            session.run_with_iobinding(binding)

        return Loaded(call=call, feed=feed, outputs=binding.copy_outputs_to_cpu, place=model.place)


BACKEND = OnnxRuntimeBackend()
