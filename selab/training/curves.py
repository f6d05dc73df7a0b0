"""Learning curves for TensorBoard."""

from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Self

import msgspec

from selab.errors import SelabError
from selab.training.record import Epoch


class EpochCurves:
    """One point per epoch, written from the finished epochs each time a training starts or resumes.

    Args:
        folder: TensorBoard's event files go here; those of earlier processes are deleted.
        epochs: the finished ones.
    """

    def __init__(self, folder: Path, epochs: tuple[Epoch, ...]) -> None:
        # Importing it takes as long as an epoch of a small training.
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise SelabError(f"learning curves: {error.name} is not installed; pip install {error.name}") from None

        # Two files of one second have no order: points of a killed process could follow those of the next one.
        for earlier in folder.glob("events.out.tfevents.*"):
            earlier.unlink()
        # purge_step makes an open TensorBoard forget what it has read.
        self._writer = SummaryWriter(str(folder), purge_step=1)
        for epoch in epochs:
            self.add(epoch)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Where a full disk has ended the training, closing fails as well.
        with suppress(OSError) if kind is not None else nullcontext():
            self._writer.close()

    def add(self, epoch: Epoch) -> None:
        """Add an epoch's points and flush them to disk."""
        figures = msgspec.structs.asdict(epoch)
        del figures["epoch"], figures["seconds"]
        for name, value in figures.items():
            if value is not None:
                part, _, figure = name.partition("_")
                tag = f"{figure}/{part}" if part in ("train", "test") else name
                self._writer.add_scalar(tag, value, epoch.epoch)
        self._writer.flush()
