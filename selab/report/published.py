"""Published and counted costs: the tables of arXiv 1709.01507, the whole zoo, and how many numbers match."""

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
from selab.report.machines import by_machine
from selab.report.table import Table
from selab.report.wording import words_note
from selab.units import NONE


def published(variant: Variant | None, metric: Metric) -> Published | None:
    """Return a variant's first published number for a metric, if there is one."""
    return next((one for one in variant.published if one.metric == metric), None) if variant else None


def published_pair(
    variant: Variant | None, baseline: Variant | None, metric: Metric, *, on: str = ""
) -> tuple[Published | None, Published | None]:
    """Return a variant's published number and its baseline's of the same table: other tables have other recipes.

    Args:
        variant: the network.
        baseline: what it is compared with.
        metric: of both.
        on: the first word of the data set, `CIFAR-10`; any if it is empty.
    """

    def numbers_of(one: Variant | None) -> list[Published]:
        found = one.published if one else ()
        return [each for each in found if each.metric == metric and (not on or each.dataset.split()[:1] == [on])]

    numbers, others = numbers_of(variant), numbers_of(baseline)
    alike = [
        (ours, theirs)
        for ours in numbers
        for theirs in others
        if (ours.source, ours.table) == (theirs.source, theirs.table)
    ]
    if alike:
        # A table may have columns for several data sets.
        return next((pair for pair in alike if len({one.dataset for one in pair}) == 1), alike[0])
    return (numbers[0] if numbers else None), None


def points(one: Published) -> str:
    """Return an error rate or a precision as it was printed; where an accuracy was printed, the error."""
    return f"{one.printed if re.fullmatch(r'[0-9.]+', one.printed) else f'{one.value:g}'} %"


_PREFIX = {"T": 1e12, "G": 1e9, "B": 1e9, "M": 1e6, "k": 1e3, "": 1.0}


def printed_equals(value: float, printed: str) -> bool:
    """Return whether a number rounds to what was printed: 3_865_000_000 and `3.87 GFLOPs`."""
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
    """Return the convention under which a published cost number is compared with the count."""
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
    """Return the published cost numbers of a variant."""
    return [one for one in variant.published if one.metric in ("params", "macs") and one.printed]


def is_met(one: Published, cost: Cost) -> bool:
    """Return whether the count, by the number's own convention, rounds to what was printed."""
    return printed_equals(_figure(cost, one), one.printed)


def reproduced(variants: Iterable[Variant], costs: dict[str, Cost]) -> tuple[int, int]:
    """Return how many published cost numbers equal the counts to the printed digit, and of how many.

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
    """A table of arXiv 1709.01507: its number, what it is about, and its rows.

    Attributes:
        metrics: costs that it prints.
        results: what it prints of trained networks, and the columns' headers.
    """

    number: int
    about: str
    rows: tuple[str, ...]
    metrics: tuple[Metric, ...] = ()
    results: tuple[tuple[Metric, str], ...] = (("top1_error_pct", "top-1 error"), ("top5_error_pct", "top-5 error"))

    @property
    def label(self) -> str:
        """The beginning of `where` of its published numbers: `Table 2`."""
        return f"Table {self.number}"


def _with_se(*baselines: str) -> tuple[str, ...]:
    return tuple(name for base in baselines for name in (base, f"se_{base}"))


# Tables of networks that torchvision builds.
OF_TORCHVISION = ("paper-7",)
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
    "paper-6": (
        PaperTable(number=6, about="Places365-Challenge (counted with 1,000 classes)", rows=_with_se("resnet152")),
    ),
    "paper-7": (
        PaperTable(
            number=7,
            about="Faster R-CNN on COCO (counted with an FPN, for an image of 800 x 1333)",
            rows=tuple(f"faster_rcnn_{trunk}_fpn" for trunk in _with_se("resnet50", "resnet101")),
            results=(("ap50_pct", "AP@0.5"), ("ap_pct", "AP")),
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


@dataclass(frozen=True, kw_only=True)
class _Unit:
    """The unit of a column of a table: what its header says, and how a figure and a printed number read in it."""

    header: str
    divisor: float

    def shown(self, value: float) -> str:
        """Return a counted figure with four digits: 3_866_007_552 → `3.866`."""
        return format(value / self.divisor, "#.4g").rstrip(".") if self.divisor > 1 else units.count(value)

    def printed(self, one: Published) -> str:
        """Return a printed number without its unit: `3.87 GFLOPs` → `3.87`."""
        found = re.match(r"[\d.,]+", one.printed)
        return found[0] if found and self.divisor > 1 else one.printed


def _unit(metric: Metric, values: Sequence[float], numbers: Sequence[Published]) -> _Unit:
    """Return the unit of a metric's columns: that of the print, or of the smallest figure where nothing is printed."""
    name = {"macs": "FLOPs", "params": "params"}[metric]
    prefixes = {re.sub(r"[\d.,\s]+", "", one.printed)[:1] for one in numbers}
    prefix = prefixes.pop() if len(prefixes) == 1 else ""
    if not numbers:
        prefix = next((letter for factor, letter in ((1e9, "G"), (1e6, "M")) if min(values) >= factor), "")
    if prefix not in ("G", "M"):
        return _Unit(header=name, divisor=1)
    header = f"{prefix}FLOPs" if metric == "macs" else f"params ({prefix})"
    return _Unit(header=header, divisor=_PREFIX[prefix])


def paper_table(table: PaperTable, costs: dict[str, Cost]) -> Table:
    """Return a table of arXiv 1709.01507: published and counted side by side.

    Args:
        table: which.
        costs: by variant name, at batch 1.
    """
    variants = [catalog.find(name) for name in table.rows]
    here = {
        variant.name: {one.metric: one for one in variant.published if one.source == SENET and one.table == table.label}
        for variant in variants
    }
    columns: list[str] = [""]
    cells: list[list[str]] = [[variant.name] for variant in variants]
    compared: list[tuple[Variant, Published, float]] = []
    for metric in ("params", "macs"):
        numbers = [here[variant.name].get(metric) if metric in table.metrics else None for variant in variants]
        values = [
            _plain_figure(costs[variant.name], metric) if one is None else _figure(costs[variant.name], one)
            for variant, one in zip(variants, numbers, strict=True)
        ]
        printed = [one for one in numbers if one is not None]
        unit = _unit(metric, values, printed)
        if not printed:
            columns.append(unit.header)
            for line, value in zip(cells, values, strict=True):
                line.append(unit.shown(value))
            continue
        columns += [f"{unit.header} printed", f"{unit.header} counted", f"{unit.header.split(' (')[0]} match"]
        for variant, line, one, value in zip(variants, cells, numbers, values, strict=True):
            both = ("", "") if one is None else (unit.printed(one), _mark(value, one))
            line += [both[0] or NONE, unit.shown(value), both[1]]
            compared += [] if one is None else [(variant, one, value)]
    for variant, line in zip(variants, cells, strict=True):
        line += [
            points(here[variant.name][metric]) if metric in here[variant.name] else NONE for metric, _ in table.results
        ]
    names = dict.fromkeys(convention(one) for _, one, _ in compared) or {"params": None, "paper": None}
    return Table(
        title=f"{SENET}, {table.label}: {table.about}",
        columns=(*columns, *(header for _, header in table.results)),
        rows=tuple(map(tuple, cells)),
        notes=(
            _closing(compared),
            *(f"{name}: {_CONVENTIONS[name]}" for name in names),
            *_grouped((variant.name, one) for variant, one, value in compared if _mark(value, one) != "="),
        ),
        drop_first=(len(columns) + 1,),
        label=f"senet-{table.number}",
    )


def _plain_figure(cost: Cost, metric: str) -> int:
    return cost.params if metric == "params" else cost.macs.paper


def _closing(compared: Sequence[tuple[Variant, Published, float]]) -> str:
    """Return how many published numbers are counted equal to the printed digit, and how many nearly so."""
    if not compared:
        return "This table prints no cost; parameters and MACs are counted."
    total = len(compared)
    equal = sum(_mark(value, one) == "=" for _, one, value in compared)
    near = sum(_mark(value, one) == "=" or is_near(value, one) for _, one, value in compared)
    return f"{equal} of {total} published cost numbers equal to the printed digit (=), {near} of {total} within 0.3 %."


def is_near(value: float, one: Published) -> bool:
    """Return whether a count is within 0.3 % of a published number."""
    return abs(value / one.value - 1) <= _NEAR


def _grouped(found: Iterable[tuple[str, Published]]) -> list[str]:
    """Return why numbers do not match: each cause once, after the networks that it holds for."""
    causes: dict[tuple[str, str], list[str]] = {}
    for name, one in found:
        causes.setdefault((one.metric, one.note or "cause unknown"), []).append(name)
    words = {"macs": "FLOPs"}
    return [f"{', '.join(names)}, {words.get(metric, metric)}: {cause}" for (metric, cause), names in causes.items()]


def paper_reproduced(tables: Iterable[PaperTable], costs: dict[str, Cost]) -> tuple[int, int]:
    """Return how many cost numbers of these tables match, and how many they print."""
    met = [
        is_met(one, costs[name])
        for table in tables
        for name in table.rows
        for one in cost_numbers(catalog.find(name))
        if one.source == SENET and one.table == table.label and one.metric in table.metrics
    ]
    return sum(met), len(met)


_NEAR = 0.003
_CONVENTIONS = {
    "params": "learnable parameters",
    "params + BN buffers": "learnable parameters and the BN's buffers: running means and variances, one counter each",
    "paper": "multiply-accumulates (MACs) of convolutions, fully connected layers and SE's pooling additions, which "
    "the paper prints as FLOPs",
    "conv_linear": "MACs of convolutions and fully connected layers",
}


# Marks say by which convention they were made where it is not the plain one of its column.
_TAGS = {"params + BN buffers": " with BN buffers", "paper": " by paper"}


def zoo_tables(costs: dict[str, Cost], names: Iterable[str] | None = None) -> list[Table]:
    """Return one table per family: counted costs, and every published cost number with a mark."""
    known = catalog.installed()
    chosen = [known[name] for name in (known if names is None else names)]
    families: dict[str, list[Variant]] = {}
    for variant in chosen:
        families.setdefault(variant.family, []).append(variant)
    columns = (
        "",
        "params",
        "MACs, conv+linear",
        "MACs (paper's FLOPs)",
        "MACs, all",
        "bytes",
        "published params",
        "published MACs",
        "top-1 error",
    )
    grids = []
    for family, variants in families.items():
        equal, total = reproduced(variants, costs)
        closing = [f"{equal} of {total} published cost numbers equal to the printed digit (=)."] if total else []
        used = {convention(one) for variant in variants for one in cost_numbers(variant)}
        closing += [f"{name}: {text}" for name, text in _CONVENTIONS.items() if name in used]
        size = "×".join(map(str, variants[0].input_chw))
        grids.append(
            Table(
                title=f"{family} ({variants[0].source}; {size})",
                columns=columns,
                rows=tuple(_zoo_row(variant, costs[variant.name]) for variant in variants),
                notes=(*closing, *differences(variants, costs)),
                drop_first=(2, 4, 5),
            )
        )
    return grids


def marked_numbers(variant: Variant, cost: Cost, metric: Metric) -> str:
    """Return what was published of a cost, each number once with its mark."""
    found: dict[tuple[str, str], str] = {}
    for one in cost_numbers(variant):
        if one.metric == metric:
            found[one.printed, _TAGS.get(convention(one), "")] = _mark(_figure(cost, one), one)
    return "; ".join(f"{printed} {mark}{tag}" for (printed, tag), mark in found.items()) or NONE


def differences(variants: Iterable[Variant], costs: dict[str, Cost]) -> list[str]:
    """Return every published cost number that does not match, with the cause."""
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
    "pp_lcnet_x0_5",
    "pp_lcnet_x1_0",
    "se_regnet_x_400mf",
    "regnet_y_400mf",
    "se_regnet_x_800mf",
    "regnet_y_800mf",
)


def mobile_names() -> list[str]:
    """Return the mobile networks, base and SE in turn."""
    known = catalog.installed()
    return [name for one in MOBILE for name in (str(known[one].baseline), one)]


def mobile_table(costs: dict[str, Cost], records: Sequence[Record]) -> Table:
    """Return the mobile networks, base and SE in turn: cost, measured change of a forward pass, published error.

    Args:
        costs: of `mobile_names()`, at batch 1.
        records: those of the default workload are shown, each machine's in a column of its own.
    """
    # Where there are two of a network, that with the heap held counts, as it is measured by default.
    plain = sorted(filter(_is_plain, records), key=lambda record: record.workload.held_heap)
    machines = by_machine(plain)
    measured = {place: {record.arch: record for record in group} for place, group in machines.items()}
    rows = []
    for one in (catalog.installed()[name] for name in mobile_names()):
        cost = costs[one.name]
        top1 = published(one, "top1_error_pct")
        here = [group.get(one.name) for group in measured.values()] or [None]
        rows.append(
            (
                one.name,
                units.count(cost.params),
                units.count(cost.macs.paper),
                units.size(cost.bytes),
                *(change_words(record.latency.get("forward") if record is not None else None) for record in here),
                NONE if top1 is None else points(top1),
            )
        )
    several = len(machines) > 1
    forward = [f"forward, {place}" for place in machines] if several else ["forward"]
    note = "forward: SE against base, batch 1, fp32"
    if machines:
        where = [group[0].machine.gpu or group[0].machine.cpu for group in machines.values()]
        note += f", on {', '.join(dict.fromkeys(where))}, 95 % intervals in brackets"
    else:
        note += ": no records were given (--profiles)"
    return Table(
        title="Mobile networks",
        columns=("", "params", "MACs (paper's FLOPs)", "bytes", *forward, "top-1 error"),
        rows=tuple(rows),
        notes=(f"{note}.", *words_note(rows)),
    )


def mobile_published_table(costs: dict[str, Cost]) -> Table:
    """Return the published costs of the mobile networks, each with its mark, and causes of mismatch."""
    known = catalog.installed()
    variants = [known[name] for name in mobile_names() if cost_numbers(known[name])]
    rows = tuple(
        (one.name, *(marked_numbers(one, costs[one.name], metric) for metric in ("params", "macs"))) for one in variants
    )
    equal, total = reproduced(variants, costs)
    closing = f"{equal} of {total} published cost numbers equal to the printed digit (=)."
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
    """Return whether a record is of the default workload: its own baseline, one image, fp32, one CPU thread."""
    work = record.workload
    plain = msgspec.structs.replace(work, input_chw=(0, 0, 0), held_heap=False) == _PLAIN
    variant, _ = variants_of(record)
    size = variant is not None and work.input_chw == variant.input_chw
    return record.kind == "profile" and plain and size and is_own_baseline(record)
