"""Records by machine: times of different machines never share a column."""

from collections.abc import Sequence
from typing import Protocol, TypeVar

from selab.errors import RecordError
from selab.records.types import Machine


class Measured(Protocol):
    """What says where it was measured."""

    @property
    def machine(self) -> Machine:
        """The machine that measured it."""


_R = TypeVar("_R", bound=Measured)


def by_machine(records: Sequence[_R]) -> dict[str, list[_R]]:
    """Return records by machine and version of torch, in words."""
    groups: dict[str, list[_R]] = {}
    for record in records:
        version = record.machine.libraries.get("torch", "")
        groups.setdefault(f"{record.machine.name} with torch {version}", []).append(record)
    return groups


def check_one_machine(records: Sequence[Measured], *, one_torch: bool = True) -> None:
    """Refuse records that do not share their circumstances.

    Args:
        records: any kind.
        one_torch: whether versions of torch must agree too.

    Raises:
        RecordError: they are of several machines, or of several versions of torch.
    """
    places = list(by_machine(records) if one_torch else dict.fromkeys(record.machine.name for record in records))
    if len(places) > 1:
        raise RecordError(
            f"records of different machines do not share a picture: {'; '.join(sorted(places))}; "
            "name one machine's folder"
        )
