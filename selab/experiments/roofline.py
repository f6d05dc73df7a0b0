"""Rooflines as tables, and how far the roof is from what networks take."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from selab.bench.devices import DeviceSpec
from selab.bench.roofline import Peaks, Roofline, roofline
from selab.errors import SelabError
from selab.experiments.job import Request, workload_of
from selab.models import catalog
from selab.models.build import build
from selab.records.acceptance import Distance
from selab.records.types import Dtype


def published_peaks(device: DeviceSpec, dtype: Dtype) -> Peaks:
    """A device's published peaks as those of a roofline; it has one bandwidth, that of its memory."""
    return Peaks(
        dtype=dtype,
        flops_per_s=device.flops_per_s[dtype],
        bandwidths=((0, device.bandwidth),),
        source=f"published: {device.source}",
    )


def roofline_of(request: Request, peaks: Peaks, *, measured: bool, budget_s: float) -> Roofline:
    """Builds the network that is asked for and holds it under these peaks.

    Raises:
        SelabError: it cannot be built, or fails.
    """
    variant = catalog.find(request.arch)
    workload = workload_of(request, variant)
    built = build(variant, input_chw=workload.input_chw, device="cpu" if measured else "meta")
    return roofline(built.model, workload, peaks, native=built.native, measured=measured, budget_s=budget_s)


# ----------------------------------------------------------------------------------------------- how good a prediction
def distances(
    archs: Iterable[str], peaks: Peaks, report: Callable[[str, Any], object], *, budget_s: float = 0.0
) -> Iterator[Distance | SelabError]:
    """Each network's time over its least time, on this device; a network that fails gives its error.

    Args:
        archs: as `--arch`.
        peaks: of this device, on one CPU thread.
        report: told the name of each before it runs.
        budget_s: seconds to repeat each network for; it is run at least five times.
    """
    for arch in archs:
        report(arch, None)
        try:
            found = roofline_of(Request(arch=arch, threads=1), peaks, measured=True, budget_s=budget_s)
        except SelabError as error:
            yield error
            continue
        if found.whole_s is not None:
            yield Distance(name=arch, least_s=found.least_s, whole_s=found.whole_s)
