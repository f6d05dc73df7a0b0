"""Rooflines of networks, and how much longer networks take than their roofline says."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from selab.bench.devices import DeviceSpec
from selab.bench.roofline import Peaks, Roofline, roofline
from selab.errors import SelabError
from selab.experiments.job import Job, Request, resolve
from selab.models.build import build
from selab.records.acceptance import Distance
from selab.records.types import Dtype


def published_peaks(device: DeviceSpec, dtype: Dtype) -> Peaks:
    """Return a device's published peaks; the one bandwidth is that of its memory."""
    return Peaks(
        dtype=dtype,
        flops_per_s=device.flops_per_s[dtype],
        bandwidths=((0, device.bandwidth),),
        source=f"published: {device.source}",
    )


def roofline_of(job: Job, peaks: Peaks, *, measured: bool, budget_s: float) -> Roofline:
    """Build the network and compare its operators with these peaks.

    Raises:
        SelabError: the network cannot be built, or fails.
    """
    workload = job.workload
    built = build(
        job.variant, input_chw=workload.input_chw, device="cpu" if measured else "meta", seed=job.request.seed
    )
    more: dict[str, Any] = {"native": built.native, "on": job.variant.on}
    return roofline(built.model, workload, peaks, measured=measured, budget_s=budget_s, **more)


# ----------------------------------------------------------------------------------------------- how good a prediction
def distances(
    archs: Iterable[str], peaks: Peaks, report: Callable[[str, Any], object], *, budget_s: float = 0.0
) -> Iterator[Distance | SelabError]:
    """Yield each network's time over its least time, on this device; a network that fails yields its error.

    Args:
        archs: as `--arch`.
        peaks: of this device, on one CPU thread.
        report: called with the name of each before it runs.
        budget_s: seconds to repeat each network for; it is run at least five times.
    """
    for arch in archs:
        report(arch, None)
        try:
            found = roofline_of(resolve(Request(arch=arch, threads=1)), peaks, measured=True, budget_s=budget_s)
        except SelabError as error:
            yield error
            continue
        if found.whole_s is not None:
            yield Distance(name=arch, least_s=found.least_s, whole_s=found.whole_s)
