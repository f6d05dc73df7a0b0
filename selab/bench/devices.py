"""Published peaks of devices, with their source, and the bandwidth of copies by size."""

from collections.abc import Sequence
from importlib.resources import as_file, files
from typing import Annotated

import msgspec

from selab.errors import SpecError, UnknownNameError, nearest
from selab.records.toml import converted, read_tables
from selab.records.types import Dtype, Frozen

Rate = Annotated[float, msgspec.Meta(gt=0)]


class DeviceSpec(Frozen, frozen=True, kw_only=True):
    """A device's published peaks.

    Attributes:
        flops_per_s: dense arithmetic by dtype, in floating-point operations per second.
        bandwidth: of its memory, in bytes per second.
    """

    title: str
    source: str
    flops_per_s: dict[Dtype, Rate]
    bandwidth: Rate
    note: str = ""


def devices() -> dict[str, DeviceSpec]:
    """Return all declared devices by name."""
    with as_file(files("selab.bench") / "devices.toml") as path:
        return {
            name: converted(table, DeviceSpec, place=f"devices.toml: devices.{name}")
            for name, table in read_tables(path, "devices").items()
        }


def find_device(name: str, dtype: Dtype, *, option: str = "--as") -> DeviceSpec:
    """Return the published peaks of a device.

    Raises:
        UnknownNameError: there is none of this name.
        SpecError: it has no published peak in this dtype.
    """
    known = devices()
    if name not in known:
        raise UnknownNameError(f"{option} {name}: no such device{nearest(name, known)}")
    found = known[name]
    if dtype not in found.flops_per_s:
        raise SpecError(f"{option} {name}: has no published peak in {dtype}; there are {', '.join(found.flops_per_s)}")
    return found


def copy_bandwidth(bandwidths: Sequence[tuple[int, float]], moved: int) -> float:
    """Return the bytes per second of the largest copy that moves no more than `moved` bytes, or of the smallest copy.

    Args:
        bandwidths: (bytes moved, bytes per second) of copies, the smallest first.
        moved: bytes.
    """
    fitting = [rate for size, rate in bandwidths if size <= moved]
    # A larger copy that was faster says that the smaller one was disturbed, or too short.
    larger = [rate for size, rate in bandwidths if size > moved]
    return max(fitting[-1] if fitting else 0.0, *larger, bandwidths[-1][1])
