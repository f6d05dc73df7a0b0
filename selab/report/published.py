"""Published beside counted: the tables of arXiv 1709.01507, the whole zoo, and how much of the print is met."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

from selab import units
from selab.models import catalog
from selab.models.provenance import is_own_baseline, variants_of
from selab.models.spec import Metric, Published, Variant
from selab.records.types import Cost, Record, Workload
from selab.records.verdict import change_words
from selab.report.table import Table
from selab.units import NONE


def published(variant: Variant | None, metric: Metric) -> Published | None:
    """A variant's published number for a metric, if there is one: the first that its facts give."""
    return next((one for one in variant.published if one.metric == metric), None) if variant else None


def published_pair(
    variant: Variant | None, baseline: Variant | None, metric: Metric
) -> tuple[Published | None, Published | None]:
    """A variant's published number and its baseline's of the same table: other tables have other recipes."""
    numbers = [one for one in variant.published if one.metric == metric] if variant else []
    others = [one for one in baseline.published if one.metric == metric] if baseline else []
    for ours in numbers:
        for theirs in others:
            if (ours.source, ours.table) == (theirs.source, theirs.table):
                return ours, theirs
    return (numbers[0] if numbers else None), None


def points(one: Published) -> str:
    """An error rate as it was printed, where it was printed as one; some print the accuracy."""
    return f"{one.printed if re.fullmatch(r'[0-9.]+', one.printed) else f'{one.value:g}'} %"


_PREFIX = {"T": 1e12, "G": 1e9, "B": 1e9, "M": 1e6, "k": 1e3, "": 1.0}


def printed_equals(value: float, printed: str) -> bool:
    """Whether a number rounds to what was printed: 3_865_000_000 and `3.87 GFLOPs`, 3_504_872 and `3,504,872`."""
    found = re.match(r"([\d.,]+)\s*([TGBMk]?)", printed)
    if found is None:
        return False
    digits = found[1].replace(",", "")
    decimals = len(digits.partition(".")[2])
    return f"{value / _PREFIX[found[2]]:.{decimals}f}" == digits


def _mark(value: float, one: Published) -> str:
    if not one.printed:
        return NONE
    if printed_equals(value, one.printed):
        return "="
    if "," in one.printed:  # printed to the unit, so the difference is told to the unit
        return f"{value - one.value:+,.0f}"
    return f"{value / one.value - 1:+.1%}".replace("%", " %")


SENET = "arXiv 1709.01507"
# The Params columns of these tables are met only with the BN's running means and variances among the parameters.
_WITH_STATISTICS = ("Table 10", "Table 13", "Table 15", "Table 16")


def convention(one: Published) -> str:
    """The convention under which a published cost number is compared with ours, by name."""
    if one.metric == "params":
        counts_all = one.source == SENET and one.table in _WITH_STATISTICS
        return "params + BN buffers" if counts_all else "params"
    return "paper" if one.source == SENET else "conv_linear"


def _figure(cost: Cost, one: Published) -> int:
    return {
        "params": cost.params,
        "params + BN buffers": cost.params + cost.buffer_elements,
        "paper": cost.macs.paper,
        "conv_linear": cost.macs.conv_linear,
    }[convention(one)]


def cost_numbers(variant: Variant) -> list[Published]:
    """The published numbers of a variant that counting can meet."""
    return [one for one in variant.published if one.metric in ("params", "macs") and one.printed]


def is_met(one: Published, cost: Cost) -> bool:
    """Whether our count, by the number's own convention, rounds to what was printed."""
    return printed_equals(_figure(cost, one), one.printed)


def reproduced(variants: Iterable[Variant], costs: dict[str, Cost]) -> tuple[int, int]:
    """How many published cost numbers the counts reproduce to the printed digit, and of how many.

    One that several sources print alike, under one convention, is one.
    """
    met = {
        (variant.name, one.metric, one.printed, convention(one)): is_met(one, costs[variant.name])
        for variant in variants
        for one in cost_numbers(variant)
    }
    return sum(met.values()), len(met)


@dataclass(frozen=True, kw_only=True)
class PaperTable:
    """A table of arXiv 1709.01507: its number, what it is about, and its rows."""

    number: int
    about: str
    rows: tuple[str, ...]
    metrics: tuple[Metric, ...] = ()

    @property
    def label(self) -> str:
        """As `where` of a published number begins."""
        return f"Table {self.number}"


def _with_se(*baselines: str) -> tuple[str, ...]:
    return tuple(name for base in baselines for name in (base, f"se_{base}"))


_ABLATED = "se_resnet50_no_bias"
PAPER_TABLES: dict[str, tuple[PaperTable, ...]] = {
    "paper-2": (
        PaperTable(
            number=2,
            about="ImageNet",
            rows=_with_se(
                "resnet50",
                "resnet101",
                "resnet152",
                "resnext50_32x4d",
                "resnext101_32x4d",
                "vgg16",
                "bn_inception",
                "inception_resnet_v2",
            ),
            metrics=("macs",),
        ),
    ),
    "paper-3": (
        PaperTable(
            number=3, about="mobile networks", rows=_with_se("mobilenet", "shufflenet"), metrics=("macs", "params")
        ),
    ),
    "cifar": (
        PaperTable(
            number=4,
            about="CIFAR-10",
            rows=_with_se("preresnet110_cifar", "preresnet164_cifar", "wrn_16_8", "shake_shake_26_2x96d"),
        ),
        PaperTable(
            number=5,
            about="CIFAR-100 (counted with 10 classes)",
            rows=_with_se("preresnet110_cifar", "preresnet164_cifar", "wrn_16_8", "shake_even_29_2x4x64d"),
        ),
    ),
    "reduction": (
        PaperTable(
            number=10,
            about="reduction",
            rows=("se_resnet50_r2", "se_resnet50_r4", "se_resnet50_r8", _ABLATED, "se_resnet50_r32", "resnet50"),
            metrics=("params",),
        ),
    ),
    "squeeze": (
        PaperTable(number=11, about="squeeze", rows=("se_resnet50_max", _ABLATED)),
        PaperTable(
            number=16,
            about="the role of the squeeze",
            rows=("resnet50", "se_resnet50_nosqueeze", _ABLATED),
            metrics=("macs", "params"),
        ),
    ),
    "excitation": (PaperTable(number=12, about="excitation", rows=("se_resnet50_relu", "se_resnet50_tanh", _ABLATED)),),
    "stages": (
        PaperTable(
            number=13,
            about="stages",
            rows=("resnet50", "se_resnet50_stage2", "se_resnet50_stage3", "se_resnet50_stage4", _ABLATED),
            metrics=("macs", "params"),
        ),
    ),
    "integration": (
        PaperTable(
            number=14,
            about="integration",
            rows=(_ABLATED, "se_resnet50_pre", "se_resnet50_post", "se_resnet50_identity"),
        ),
        PaperTable(
            number=15, about="SE inside the branch", rows=(_ABLATED, "se_resnet50_3x3"), metrics=("macs", "params")
        ),
    ),
}
_HEADERS: dict[str, str] = {"macs": "MACs", "params": "params"}


def paper_table(table: PaperTable, costs: dict[str, Cost]) -> Table:
    """A table of arXiv 1709.01507: published and counted side by side.

    Args:
        table: which.
        costs: by variant name, at batch 1.
    """
    known = catalog.installed()
    rows, remarks = [], []
    conventions: dict[str, None] = {}
    equal = total = 0
    for variant in (known[name] for name in table.rows):
        cost = costs[variant.name]
        here = {one.metric: one for one in variant.published if one.source == SENET and one.table == table.label}
        cells = [variant.name]
        for metric in ("params", "macs"):
            one = here.get(metric)
            if metric not in table.metrics:
                cells.append(units.count(cost.params if metric == "params" else cost.macs.paper))
                continue
            if one is None:
                cells += [NONE, units.count(cost.params if metric == "params" else cost.macs.paper), ""]
                continue
            value = _figure(cost, one)
            mark = _mark(value, one)
            conventions[convention(one)] = None
            equal, total = equal + (mark == "="), total + 1
            cells += [one.printed, units.count(value), mark]
            remarks += [] if mark == "=" else [f"{variant.name}, {metric}: {one.note or 'cause unknown'}"]
        cells += [points(here[m]) if m in here else NONE for m in ("top1_error_pct", "top5_error_pct")]
        rows.append(tuple(cells))
    headers = [
        header
        for metric in ("params", "macs")
        for header in (
            (f"{_HEADERS[metric]} printed", f"{_HEADERS[metric]} counted", f"{_HEADERS[metric]} met")
            if metric in table.metrics
            else (_HEADERS[metric],)
        )
    ]
    closing = f"{equal} of {total} published cost numbers reproduced to the printed digit (=)."
    notes = [closing if total else "This table prints no cost; parameters and MACs are counted."]
    notes += [f"{name}: {_CONVENTIONS[name]}" for name in (conventions or {"params": None, "paper": None})]
    columns = ("", *headers, "top-1 error", "top-5 error")
    title = f"{SENET}, {table.label}: {table.about}"
    return Table(title=title, columns=columns, rows=tuple(rows), notes=(*notes, *remarks))


def paper_reproduced(tables: Iterable[PaperTable], costs: dict[str, Cost]) -> tuple[int, int]:
    """How many cost numbers of these tables are met, and how many they print."""
    known = catalog.installed()
    met = [
        is_met(one, costs[name])
        for table in tables
        for name in table.rows
        for one in cost_numbers(known[name])
        if one.source == SENET and one.table == table.label and one.metric in table.metrics
    ]
    return sum(met), len(met)


_CONVENTIONS = {
    "params": "learnable parameters",
    "params + BN buffers": "learnable parameters and the BN's buffers: running means and variances, one counter each",
    "paper": "MACs of convolutions, fully connected layers and SE's pooling additions, which the paper prints as FLOPs",
    "conv_linear": "MACs of convolutions and fully connected layers",
}


# Marks say by which convention they were made where it is not the plain one of its column.
_TAGS = {"params + BN buffers": " with BN buffers", "paper": " by paper"}


def zoo_tables(costs: dict[str, Cost], names: Iterable[str] | None = None) -> list[Table]:
    """Every variant: counted costs and, beside them, every published cost number with a mark."""
    known = catalog.installed()
    chosen = [known[name] for name in (known if names is None else names)]
    families: dict[str, list[Variant]] = {}
    for variant in chosen:
        families.setdefault(variant.family, []).append(variant)
    columns = (
        "",
        "params",
        "conv+linear",
        "paper",
        "all",
        "bytes",
        "published params",
        "published MACs",
        "top-1 error",
    )
    grids = []
    for family, variants in families.items():
        equal, total = reproduced(variants, costs)
        closing = [f"{equal} of {total} published cost numbers reproduced to the printed digit (=)."] if total else []
        used = {convention(one) for variant in variants for one in cost_numbers(variant)}
        closing += [f"{name}: {text}" for name, text in _CONVENTIONS.items() if name in used]
        size = "×".join(map(str, variants[0].input_chw))
        grids.append(
            Table(
                title=f"{family} ({variants[0].source}; {size})",
                columns=columns,
                rows=tuple(_zoo_row(variant, costs[variant.name]) for variant in variants),
                notes=(*closing, *differences(variants, costs)),
            )
        )
    return grids


def marked_numbers(variant: Variant, cost: Cost, metric: Metric) -> str:
    """What was published of a cost, each number once with its mark."""
    found: dict[tuple[str, str], str] = {}
    for one in cost_numbers(variant):
        if one.metric == metric:
            found[one.printed, _TAGS.get(convention(one), "")] = _mark(_figure(cost, one), one)
    return "; ".join(f"{printed} {mark}{tag}" for (printed, tag), mark in found.items()) or NONE


def differences(variants: Iterable[Variant], costs: dict[str, Cost]) -> list[str]:
    """Every published cost number that is not met, with the cause in words."""
    return [
        f"{variant.name}, {one.metric} {one.printed} ({one.source}, {one.where}): {one.note or 'cause unknown'}"
        for variant in variants
        for one in cost_numbers(variant)
        if not is_met(one, costs[variant.name])
    ]


def _zoo_row(variant: Variant, cost: Cost) -> tuple[str, ...]:
    macs = cost.macs
    top1 = published(variant, "top1_error_pct")
    return (
        variant.name,
        units.exact(cost.params),
        *(units.count(figure) for figure in (macs.conv_linear, macs.paper, macs.all)),
        units.size(cost.bytes),
        marked_numbers(variant, cost, "params"),
        marked_numbers(variant, cost, "macs"),
        NONE if top1 is None else points(top1),
    )


MOBILE = (
    "se_mobilenet",
    "se_shufflenet",
    "se_mobilenet_v2",
    "se_shufflenet_v2_x0_5",
    "se_shufflenet_v2_x1_0",
    "se_shufflenet_v2_x1_5",
    "se_shufflenet_v2_x2_0",
    "mobilenet_v3_small",
    "mobilenet_v3_large",
    "mnasnet_a1",
    "efficientnet_b0",
    "ghostnet_100",
    "se_regnet_x_400mf",
    "regnet_y_400mf",
    "se_regnet_x_800mf",
    "regnet_y_800mf",
)


def mobile_names() -> list[str]:
    """The mobile networks, base and SE in turn."""
    known = catalog.installed()
    return [name for one in MOBILE for name in (str(known[one].baseline), one)]


def mobile_table(costs: dict[str, Cost], records: Sequence[Record]) -> Table:
    """The mobile networks: cost, measured ratio of a forward pass, and published error, base and SE in turn."""
    measured = {record.arch: record for record in records if _is_plain(record)}
    rows = []
    for one in (catalog.installed()[name] for name in mobile_names()):
        cost, record = costs[one.name], measured.get(one.name)
        forward = record.latency.get("forward") if record is not None else None
        top1 = published(one, "top1_error_pct")
        rows.append(
            (
                one.name,
                units.count(cost.params),
                units.count(cost.macs.paper),
                units.size(cost.bytes),
                change_words(forward),
                NONE if top1 is None else points(top1),
            )
        )
    columns = ("", "params", "MACs, paper", "bytes", "forward", "top-1 error")
    machines = {record.machine.gpu or record.machine.cpu for record in measured.values()}
    note = "forward: SE against base, batch 1, fp32"
    note += (
        f", on {', '.join(machines)}, 95 % intervals in brackets"
        if machines
        else ": no records were given (--profiles)"
    )
    return Table(title="Mobile networks", columns=columns, rows=tuple(rows), notes=(note,))


def mobile_published_table(costs: dict[str, Cost]) -> Table:
    """What was published of the mobile networks' costs, each number with its mark, and the causes where not met."""
    known = catalog.installed()
    variants = [known[name] for name in mobile_names() if cost_numbers(known[name])]
    rows = tuple(
        (one.name, *(marked_numbers(one, costs[one.name], metric) for metric in ("params", "macs"))) for one in variants
    )
    equal, total = reproduced(variants, costs)
    closing = f"{equal} of {total} published cost numbers reproduced to the printed digit (=)."
    conventions = "Parameters are learnable ones. MACs are compared by `paper` where it says so, else by `conv+linear`."
    return Table(
        title="Published costs of the mobile networks",
        columns=("", "params", "MACs"),
        rows=rows,
        notes=(closing, conventions, *differences(variants, costs)),
    )


_PLAIN = Workload(
    batch=1,
    input_chw=(0, 0, 0),
    device="cpu",
    dtype="fp32",
    memory_format="contiguous",
    mode="auto",
    threads=1,
)


def _is_plain(record: Record) -> bool:
    """Whether a record is of the workload that needs no words: its own baseline, one image, fp32, one CPU thread."""
    work = record.workload
    plain = msgspec.structs.replace(work, input_chw=(0, 0, 0)) == _PLAIN
    variant, _ = variants_of(record)
    size = variant is not None and work.input_chw == variant.input_chw
    return record.kind == "profile" and plain and size and is_own_baseline(record)
