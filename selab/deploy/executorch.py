"""Write networks for ExecuTorch with the XNNPACK delegate, in fp32 or quantised by PT2E."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from selab.deploy.spelling import Spelling
from selab.deploy.target import Order, Partitions, counted, exporting, muted, needed, only_module
from selab.records.files import write_atomically


class ExecuTorchTarget:
    """ExecuTorch on a CPU: NAME.pte, its operators delegated to XNNPACK where that can run them."""

    name = "executorch"
    suffix = ".pte"
    spelling = Spelling(squeeze="pool", layers="conv")

    def write(self, order: Order) -> None:
        """Write the file; see `Target.write`."""
        model = only_module(order, self.name)
        with exporting(order, self.name), muted():
            buffer = bytes(_lowered(model, order).to_executorch().buffer)
        write_atomically(order.path, buffer)

    def partitions(self, path: Path) -> Partitions:
        """Return the delegates of a program, and the operators that its portable kernels run."""
        with needed(self.name):
            from executorch.exir._serialize._program import deserialize_pte_binary
        plan = deserialize_pte_binary(path.read_bytes()).program.execution_plan[0]
        calls, delegates = [], 0
        for chain in plan.chains:
            for instruction in chain.instructions:
                arguments: Any = instruction.instr_args
                kind = type(arguments).__name__
                delegates += kind == "DelegateCall"
                if kind == "KernelCall":
                    operator = plan.operators[arguments.op_index]
                    calls.append(operator.name.removeprefix("aten::"))
        outside = counted(calls)
        return Partitions(subgraphs=delegates, outside=outside, operators=outside | {"delegate": delegates})


def _lowered(model: nn.Module, order: Order) -> Any:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    program = torch.export.export(model.eval(), (order.example,))
    if order.precision == "int8":
        program = torch.export.export(_quantised(program, order), (order.example,))
    return to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])


def _quantised(program: Any, order: Order) -> Any:
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )

    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    if order.float_blocks is not None:
        quantizer.set_filter_function(outside_of(order.float_blocks))
    return quantised_pt2e(program, quantizer, order)


def outside_of(paths: tuple[str, ...]) -> Callable[[Any], bool]:
    """Return whether a node of an exported program is in none of these modules."""

    def is_outside(node: Any) -> bool:
        held = [path for path, _kind in node.meta.get("nn_module_stack", {}).values()]
        return not any(path == one or path.startswith(f"{one}.") for path in held for one in paths)

    return is_outside


def quantised_pt2e(program: Any, quantizer: Any, order: Order) -> Any:
    """Return the module of an exported program, quantised after calibration on the order's images."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    prepared = prepare_pt2e(program.module(), quantizer)
    with torch.no_grad():
        for image in order.images:
            prepared(image)
    return convert_pt2e(prepared)


TARGET = ExecuTorchTarget()
