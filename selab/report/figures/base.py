"""What all figures share: which records are drawn, and why others are left out."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from selab.attention.config import ExternalConfig
from selab.errors import RecordError, UnknownNameError, nearest
from selab.experiments.tax_record import TaxRecord
from selab.models import catalog
from selab.models.provenance import name_of, variants_of
from selab.models.spec import Variant
from selab.records import verdict as records_verdict
from selab.records.types import TORCH, Cost, Phase, Record
from selab.report.figures.axes import Axis
from selab.report.machines import check_one_machine
from selab.report.wording import FAILED
from selab.training.record import AccuracyRecord


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """What was asked for and is not drawn, and why."""

    name: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Everything known about one pair; a record's costs are those of its workload."""

    name: str
    family: str
    variant: Variant | None
    baseline: Variant | None
    cost: Cost | None
    baseline_cost: Cost | None
    record: Record | None = None
    trained: AccuracyRecord | None = None


@dataclass(frozen=True, kw_only=True)
class BothValues:
    """One quantity of a pair."""

    base: float
    se: float
    interval: tuple[float, float] | None = None
    resolved: bool = True
    source: str = ""
    dataset: str = ""


def recorded(record: Record) -> Subject:
    """Return the subject of a figure from a record."""
    variant, baseline = variants_of(record)
    return Subject(
        name=name_of(record),
        family="unknown" if variant is None else variant.family,
        variant=variant,
        baseline=baseline,
        cost=record.cost,
        baseline_cost=record.baseline_cost,
        record=record,
    )


def block_of(variant: Variant | None) -> str:
    """Return what kind of attention block a variant has: `SE`, `ECA`, `CBAM`, or a name of one's own."""
    config = None if variant is None else variant.se
    if config is None:
        return "SE"
    if isinstance(config, ExternalConfig):
        return config.target.rpartition(":")[2]
    tag = str(config.__struct_config__.tag)
    return _BLOCKS.get(tag, tag.upper() if len(tag) <= _LONGEST_ACRONYM else tag.replace("_", " "))


_BLOCKS = {"scse": "scSE", "sse": "sSE", "ese": "eSE"}
_LONGEST_ACRONYM = 4


def baseline_word(variant: Variant) -> str:
    """Return what `--arch` finds the baseline of a variant by."""
    return f"{variant.file}:{variant.baseline}" if variant.file else str(variant.baseline)


def names_as_given(archs: Sequence[str]) -> list[str]:
    """Return the variants that were named, or the first SE variant of every installed baseline.

    Raises:
        UnknownNameError: a name that nothing has, or that of a baseline.
    """
    if not archs:
        with_se = [one for one in catalog.installed().values() if one.se is not None]
        first = {one.baseline: one.name for one in reversed(with_se)}
        return [one.name for one in with_se if first[one.baseline] == one.name]
    for word in archs:
        variant = catalog.find(word)
        if variant.baseline is None:
            known = [one.name for one in catalog.installed().values() if one.baseline == variant.name]
            raise UnknownNameError(f"--arch {word}: a baseline; name what is compared with it{nearest(word, known)}")
    return list(dict.fromkeys(archs))


def measured_values(subject: Subject, which: Axis) -> BothValues | str:
    """Return what was measured of both networks, or why nothing can be drawn."""
    if subject.record is None:
        return "no record"
    if which.name == "saved_for_backward":
        return _saved(subject.record)
    phase: Phase = which.path  # type: ignore[assignment]
    latency = subject.record.latency.get(phase)
    if latency is None:
        return f"{phase.replace('_', ' and ')} not measured"
    interval = records_verdict.not_excluded(latency)
    if interval is None or latency.baseline_s is None or latency.variant_s is None or latency.ratio is None:
        return FAILED if latency.error else records_verdict.TOO_NOISY
    resolved = latency.verdict_kind != "undecided"
    if which.name == "tax":
        # Below the control floor the figure is the machine's own, and an interval has no place to point at.
        percents = (interval[0] * 100, interval[1] * 100)
        return (
            BothValues(base=0.0, se=(latency.ratio - 1) * 100, interval=percents)
            if resolved
            else records_verdict.NOT_SIGNIFICANT
        )
    low, high = (latency.baseline_s * (1 + bound) for bound in interval)
    return BothValues(base=latency.baseline_s, se=latency.variant_s, interval=(low, high), resolved=resolved)


def _saved(record: Record) -> BothValues | str:
    both = (record.baseline_memory, record.memory)
    base, se = (None if one is None else one.saved_for_backward_bytes for one in both)
    return "memory not measured" if base is None or se is None else BothValues(base=base, se=se)


def reasons(left_out: Sequence[LeftOut], *, most: int | None = None) -> str:
    """Return `too noisy (se_resnet18, se_vgg16); no record (se_mobilenet)`, of each at most so many names."""
    names: dict[str, list[str]] = {}
    for one in left_out:
        names.setdefault(one.why, []).append(one.name)
    parts = []
    for why, which in names.items():
        more = f" and {len(which) - most} more" if most is not None and len(which) > most else ""
        parts.append(f"{why} ({', '.join(which[:most])}{more})")
    return "; ".join(parts)


def chosen_records(
    records: Sequence[Record], archs: Sequence[str], workload: str | None, *, what: str
) -> tuple[list[Record], list[LeftOut]]:
    """Return the profiles of one machine and one workload, and what that leaves out."""
    # What SE costs in other runtimes has pictures of its own.
    profiles = [record for record in records if record.kind == "profile" and record.workload.runtime == TORCH]
    if not profiles:
        raise RecordError(f"{what}: no records; measure with `selab profile`, and name their folder: --profiles")
    check_one_machine(profiles)
    left_out = []
    if archs:
        wanted = [catalog.find(word) for word in names_as_given(archs)]
        keys = {(one.name, one.file) for one in wanted}
        there = {(record.arch, record.origin) for record in profiles}
        left_out = [LeftOut(name=one.name, why="no record") for one in wanted if (one.name, one.file) not in there]
        profiles = [record for record in profiles if (record.arch, record.origin) in keys]
        if not profiles:
            known = ", ".join(sorted({name for name, _ in there}))
            raise RecordError(f"{what}: no record of {', '.join(archs)}; there are some of {known}; or measure it")
    slug = _workload(profiles, workload)
    inside = [record for record in profiles if record.workload.slug == slug]
    others = [record for record in profiles if record.workload.slug != slug]
    left_out += [LeftOut(name=one.arch, why=f"measured under {one.workload.slug}") for one in others]
    return inside, left_out


def _workload(records: Sequence[Record], wanted: str | None) -> str:
    counts = Counter(record.workload.slug for record in records)
    if wanted is not None:
        if wanted not in counts:
            raise UnknownNameError(f"--workload {wanted}: no records of it{nearest(wanted, counts)}")
        return wanted
    most = [slug for slug in sorted(counts) if counts[slug] == max(counts.values())]
    if len(most) > 1:
        raise RecordError(f"records of different workloads share no picture; choose one: --workload {' | '.join(most)}")
    return most[0]


def circumstances_of(record: Record | TaxRecord) -> str:
    """Return what all values share: `Intel Xeon, one thread, batch 1, 3×224×224, fp32, torch 2.13`."""
    return ", ".join(circumstance_parts(record))


def circumstance_parts(record: Record | TaxRecord) -> list[str]:
    """Return device, threads, dtype, batch and input of a record, in words."""
    work, machine = record.workload, record.machine
    parts = [machine.gpu or machine.cpu if work.device != "cpu" else machine.cpu]
    if work.device == "cpu":
        parts.append("one thread" if work.threads == 1 else f"{work.threads} threads")
    parts += work.words(device=False)
    parts += [f"torch {machine.libraries['torch']}"] if "torch" in machine.libraries else []
    return parts
