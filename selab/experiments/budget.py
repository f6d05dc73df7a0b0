"""Budgets for networks: limits on cost, memory and time, and whether a network keeps them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import msgspec

from selab import units
from selab.errors import SelabError, SpecError, UnknownNameError, nearest
from selab.experiments.job import Job, Request, network_address, parse_input, resolve
from selab.models import catalog
from selab.records import verdict
from selab.records.bounds import MOST_IMAGES, MOST_PIXELS, MOST_THREADS
from selab.records.toml import converted, read_tables
from selab.records.types import PHASE_NAMES, Cost, Device, Dtype, Frozen, Latency, Memory, MemoryFormat, Mode, On, Phase
from selab.records.verdict import change_words
from selab.units import NONE

HEADER = "budgets"
Limit = Annotated[float, msgspec.Meta(gt=0)]
Natural = Annotated[int, msgspec.Meta(ge=1, le=MOST_IMAGES)]
Side = Annotated[int, msgspec.Meta(ge=1, le=MOST_PIXELS)]
Threads = Annotated[int, msgspec.Meta(ge=1, le=MOST_THREADS)]
Seed = Annotated[int, msgspec.Meta(ge=0)]
State = Literal["within", "over", "not_decided", "no_result"]


class Budget(Frozen, frozen=True, kw_only=True):
    """What a network may cost. Every limit is a maximum; a limit that is left out is not checked.

    Attributes:
        arch: as `--arch`; the table's own name if it is left out.
        baseline: what ratios are to; the variant's own baseline if it is left out.
        se: attention blocks to insert or change, as `--se`.
        insert: where, as `--insert`.
        input: the shape `CxHxW`, as `--input`; the network's own if it is left out.
        resolution: height and width, instead of `input`.
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
    se: str | None = None
    insert: str | tuple[str, ...] = ()
    batch: Natural = 1
    input: str | None = None
    resolution: Side | None = None
    on: On = "fake"
    device: Device = "cpu"
    dtype: Dtype = "fp32"
    memory_format: MemoryFormat = "contiguous"
    mode: Mode = "auto"
    compiled: bool = False
    fused: bool = False
    hold_heap: bool | None = None
    threads: Threads | None = None
    seed: Seed = 0
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

    @property
    def address(self) -> str:
        """The network with its blocks, as `--arch`."""
        insert = (self.insert,) if isinstance(self.insert, str) else self.insert
        return network_address(self.arch, self.se, insert)

    def request(self, effort: Mapping[str, Any]) -> Request:
        """Return what must be measured for the limits; no phase where no limit is a time.

        Args:
            effort: fields of the request that say how long to measure.

        Raises:
            SpecError: `input` is not CxHxW.
        """
        return Request(
            arch=self.address,
            baseline=self.baseline,
            device=self.device,
            batch=self.batch,
            input_chw=None if self.input is None else parse_input(self.input, option="input"),
            resolution=self.resolution,
            on=self.on,
            dtype=self.dtype,
            memory_format=self.memory_format,
            mode=self.mode,
            compiled=self.compiled,
            fused=self.fused,
            held_heap=self.hold_heap,
            threads=self.threads or 1,
            seed=self.seed,
            **effort,
            phases=tuple(phase for limit, phase in _PHASES.items() if getattr(self, limit) is not None),
        )


LIMITS = tuple(name for name in Budget.__struct_fields__ if Budget.__annotations__[name] == Limit | None)
_PHASES: dict[str, Phase] = {"latency_ratio": "forward", "latency_ratio_forward_backward": "forward_backward"}
_PEAK_PHASES: dict[str, Phase] = {"peak_memory": "forward", "peak_memory_forward_backward": "forward_backward"}
_PEAKS = {
    "peak_memory": "peak_forward_bytes",
    "peak_memory_forward_backward": "peak_forward_backward_bytes",
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One limit and the value that was found.

    Attributes:
        name: of the budget.
        limit: the key.
        found: the value; None where there is no result.
        interval: of a measured ratio, at 95 %.
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


def changes_of(fields: Mapping[str, Any], *, se: str | None, insert: Sequence[str]) -> dict[str, Any]:
    """Return the keys of a budget that options of the command line replace.

    Args:
        fields: of a request, as the options give them.
        se: blocks to insert, if given.
        insert: where, if given.
    """
    names = {"held_heap": "hold_heap", "input_chw": "input"}
    found = {names.get(name, name): value for name, value in fields.items()}
    if "input" in found:
        found |= {"input": "x".join(map(str, found["input"])), "resolution": None}
    elif "resolution" in found:
        found["input"] = None
    found |= {} if se is None else {"se": se}
    return found | ({"insert": tuple(insert)} if insert else {})


def read_budgets(
    path: Path, *, only: Sequence[str] = (), changes: Mapping[str, Any] | None = None
) -> dict[str, Budget]:
    """Read the `[budgets.NAME]` tables of a file; nothing that needs torch is imported.

    Args:
        path: a TOML file.
        only: names; all of them if it is empty.
        changes: keys that replace those of every budget, as from `changes_of`.

    Raises:
        SpecError: the file cannot be read, has an unknown key or a wrong value, or a budget without a limit.
        UnknownNameError: a budget of `only` that is not in the file, or a network that is not found.
    """
    tables = read_tables(path, HEADER)
    for name in only:
        if name not in tables:
            raise UnknownNameError(f"{path}: has no budget {name}{nearest(name, tables)}")
    found = {}
    for name, table in tables.items():
        place = f"{path}: {HEADER}.{name}"
        budget = converted(table, Budget, place=place)
        if all(getattr(budget, limit) is None for limit in LIMITS):
            raise SpecError(f"{place}: limits nothing; give one of {', '.join(LIMITS)}")
        if budget.input is not None:
            parse_input(budget.input, option=f"{place}.input")
            if budget.resolution is not None:
                raise SpecError(f"{place}.resolution: is in input already; leave one of them out")
        found[name] = msgspec.structs.replace(budget, arch=budget.arch or name, **(changes or {}))
    chosen = {name: budget for name, budget in found.items() if not only or name in only}
    for name, budget in chosen.items():
        _check_networks(budget, place=f"{path}: {HEADER}.{name}")
    return chosen


def _check_networks(budget: Budget, *, place: str) -> None:
    variant = catalog.find(budget.address, option=f"{place}.arch")
    if budget.baseline is not None:
        catalog.find(budget.baseline, option=f"{place}.baseline")
    ratios = [limit for limit in LIMITS if "ratio" in limit and getattr(budget, limit) is not None]
    if ratios and budget.baseline is None and catalog.baseline_of(variant) is None:
        raise SpecError(f'{place}.{ratios[0]}: {budget.arch} has no baseline; name one: baseline = "NAME"')


def check(
    budgets: Mapping[str, Budget],
    report: Callable[[str, Any], object],
    *,
    effort: Mapping[str, Any] = MappingProxyType({"quick": True}),
    resolve: Callable[[Request], Job] = resolve,
) -> Iterator[Finding]:
    """Count all networks, so that mistakes are found at once; then measure where a limit needs it, limit by limit.

    Args:
        budgets: by name.
        report: called with the progress.
        effort: fields of the request that say how long to measure.
        resolve: how to look up a budget's networks.

    Raises:
        SelabError: a network cannot be built or measured, or a device is not there; names the budget.
    """
    from selab.bench.progress import prefixed
    from selab.bench.runner import check_device

    jobs = {}
    for name, budget in budgets.items():
        report(f"{name}: counting", None)
        try:
            jobs[name] = resolve(budget.request(effort))
            _costs(jobs[name])
            if any(getattr(budget, limit) is not None for limit in (*_PHASES, *_PEAKS)):
                check_device(budget.device, budget.dtype)
        except SelabError as error:
            raise SelabError(f"{HEADER}.{name}: {error}") from None
    for name, budget in budgets.items():
        report(name, None)
        yield from _check_one(name, budget, jobs[name], prefixed(report, name))


def _check_one(name: str, budget: Budget, job: Job, report: Callable[[str, Any], object]) -> Iterator[Finding]:
    latency: dict[Phase, Latency] = {}
    used: Memory | None = None
    if job.request.phases:
        from selab.experiments.profiling import Profile

        profile = Profile(job)
        profile.run(report)
        cost, base, latency, used = profile.cost, profile.baseline_cost, profile.latency, profile.memory
        assert cost is not None
    else:
        cost, base = _costs(job)
    peaks = tuple(phase for limit, phase in _PEAK_PHASES.items() if getattr(budget, limit) is not None)
    if set(peaks) - set(job.request.phases):
        used = _memory(job, peaks)
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


def _costs(job: Job) -> tuple[Cost, Cost | None]:
    from selab.experiments.profiling import count_job

    record = count_job(job, counters=False)
    return record.cost, record.baseline_cost


def _memory(job: Job, phases: Sequence[Phase]) -> Memory:
    from selab.bench.memory import memory
    from selab.models.build import build

    built = build(job.variant, input_chw=job.workload.input_chw, seed=job.request.seed)
    return memory(built.model, job.workload, seed=job.request.seed, phases=phases)


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
        state: State = "no_result"
        if latency is not None and _is_far_over(latency, allowed):
            text, state = f"{text}; but all that is not excluded is over the limit", "over"
        return Finding(name=name, limit=limit, allowed=allowed, found=None, interval=None, state=state, text=text)
    low, high = 1 + left[0], 1 + left[1]
    state = "over" if low > allowed else "within" if high <= allowed else "not_decided"
    text = f"{PHASE_NAMES[latency.phase]} {change_words(latency)}"
    return Finding(
        name=name, limit=limit, allowed=allowed, found=latency.ratio, interval=(low, high), state=state, text=text
    )


def _is_far_over(latency: Latency, allowed: float) -> bool:
    """Return whether a measurement too noisy for a figure leaves no doubt: its whole interval, less the noise floor."""
    if latency.error or latency.ratio_low is None or latency.noise_floor is None:
        return False
    return latency.ratio_low - latency.noise_floor > allowed


def plain_ratio(value: float) -> str:
    """Format a ratio with four significant digits."""
    return f"{value:.4g}"
