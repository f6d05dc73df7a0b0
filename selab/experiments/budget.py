"""Budgets for networks: limits on cost, memory and time beside a baseline, and what a network makes of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from selab import units
from selab.bench.memory import memory
from selab.bench.runner import check_device
from selab.errors import SelabError, SpecError, UnknownNameError, nearest
from selab.experiments.job import Request, resolve
from selab.experiments.profiling import Profile, count_job
from selab.models import catalog
from selab.models.build import build
from selab.records import verdict
from selab.records.toml import converted, read_tables
from selab.records.types import PHASE_NAMES, Cost, Device, Dtype, Frozen, Latency, Memory, MemoryFormat, Phase
from selab.records.verdict import change_words
from selab.units import NONE

HEADER = "budgets"
Limit = Annotated[float, msgspec.Meta(gt=0)]
Natural = Annotated[int, msgspec.Meta(ge=1)]
State = Literal["within", "over", "not_decided", "no_result"]


class Budget(Frozen, frozen=True, kw_only=True):
    """What a network may cost; every limit is the most that is allowed, and those that are left out are not checked.

    Attributes:
        arch: as `--arch`; the table's own name if it is left out.
        baseline: what ratios are to; the variant's own if it is left out.
        params: learnable parameters.
        macs: of a forward pass, by `macs_convention`.
        bytes: moved in a forward pass.
        params_ratio: to the baseline's, as `macs_ratio`.
        latency_ratio: of the forward pass, measured side by side with the baseline's.
        latency_ratio_forward_backward: of both passes.
        peak_memory: of a forward pass, in bytes.
        peak_memory_forward_backward: of both passes, in bytes.
    """

    arch: str = ""
    baseline: str | None = None
    batch: Natural = 1
    resolution: Natural | None = None
    device: Device = "cpu"
    dtype: Dtype = "fp32"
    memory_format: MemoryFormat = "contiguous"
    compiled: bool = False
    threads: Natural | None = None
    macs_convention: Literal["conv_linear", "paper", "all"] = "conv_linear"
    params: Limit | None = None
    macs: Limit | None = None
    bytes: Limit | None = None
    params_ratio: Limit | None = None
    macs_ratio: Limit | None = None
    latency_ratio: Limit | None = None
    latency_ratio_forward_backward: Limit | None = None
    peak_memory: Limit | None = None
    peak_memory_forward_backward: Limit | None = None


LIMITS = tuple(name for name in Budget.__struct_fields__ if Budget.__annotations__[name] == Limit | None)
_PHASES: dict[str, Phase] = {"latency_ratio": "forward", "latency_ratio_forward_backward": "forward_backward"}
_PEAKS = {
    "peak_memory": "peak_forward_bytes",
    "peak_memory_forward_backward": "peak_forward_backward_bytes",
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One limit and what was found.

    Attributes:
        name: of the budget.
        limit: the key.
        found: the value; None where there is no result.
        interval: of a measured ratio, what is not excluded at 95 %.
        state: a ratio is `over` only if its whole interval is, and `within` only if its whole interval is.
        text: the value in words.
    """

    name: str
    limit: str
    allowed: float
    found: float | None
    interval: tuple[float, float] | None
    state: State
    text: str


def read_budgets(path: Path, *, only: Sequence[str] = ()) -> dict[str, Budget]:
    """The `[budgets.NAME]` tables of a file.

    Args:
        path: a TOML file.
        only: names; all of them if it is empty.

    Raises:
        SpecError: the file cannot be read, has an unknown key or a wrong value, or a budget without a limit.
        UnknownNameError: a budget of `only` that is not in the file, or a network that is not to be had.
    """
    found = {}
    for name, table in read_tables(path, HEADER).items():
        place = f"{path}: {HEADER}.{name}"
        budget = converted(table, Budget, place=place)
        if all(getattr(budget, limit) is None for limit in LIMITS):
            raise SpecError(f"{place}: limits nothing; give one of {', '.join(LIMITS)}")
        found[name] = msgspec.structs.replace(budget, arch=budget.arch or name)
    for name in only:
        if name not in found:
            raise UnknownNameError(f"{path}: has no budget {name}{nearest(name, found)}")
    chosen = {name: budget for name, budget in found.items() if not only or name in only}
    for name, budget in chosen.items():
        _check_networks(budget, place=f"{path}: {HEADER}.{name}")
    return chosen


def _check_networks(budget: Budget, *, place: str) -> None:
    variant = catalog.find(budget.arch, option=f"{place}.arch")
    if budget.baseline is not None:
        catalog.find(budget.baseline, option=f"{place}.baseline")
    ratios = [limit for limit in LIMITS if "ratio" in limit and getattr(budget, limit) is not None]
    if ratios and budget.baseline is None and catalog.baseline_of(variant) is None:
        raise SpecError(f'{place}.{ratios[0]}: {budget.arch} has no baseline; name one: baseline = "NAME"')


def check(
    budgets: dict[str, Budget],
    report: Callable[[str, Any], object],
    *,
    quick: bool = True,
    processes: int = 1,
) -> Iterator[Finding]:
    """Counts all, so that mistakes are told at once; then measures where a budget asks for it, limit by limit.

    Raises:
        SelabError: a network cannot be built or measured, or a device is not there; names the budget.
    """
    for name, budget in budgets.items():
        report(f"{name}: counting", None)
        try:
            _costs(budget)
            if any(getattr(budget, limit) is not None for limit in (*_PHASES, *_PEAKS)):
                check_device(budget.device)
        except SelabError as error:
            raise SelabError(f"{HEADER}.{name}: {error}") from None
    for name, budget in budgets.items():
        report(name, None)
        yield from _check_one(name, budget, _named(report, name), quick=quick, processes=processes)


def _named(report: Callable[[str, Any], object], name: str) -> Callable[[str, Any], object]:
    return lambda label, state: report(f"{name}: {label}", state)


def _request(budget: Budget, *, quick: bool, processes: int) -> Request:
    phases = tuple(phase for limit, phase in _PHASES.items() if getattr(budget, limit) is not None)
    return Request(
        arch=budget.arch,
        baseline=budget.baseline,
        device=budget.device,
        batch=budget.batch,
        resolution=budget.resolution,
        dtype=budget.dtype,
        memory_format=budget.memory_format,
        compiled=budget.compiled,
        threads=budget.threads or 1,
        quick=quick,
        processes=processes,
        phases=phases,
    )


def _check_one(
    name: str, budget: Budget, report: Callable[[str, Any], object], *, quick: bool, processes: int
) -> Iterator[Finding]:
    job = resolve(_request(budget, quick=quick, processes=processes))
    latency: dict[Phase, Latency] = {}
    used: Memory | None = None
    if job.request.phases:
        profile = Profile(job)
        profile.run(report)
        cost, base, latency, used = profile.cost, profile.baseline_cost, profile.latency, profile.memory
        assert cost is not None
    else:
        cost, base = _costs(budget)
        if any(getattr(budget, limit) is not None for limit in _PEAKS):
            used = memory(build(job.variant, input_chw=job.workload.input_chw).model, job.workload)
    for limit in LIMITS:
        allowed = getattr(budget, limit)
        if allowed is None:
            continue
        if limit in _PHASES:
            yield _ratio_finding(name, limit, allowed, latency.get(_PHASES[limit]))
        elif limit in _PEAKS:
            value = None if used is None else getattr(used, _PEAKS[limit])
            yield _finding(name, limit, allowed, value, units.size, missing="" if used is None else used.error)
        else:
            yield _cost_finding(name, limit, allowed, budget, cost, base)


def _costs(budget: Budget) -> tuple[Cost, Cost | None]:
    record = count_job(resolve(_request(budget, quick=True, processes=1)), counters=False)
    return record.cost, record.baseline_cost


def _cost_finding(name: str, limit: str, allowed: float, budget: Budget, cost: Cost, base: Cost | None) -> Finding:
    key = limit.removesuffix("_ratio")

    def value(of: Cost) -> float:
        return float(getattr(of.macs, budget.macs_convention) if key == "macs" else getattr(of, key))

    if limit == key:
        return _finding(name, limit, allowed, value(cost), units.size if key == "bytes" else units.count)
    ratio = None if base is None else value(cost) / value(base)
    return _finding(name, limit, allowed, ratio, plain_ratio)


def _finding(
    name: str, limit: str, allowed: float, found: float | None, show: units.Format, *, missing: str = ""
) -> Finding:
    state: State = "no_result" if found is None else "over" if found > allowed else "within"
    text = (missing or NONE) if found is None else show(found)
    return Finding(name=name, limit=limit, allowed=allowed, found=found, interval=None, state=state, text=text)


def _ratio_finding(name: str, limit: str, allowed: float, latency: Latency | None) -> Finding:
    left = None if latency is None else verdict.not_excluded(latency)
    if latency is None or left is None or latency.ratio is None:
        text = "not measured" if latency is None else latency.verdict
        return Finding(name=name, limit=limit, allowed=allowed, found=None, interval=None, state="no_result", text=text)
    low, high = 1 + left[0], 1 + left[1]
    state: State = "over" if low > allowed else "within" if high <= allowed else "not_decided"
    text = f"{PHASE_NAMES[latency.phase]} {change_words(latency)}"
    return Finding(
        name=name, limit=limit, allowed=allowed, found=latency.ratio, interval=(low, high), state=state, text=text
    )


def plain_ratio(value: float) -> str:
    """Format a ratio with four significant digits."""
    return f"{value:.4g}"
