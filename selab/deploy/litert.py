"""Write networks for LiteRT (TensorFlow Lite), in fp32 or quantised by AI Edge Quantizer."""

import re
from pathlib import Path

import numpy as np

from selab.deploy.spelling import Spelling
from selab.deploy.target import Order, Partitions, counted, exporting, muted, needed, only_module, scratch
from selab.records.files import write_atomically

_DELEGATE = "DELEGATE"


class LiteRtTarget:
    """LiteRT on a CPU: NAME.tflite, run by its XNNPACK delegate where that can run the operators."""

    name = "litert"
    suffix = ".tflite"
    spelling = Spelling(squeeze="pool", layers="conv")

    def write(self, order: Order) -> None:
        """Write the file; see `Target.write`."""
        model = only_module(order, self.name)
        with exporting(order, self.name), muted(), scratch() as folder:
            import litert_torch

            written = folder / "network.tflite"
            litert_torch.convert(model.eval(), (order.example,)).export(str(written))
            content = written.read_bytes() if order.precision == "fp32" else _quantised(written, order)
        write_atomically(order.path, content)

    def partitions(self, path: Path) -> Partitions:
        """Return the delegates of a network, and the operators that LiteRT's own kernels run."""
        with needed(self.name):
            from ai_edge_litert.interpreter import Interpreter
        with muted():
            interpreter = Interpreter(model_path=str(path), num_threads=1)
            interpreter.allocate_tensors()
            operators = interpreter._get_ops_details()
        # After delegation the plan ends with the delegates; the operators that they took are still listed.
        delegates = [one for one in operators if one["op_name"] == _DELEGATE]
        return Partitions(subgraphs=len(delegates), operators=counted([one["op_name"] for one in operators]))


def _quantised(path: Path, order: Order) -> bytes:
    from ai_edge_quantizer import algorithm_manager, qtyping, quantizer, recipe

    made = quantizer.Quantizer(str(path), recipe.static_wi8_ai8())
    names = qtyping.TFLOperationName
    # Images and logits stay in fp32, as in the other runtimes.
    left = [(".*", names.INPUT), (".*", names.OUTPUT)]
    left += [(_scope(one), names.ALL_SUPPORTED) for one in order.float_blocks or ()]
    for regex, operation in left:
        made.update_quantization_recipe(
            regex=regex, operation_name=operation, algorithm_key=algorithm_manager.AlgorithmName.NO_QUANTIZE
        )
    samples = [{"args_0": image.numpy()} for image in order.images]
    calibrated = made.calibrate({"serving_default": samples})
    for found in calibrated.values():
        # Of a layer whose units are all dead the range is a point, of which XNNPACK makes no scale. Zero stays zero.
        if not np.any(found["min"]) and not np.any(found["max"]):
            found["max"] = np.ones_like(found["max"])
    return bytes(made.quantize(calibrated).quantized_model)


def _scope(path: str) -> str:
    """Return what finds the operators of a module: their names hold `Class_name/Class_name/` for its path."""
    return "/".join(rf"[^/;]*_{re.escape(part)}" for part in path.split(".")) + "[/;]"


TARGET = LiteRtTarget()
