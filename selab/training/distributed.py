"""The processes of one training: the rank of this one, and what all of them must agree on.

`torchrun` sets the rank of each process; without it there is one process. CPU processes communicate through gloo, GPU
processes through NCCL. A process uses the GPU of its rank on its machine.
"""

import atexit
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from selab.errors import DeviceError, SelabError
from selab.records.types import Device

_T = TypeVar("_T")
_MOST_PROCESSES = 1_000_000
PATIENCE_S = 600.0
"""Seconds without a sign of the others after which a process gives up; enough to compile and load a first batch."""


@dataclass(frozen=True, kw_only=True)
class ProcessGroup:
    """The processes of a training, seen from this one.

    Attributes:
        rank: of this process; 0 writes and reports.
        world: how many processes there are.
        device: what it computes on.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes and reports."""
        return self.rank == 0

    def on_first(self, work: Callable[[], _T]) -> _T:
        """Call a function on rank 0; return its result, or raise its error, on every rank."""
        if self.world == 1:
            return work()
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = work()
            except SelabError as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, device=self.device)
        if outcome[1] is not None:
            raise outcome[1]
        result: _T = outcome[0]
        return result

    def rows(self, row: list[float]) -> list[list[float]]:
        """Return every rank's row of numbers, by rank; waits for all of them."""
        if self.world == 1:
            return [row]
        own = torch.tensor(row, dtype=torch.float64, device=self.device)
        gathered = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(gathered, own)
        return [each.tolist() for each in gathered]


def join(device: Device, *, patience_s: float = PATIENCE_S) -> ProcessGroup:
    """Join the other processes of this job; without `torchrun` there are none.

    The group stays until the process ends: torchrun's store keeps the first rendezvous, so that a second one fails. An
    existing group is used.

    Args:
        device: `cpu`, or `cuda` for the GPU of this process.
        patience_s: see `PATIENCE_S`; the first call's value counts.

    Raises:
        DeviceError: there is no such device, or not one for each process.
        SelabError: the other processes cannot be found.
    """
    exists = dist.is_available() and dist.is_initialized()
    world = dist.get_world_size() if exists else number_of("WORLD_SIZE", 1, least=1)
    if world == 1:
        return ProcessGroup(rank=0, world=1, device=_own_device(device, None))
    rank = dist.get_rank() if exists else number_of("RANK", 0, below=world)
    own = _own_device(device, number_of("LOCAL_RANK", rank, below=world))
    on_gpu = own.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(own)
    if not exists:
        try:
            dist.init_process_group(
                "nccl" if on_gpu else "gloo",
                timeout=timedelta(seconds=patience_s),
                device_id=own if on_gpu else None,
            )
        except (RuntimeError, ValueError) as error:
            raise SelabError(
                f"rank {rank} of {world}: cannot find the other processes: {str(error).partition(chr(10))[0]}; "
                "start all of them with torchrun"
            ) from None
        atexit.register(leave)
    return ProcessGroup(rank=rank, world=world, device=own)


def number_of(variable: str, otherwise: int, *, least: int = 0, below: int = _MOST_PROCESSES) -> int:
    """Return a number that torchrun puts into the environment.

    Raises:
        SelabError: another program put something else there.
    """
    text = os.environ.get(variable, "").strip() or str(otherwise)
    if re.fullmatch(r"[0-9]{1,9}", text) and least <= int(text) < below:
        return int(text)
    raise SelabError(
        f"{variable}={text[:40]}: is not a number from {least} to {below - 1}; start the processes with torchrun, or "
        "unset it"
    )


def leave() -> None:
    """Leave the process group; all processes do so together. Each goes on alone afterwards."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _own_device(device: Device, local_rank: int | None) -> torch.device:
    if device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise DeviceError("--device cuda: torch finds no CUDA device here; use --device cpu")
    index = torch.cuda.current_device() if local_rank is None else local_rank
    if index >= torch.cuda.device_count():
        raise DeviceError(
            f"--device cuda: process {index} of this machine has no GPU of its own, there are "
            f"{torch.cuda.device_count()}; start one process per GPU"
        )
    return torch.device("cuda", index)


def lost_another(error: BaseException) -> bool:
    """Return whether an error means that another process is gone or has been silent for too long."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    # gloo raises plain RuntimeErrors.
    return isinstance(error, RuntimeError) and any(
        word in text for word in ("gloo", "Connection closed by peer", "Connection reset by peer", "Timed out waiting")
    )
