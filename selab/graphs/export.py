"""Write a PyTorch network as ONNX, as PyTorch's own exporter spells it."""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import nn

from selab.errors import ModelError, one_line
from selab.graphs.reading import onnx
from selab.records.files import write_atomically

_OPSET = 18


def export_onnx(model: nn.Module, image: tuple[int, ...], path: Path, *, name: str) -> None:
    """Write a network of one image as an ONNX file, in eval mode and with its weights inside.

    Args:
        model: its mode is restored.
        image: (N, C, H, W) of the input.
        path: of the file; it is written as a whole or not at all.
        name: of the network, for messages.

    Raises:
        DeviceError: the package onnx is not installed.
        ModelError: PyTorch cannot export it, or it is larger than a file can hold.
        RecordError: the file cannot be written.
    """
    onnx()
    modes = {module: module.training for module in model.modules()}
    written = io.BytesIO()
    try:
        with _quiet():
            # The exporter by tracing takes a file object, which its annotation forgets.
            to: Any = written
            torch.onnx.export(
                model.eval(), (torch.zeros(image),), to, dynamo=False, opset_version=_OPSET, input_names=["x"]
            )
    except Exception as error:
        raise ModelError(f"{name}: cannot be exported to ONNX: {one_line(error)}") from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    write_atomically(path, written.getvalue())


@contextmanager
def _quiet() -> Iterator[None]:
    """Drop what the exporter says of itself."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
