"""Compile networks ahead of time with PyTorch's inductor, in fp32 or quantised by PT2E for x86."""

import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from selab.deploy.executorch import quantised_pt2e
from selab.deploy.spelling import Spelling
from selab.deploy.target import Order, Partitions, counted, exporting, muted, only_module, scratch
from selab.records.files import write_atomically


class AotiTarget:
    """AOTInductor on this machine's CPU: NAME.pt2, which holds compiled code.

    Weights are constants of the program (freezing), so that batch normalisations and layouts of weights are computed
    beforehand, and int8 layers become oneDNN's; without it they would be computed in fp32 without a word. The layouts
    are those of a number of threads.

    Source: github.com/pytorch/ao, issue 4566.
    """

    name = "aoti"
    suffix = ".pt2"
    spelling = Spelling(squeeze="mean", layers="linear")

    def write(self, order: Order) -> None:
        """Write the file; see `Target.write`."""
        model = only_module(order, self.name)
        with exporting(order, self.name), muted(), scratch() as folder, _threads(order.threads):
            program = torch.export.export(model.eval(), (order.example,))
            if order.precision == "int8":
                program = torch.export.export(_quantised(program, order), (order.example,))
            written = folder / "network.pt2"
            with torch.no_grad():
                torch._inductor.aoti_compile_and_package(
                    program, package_path=str(written), inductor_configs={"freezing": True}
                )
            content = written.read_bytes()
        write_atomically(order.path, content)

    def partitions(self, path: Path) -> Partitions:
        """Return the calls of the program: library operators by name, and loops that the compiler generated."""
        with zipfile.ZipFile(path) as package:
            sources = [name for name in package.namelist() if name.endswith(".wrapper.cpp")]
            text = "".join(package.read(name).decode() for name in sources)
        # The body of the run; what stands before it declares the loops.
        body = text[text.find("::run_impl(") :]
        calls = re.findall(r"\b(?:aoti_torch_cpu_(\w+)|(cpp_fused_\w+))\(", body)
        return Partitions(operators=counted([library or "generated loop" for library, _loop in calls]))


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _quantised(program: Any, order: Order) -> Any:
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    for path in order.float_blocks or ():
        quantizer.set_module_name_qconfig(path, None)
    return quantised_pt2e(program, quantizer, order)


TARGET = AotiTarget()
