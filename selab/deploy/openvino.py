"""Write networks for OpenVINO, from their ONNX form, in fp32 or quantised by NNCF."""

from pathlib import Path

from selab.deploy.onnx import block_operators, onnx_of
from selab.deploy.spelling import Spelling
from selab.deploy.target import Order, Partitions, counted, exporting, muted, needed, scratch
from selab.records.files import write_atomically


class OpenVinoTarget:
    """OpenVINO on a CPU: NAME.xml, and the weights in NAME.bin beside it."""

    name = "openvino"
    suffix = ".xml"
    spelling = Spelling(squeeze="pool", layers="conv")

    def write(self, order: Order) -> None:
        """Write both files; see `Target.write`."""
        model = onnx_of(order)
        with exporting(order, self.name), scratch() as folder:
            import openvino

            source, written = folder / "network.onnx", folder / "network.xml"
            source.write_bytes(model.SerializeToString())
            network = openvino.convert_model(source)
            if order.precision == "int8":
                import nncf

                kept = [] if order.float_blocks is None else block_operators(model)
                with muted():
                    network = nncf.quantize(
                        network,
                        nncf.Dataset([image.numpy() for image in order.images]),
                        subset_size=len(order.images),
                        ignored_scope=nncf.IgnoredScope(names=kept, validate=False) if kept else None,
                    )
            openvino.save_model(network, written, compress_to_fp16=False)
            weights, described = written.with_suffix(".bin").read_bytes(), written.read_bytes()
        # A reader that finds the description finds its weights.
        write_atomically(order.path.with_suffix(".bin"), weights)
        write_atomically(order.path, described)

    def partitions(self, path: Path) -> Partitions:
        """Return the operators that OpenVINO's CPU plug-in runs, and its changes of memory layout."""
        with needed(self.name):
            import openvino
        core = openvino.Core()
        compiled = core.compile_model(str(path), "CPU", {"INFERENCE_NUM_THREADS": 1})
        kinds = []
        for node in compiled.get_runtime_model().get_ordered_ops():
            kind = node.get_rt_info()["layerType"].astype(str)
            if kind not in ("Parameter", "Result", "Input", "Output", "Constant", "Const"):
                kinds.append(kind)
        found = counted(kinds)
        return Partitions(reorders=found.get("Reorder", 0), operators=found)


TARGET = OpenVinoTarget()
