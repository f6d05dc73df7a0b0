"""Evaluate a network on all test images, over all processes.

What is counted depends on the data: a classifier's right answers here, a detector's boxes in
`selab.training.detection`.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from selab.errors import DeviceError, ModelError, SelabError
from selab.meta import evaluating
from selab.training.record import TOP5_CLASSES, Accuracy, Amp, task_of
from selab.training.tally import NotFiniteError, Tally, Totals, passed, unreadable_in

if TYPE_CHECKING:
    from selab.training.data import Data


__all__ = ["AMP_TYPES", "Accuracy", "NotFiniteError", "evaluate"]
AMP_TYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def evaluate(
    model: nn.Module,
    data: "Data",
    *,
    batch: int = 500,
    device: str | torch.device = "cpu",
    amp: Amp = "off",
    channels_last: bool = False,
    report: Callable[[int, int], None] | None = None,
) -> Accuracy:
    """Count right answers and average the cross entropy over all test images, in float64; of a detector, find the AP.

    Under `torch.distributed` every rank calls it and gets the same result. Each takes its share of the images, with
    rank 0's buffers: batch norm's running statistics differ between ranks during training.

    Args:
        model: on `device`. Modes, gradients and buffers are restored, and nothing is drawn at random.
        data: the test images.
        batch: images per pass, over all ranks; rounded up to a multiple of their number. Changes the result of a
            classifier only by rounding; a detector pads the images of a pass to one size.
        device: where the images go.
        amp: what the forward pass computes in; the loss is computed in float64 from its logits.
        channels_last: the images' memory format, where a batch is one tensor.
        report: called after each batch with this rank's images so far, and the number of all test images.

    Returns:
        `top5_correct` is None below six classes. `skipped` names the first corrupt and truncated images of an image
        folder; `data.test_size - images` is how many there are.

    Raises:
        ModelError: the forward pass fails, or its output is not one logit per class and image, or not the boxes of
            a detector.
        NotFiniteError: logits are not finite.
        OutOfMemoryError: the device does not hold a batch.
        DeviceError: the model is on another device.
        SelabError: there are no test images, they cannot be read, or `test_batches` does not give each once.
    """
    device = torch.device(device)
    network = model.module if isinstance(model, DistributedDataParallel) else model
    rank, world = _rank_and_world()
    tally, problem = tally_of(data), None
    try:
        _check_device(network, device)
        batches = data.test_batches(batch=-(-batch // world) * world, device=device, rank=rank, world=world)
        precision = torch.autocast(device.type, dtype=AMP_TYPES[amp], enabled=amp != "off")
        with evaluating(network), _buffers_of_rank_zero(network, world), torch.no_grad():
            for images, labels in batches:
                if not len(labels):
                    continue
                if channels_last and isinstance(images, Tensor):
                    images = images.contiguous(memory_format=torch.channels_last)
                with precision:
                    outputs = tally.run(network, images)
                tally.add(outputs, labels)
                if report is not None:
                    report(tally.images, data.test_size)
    except SelabError as error:
        # Other ranks wait for this one's counts: they must receive its error before it is raised.
        problem = error
    ranks = _of_all_ranks(tally, problem, world)
    images = sum(each.images for each in ranks)
    if not images:
        raise SelabError(f"{data.title}: holds no test images; name a data set that does")
    missing = data.test_size - images
    if missing < 0 or (missing and not any(each.unreadable for each in ranks)):
        raise SelabError(
            f"{data.title}: gave {images} test images of {data.test_size}; its test_batches must give each once"
        )
    return tally.result(ranks, sorted({name for each in ranks for name in each.skipped}))


def tally_of(data: "Data") -> Tally:
    """Return what is counted on these images."""
    if task_of(data) == "detection":
        from selab.training.detection import Detections

        return Detections(data)
    return _Counted(data)


class _Counted:
    """Counts of this rank, kept on the device so that batches do not wait for them."""

    def __init__(self, data: "Data") -> None:
        self.data = data
        self.images = 0
        self.sums: Tensor | None = None

    def run(self, network: nn.Module, images: Tensor) -> Tensor:
        """See `Tally.run`: logits (n, classes)."""
        return _logits(network, images, self.data)

    def add(self, outputs: Tensor, labels: Tensor) -> None:
        """See `Tally.add`: logits (n, classes) and labels (n,)."""
        logits = outputs.double()
        # One ranking for both, so that tied logits cannot be right for top-1 and wrong for top-5.
        ranked = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        sums = torch.stack(
            [
                ranked[:, 0].sum().double(),
                ranked.sum().double(),
                F.cross_entropy(logits, labels, reduction="sum"),
                (~logits.isfinite().all(dim=1)).sum().double(),
            ]
        )
        self.sums = sums if self.sums is None else self.sums + sums
        self.images += len(labels)

    def totals(self) -> "_Totals":
        """See `Tally.totals`."""
        top1, top5, loss, not_finite = [0.0] * 4 if self.sums is None else self.sums.tolist()
        return _Totals(
            images=self.images,
            top1_correct=round(top1),
            top5_correct=round(top5),
            loss=loss,
            not_finite=round(not_finite),
            **unreadable_in(self.data),
        )

    def result(self, ranks: "list[_Totals]", skipped: list[str]) -> Accuracy:
        """See `Tally.result`."""
        images = sum(each.images for each in ranks)
        not_finite = sum(each.not_finite for each in ranks)
        if not_finite:
            raise NotFiniteError(
                f"logits of {not_finite} of {images} images are not finite; the weights may be broken, or the training "
                "have diverged: try a smaller learning rate, or no mixed precision"
            )
        top5 = sum(each.top5_correct for each in ranks) if self.data.num_classes >= TOP5_CLASSES else None
        return Accuracy(
            images=images,
            top1_correct=sum(each.top1_correct for each in ranks),
            top5_correct=top5,
            loss=math.fsum(each.loss for each in ranks) / images,
            skipped=tuple(skipped),
        )


@dataclass(frozen=True, kw_only=True)
class _Totals(Totals):
    top1_correct: int
    top5_correct: int
    loss: float
    not_finite: int


def _rank_and_world() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _check_device(network: nn.Module, device: torch.device) -> None:
    first = next(network.parameters(), None)
    if first is not None and first.device.type != device.type:
        raise DeviceError(
            f"{type(network).__name__}: is on {first.device.type}, the images go to {device.type}; move it there"
        )


@contextmanager
def _buffers_of_rank_zero(network: nn.Module, world: int) -> Iterator[None]:
    """Use rank 0's buffers on all ranks, then restore each rank's own."""
    if world == 1:
        yield
        return
    buffers = list(network.buffers())
    kept = [buffer.clone() for buffer in buffers]
    try:
        for buffer in buffers:
            dist.broadcast(buffer, 0)
        yield
    finally:
        for buffer, own in zip(buffers, kept, strict=True):
            buffer.copy_(own)


def check_network(network: nn.Module, data: "Data") -> None:
    """Check with one black image that a network is a classifier for these images, or a detector.

    Args:
        network: on the CPU; not changed.
        data: the image size and the classes.

    Raises:
        ModelError: its forward pass fails, or does not return one logit per class, or no boxes.
        OutOfMemoryError: the pass does not fit.
    """
    was_training = network.training
    network.eval()
    try:
        with torch.no_grad():
            images = torch.zeros(1, *data.input_chw)
            tally_of(data).run(network, images if task_of(data) == "classification" else list(images))
    finally:
        network.train(was_training)


def _logits(network: nn.Module, images: Tensor, data: "Data") -> Tensor:
    name = type(network).__name__
    logits = passed(network, images, tuple(images.shape), data)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
        found = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"type {type(logits).__name__}"
        raise ModelError(f"{name}: its output is of {found}, not one row of logits per image; give a classifier")
    if logits.shape[1] != data.num_classes:
        raise ModelError(
            f"{name}: has {logits.shape[1]} classes, {data.title} has {data.num_classes}; "
            f"build it with num_classes={data.num_classes}"
        )
    return logits


def _of_all_ranks(tally: Tally, problem: SelabError | None, world: int) -> list[Totals]:
    """Return every rank's counts, by rank; raise one rank's error on all."""
    if world == 1:
        if problem is not None:
            raise problem
        return [tally.totals()]
    told: list[Any] = [None] * world
    dist.all_gather_object(told, tally.totals() if problem is None else str(problem))
    if problem is not None:
        raise problem
    for rank, each in enumerate(told):
        if isinstance(each, str):
            raise ModelError(f"rank {rank}: {each}")
    return told
