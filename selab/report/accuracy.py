"""Tables of accuracy records: cost and accuracy of both networks, with the uncertainty of each."""

from collections.abc import Callable, Sequence
from operator import attrgetter
from statistics import mean

from selab import units
from selab.experiments.compared import Compared
from selab.models import external
from selab.models.provenance import variants_of
from selab.models.spec import Metric as PublishedMetric
from selab.models.spec import Published
from selab.records.types import PHASE_NAMES, Cost, Latency
from selab.records.verdict import NOT_SIGNIFICANT, change_words
from selab.report.published import published_pair
from selab.report.table import Table
from selab.report.wording import verdict_sentence, words_note
from selab.training.record import Accuracy, AccuracyRecord, DataSpec, Seed, SeedOutcome
from selab.training.verdict import METRIC_NAMES, Metric, PairedDifference, compare_verdict
from selab.units import NONE


def comparison_table(compared: Compared) -> Table:
    """Return the table of `selab compare`: cost, accuracy over the seeds, and what training took."""
    record = compared.record
    verdict = compare_verdict(record)
    rows = [
        _cost_row("parameters", compared, attrgetter("params")),
        _cost_row("MACs (paper's FLOPs)", compared, attrgetter("macs.paper")),
        *_time_rows("forward, batch 1", compared.forward_latency),
        *_time_rows(f"forward+backward, batch {_batch(compared)}", compared.step_latency),
        _level_row(verdict.score),
        *_published_row(record),
        *(_level_row(one) for one in (verdict.more, verdict.loss) if one is not None),
        _trained_row("training, images/s", record, attrgetter("images_per_s"), "{:,.0f}".format),
        _trained_row("training, time", record, attrgetter("seconds"), units.seconds),
    ]
    notes = [f"{METRIC_NAMES[one.metric]}: {one.difference.text}" for one in verdict.judged]
    if verdict.diverged:
        notes.append(f"{verdict.diverged}; what is compared are the seeds that both networks finished.")
    notes += _own_recipes(record)
    done = sum(one.pair is not None for one in record.seeds)
    place = f"{record.machine.gpu or record.machine.cpu}, torch {record.machine.libraries.get('torch', '')}"
    notes.append(
        f"{record.data.title}, {training_words(record)}, batch {record.recipe.batch}; {done} of "
        f"{len(record.seeds)} seeds; ± is one deviation over seeds, of a difference its 95 % interval. {place}."
    )
    notes += _times_note(compared)
    notes += published_notes([record])
    notes += (*words_note(rows), *_other_classes([compared]), *_no_results([compared]), *record.warnings)
    return Table(
        title=f"{record.arch} against {record.baseline} on {record.data.title}",
        columns=("", "base", "variant", "difference"),
        rows=tuple(rows),
        notes=(*notes, *not_published([record])),
    )


def _times_note(compared: Compared) -> list[str]:
    """Return how many trainings ran at the same time, and which times compare the networks; nothing if none ended."""
    outcomes = [one for seed in compared.record.seeds for one in (seed.baseline, seed.variant) if one is not None]
    if not outcomes:
        return []
    counts = sorted({one.at_once for one in outcomes})
    together = "one after the other" if counts == [1] else f"{' or '.join(map(str, counts))} at once"
    timed = compared.forward_latency or compared.step_latency
    then = "; the times of the passes do" if timed else ""
    return [
        f"Trainings ran {together}, and the machine may have been busier with some than with others: "
        f"their times do not compare the networks{then}."
    ]


def _own_recipes(record: AccuracyRecord) -> list[str]:
    """Return how each network was trained, where that differs."""
    if record.variant_recipe is None:
        return []
    each = [
        f"{name} with a learning rate of {one.lr:.3g} and a weight decay of {one.weight_decay:.3g}"
        for name, one in ((record.baseline, record.recipe), (record.arch, record.variant_recipe))
    ]
    return [f"Each network at its best ({record.recipe.note}): {'; '.join(each)}."]


def both_ways(records: Sequence[AccuracyRecord]) -> list[str]:
    """Return a sentence for each pair that was compared in the same recipe, and each network at its best."""
    found: dict[tuple[str, str], dict[bool, str]] = {}
    for record in records:
        words = compare_verdict(record).score.difference.text
        found.setdefault((record.arch, record.baseline), {})[record.variant_recipe is not None] = words
    return [
        f"{arch} against {baseline}, same recipe: {ways[False]}; each at its best: {ways[True]}."
        for (arch, baseline), ways in found.items()
        if len(ways) == len((False, True))
    ]


def seeds_table(record: AccuracyRecord) -> Table:
    """Return both networks' top-1 accuracy and loss for each seed, or AP and AP at 0.50, and their difference."""
    started = (
        one for one in record.seeds if one.baseline or one.variant or one.baseline_diverged or one.variant_diverged
    )
    rows = tuple((str(one.seed), *_seed_cells(one)) for one in started)
    score, second = _score_names(record.data)
    columns = ("seed", f"base {score}", f"variant {score}", "points", f"base {second}", f"variant {second}")
    return Table(title="By seed", columns=columns, rows=rows)


def accuracy_tables(compared: Sequence[Compared]) -> list[Table]:
    """Return two tables for each machine and data set: what SE changes in accuracy, and what it costs.

    Comparisons of different machines share no table, because the costs include times.
    """
    groups: dict[tuple[str, str], list[Compared]] = {}
    for one in compared:
        groups.setdefault((one.record.machine.name, one.record.data.sha256), []).append(one)
    return [grid for group in groups.values() for grid in _grids_of_a_group(sorted(group, key=_size))]


def _grids_of_a_group(group: Sequence[Compared]) -> tuple[Table, Table]:
    records = [one.record for one in group]
    place = records[0].machine.gpu or records[0].machine.cpu
    data = records[0].data
    names = names_of(records)
    named = list(zip(names, records, strict=True))
    verdicts = [(name, compare_verdict(record)) for name, record in named]
    unresolved = [
        f"{name}, {METRIC_NAMES[one.metric]}: {one.difference.text}"
        for name, verdict in verdicts
        for one in verdict.judged
        if one.difference.kind not in ("better", "worse")
    ]
    bought_rows = tuple(_bought_row(one, name) for one, name in zip(group, names, strict=True))
    cost_rows = tuple(_costs_row(one, name) for one, name in zip(group, names, strict=True))
    score, second = _score_names(data)
    bought = Table(
        title=f"What SE buys on {data.title}",
        columns=("", "seeds", f"base {score}", score, "points", "published", second),
        rows=bought_rows,
        notes=(
            f"Trained: {'; '.join(trainings(records))}. {data.train_size:,} images to train on, {data.test_size:,} to "
            "test on; ± is one deviation over seeds, in brackets 95 % intervals of the difference, paired by seed.",
            *published_notes(records),
            *words_note(bought_rows),
            *(f"{name}: {words}" for name, record in named for words in _own_recipes(record)),
            *unresolved,
            *(f"{name}: {verdict.diverged}" for name, verdict in verdicts if verdict.diverged),
            *(f"{name}: {warning}" for name, record in named for warning in record.warnings),
            *not_published(records),
        ),
    )
    batches = ", ".join(dict.fromkeys(str(_batch(one)) for one in group))
    costs = Table(
        title=f"What it costs there ({place})",
        columns=("", "params", "MACs", "forward", "forward+backward"),
        rows=cost_rows,
        notes=(
            "In brackets 95 % intervals. MACs by the convention `paper`; forward of one image on one thread, "
            f"forward+backward of one batch ({batches}) as trained.",
            *_other_classes(group),
            *words_note(cost_rows),
            *_no_results(group),
        ),
    )
    return bought, costs


def trainings(records: Sequence[AccuracyRecord]) -> list[str]:
    """Return `cifar_short, 4 epochs, 3 seeds (se_resnet20_cifar)`; names only where trainings differ."""
    trained: dict[str, list[str]] = {}
    for record, name in zip(records, names_of(records), strict=True):
        seeds = len(record.seeds)
        words = f"{training_words(record)}, {units.counted(seeds, 'seed')}"
        trained.setdefault(words, []).append(name)
    return [words + (f" ({', '.join(which)})" if len(trained) > 1 else "") for words, which in trained.items()]


def names_of(records: Sequence[AccuracyRecord]) -> list[str]:
    """Return the names of comparisons in one table; those of one pair in several recipes with their recipe."""
    names = [name_of(record) for record in records]
    return [
        f"{name}, {training_words(record)}" if names.count(name) > 1 else name
        for name, record in zip(names, records, strict=True)
    ]


def name_of(record: AccuracyRecord) -> str:
    """Return the name of a comparison in tables.

    With a baseline that is not its own, whether each network has values of its own, and whether it is stale.
    """
    variant, baseline = variants_of(record)
    own = variant is not None and record.baseline == variant.baseline
    stale = any(
        facts is not None and facts.facts_hash != recorded
        for facts, recorded in ((variant, record.facts_hash), (baseline, record.baseline_facts_hash))
    )
    best = "" if record.variant_recipe is None else ", each at its best"
    return record.arch + ("" if own else f" against {record.baseline}") + best + (" (stale)" if stale else "")


def _bought_row(one: Compared, name: str) -> tuple[str, ...]:
    record = one.record
    verdict = compare_verdict(record)
    seeds = verdict.score.difference.seeds
    return (
        name,
        str(seeds) if seeds == len(record.seeds) else f"{seeds} of {len(record.seeds)}",
        *(NONE if level is None else level.shown for level in (verdict.score.baseline, verdict.score.variant)),
        _difference_words(verdict.score),
        _published_points(record),
        _difference_words(verdict.judged[-1]),
    )


# Data sets by the first word of what publications call them.
_PUBLISHED_ON = {
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "imagenet": "ImageNet-1k",
    "places365": "Places365-Challenge",
    "coco": "COCO",
}


def _published(record: AccuracyRecord) -> tuple[Published, Published] | None:
    """Return the published figures of a record's variant and baseline on its data; None unless both are of one table.

    They are top-1 errors, or the AP of detectors.
    """
    on = _PUBLISHED_ON.get(record.data.name)
    metric: PublishedMetric = "ap_pct" if record.data.task == "detection" else "top1_error_pct"
    ours, theirs = (None, None) if on is None else published_pair(*variants_of(record), metric, on=on)
    return None if ours is None or theirs is None else (ours, theirs)


def _published_points(record: AccuracyRecord) -> str:
    found = _published(record)
    if found is None:
        return NONE
    gain = found[0].value - found[1].value
    return f"{gain if found[0].metric == 'ap_pct' else -gain:+.2f}"


def _published_row(record: AccuracyRecord) -> list[tuple[str, ...]]:
    found = _published(record)
    if found is None:
        return []
    points = f"{_published_points(record)} points"
    if found[0].metric == "ap_pct":
        return [("published AP", *(f"{one.value:.1f} %" for one in reversed(found)), points)]
    return [("published top-1 accuracy", *(f"{100 - one.value:.2f} %" for one in reversed(found)), points)]


def published_notes(records: Sequence[AccuracyRecord]) -> tuple[str, ...]:
    """Return where the published pairs of some comparisons are from."""
    named: dict[str, list[str]] = {}
    for record, name in zip(records, names_of(records), strict=True):
        found = _published(record)
        if found is not None:
            source = f"{found[0].source}, {found[0].table}"
            named.setdefault(source, []).append(name)
    return tuple(f"Published ({', '.join(which)}): {source}." for source, which in named.items())


def _costs_row(one: Compared, name: str) -> tuple[str, ...]:
    return (
        name,
        _change(one, attrgetter("params")),
        _change(one, attrgetter("macs.paper")),
        change_words(one.forward_latency),
        change_words(one.step_latency),
    )


def _difference_words(one: PairedDifference) -> str:
    """Return `+0.76 [0.45, 1.07]`, or `n.s.` and what is not excluded."""
    found = one.difference
    decimals = 4 if one.metric == "loss" else 2
    if found.mean is None:
        return NONE
    if found.half_width is None:
        return f"{found.mean:+.{decimals}f}"
    low, high = (found.mean + sign * found.half_width for sign in (-1, 1))
    shown = NOT_SIGNIFICANT if found.kind == "not_shown" else f"{found.mean:+.{decimals}f}"
    return f"{shown} [{low:.{decimals}f}, {high:.{decimals}f}]"


def _size(one: Compared) -> tuple[int, str]:
    cost = one.costs.get(one.record.arch)
    return (0 if cost is None else cost.macs.all, one.record.arch)


def training_words(record: AccuracyRecord) -> str:
    """Return `cifar_short, 5 epochs`."""
    return f"{record.recipe.name}, {units.counted(record.recipe.epochs, 'epoch')}"


def not_published(records: Sequence[AccuracyRecord]) -> tuple[str, ...]:
    """Return a warning for each data set that is not the official one."""
    titles = dict.fromkeys(record.data.title for record in records if not record.data.official)
    return tuple(
        f"{title} is not the published set: do not compare these figures with published ones." for title in titles
    )


def _other_classes(group: Sequence[Compared]) -> tuple[str, ...]:
    """Return notes on networks that were timed with another number of classes than the data has."""
    named: dict[int, list[str]] = {}
    for one in group:
        variant, _ = variants_of(one.record)
        timed = one.forward is not None or one.step is not None
        # Of somebody's own code nobody says for how many classes it is.
        known = variant is not None and (bool(variant.file) or external.runs_code_of(variant) is None)
        if timed and known and variant is not None and variant.num_classes != one.record.data.num_classes:
            named.setdefault(variant.num_classes, []).append(one.record.arch)
    return tuple(
        f"{', '.join(dict.fromkeys(archs))}: times are of {classes:,} classes, costs and accuracies of the data's "
        f"{group[0].record.data.num_classes:,}."
        for classes, archs in named.items()
    )


def _no_results(group: Sequence[Compared]) -> tuple[str, ...]:
    """Return why times are too noisy, or failed."""
    return tuple(
        f"{one.record.arch}, {PHASE_NAMES[latency.phase]}: {verdict_sentence(latency)}"
        for one in group
        for latency in (one.forward_latency, one.step_latency)
        if latency is not None and latency.verdict_kind == "no_result"
    )


def _batch(compared: Compared) -> int:
    return compared.record.recipe.batch if compared.step is None else compared.step.workload.batch


def _seed_cells(seed: Seed) -> tuple[str, ...]:
    both = (seed.baseline, seed.variant)
    none = tuple("diverged" if told else NONE for told in (seed.baseline_diverged, seed.variant_diverged))
    score = [absent if one is None else f"{one.test.score_pct:.2f} %" for one, absent in zip(both, none, strict=True)]
    second = [NONE if one is None else _second(one.test) for one in both]
    points = NONE if seed.pair is None else f"{seed.pair[1].test.score_pct - seed.pair[0].test.score_pct:+.2f}"
    return (*score, points, *second)


def _score_names(data: DataSpec) -> tuple[str, str]:
    """Return what the score of a data set's networks is called, and the figure beside it."""
    one: tuple[Metric, Metric] = ("ap", "ap50") if data.task == "detection" else ("top1", "loss")
    return METRIC_NAMES[one[0]], METRIC_NAMES[one[1]]


def _second(test: Accuracy) -> str:
    return f"{test.loss:.4f}" if test.precision is None else f"{test.precision.ap50_pct:.2f} %"


def _both_costs(compared: Compared, figure: Callable[[Cost], float]) -> tuple[float, float] | None:
    both = [compared.costs.get(name) for name in (compared.record.baseline, compared.record.arch)]
    base, variant = (None if cost is None else figure(cost) for cost in both)
    return None if base is None or variant is None else (base, variant)


def _change(compared: Compared, figure: Callable[[Cost], float]) -> str:
    both = _both_costs(compared, figure)
    return NONE if both is None else units.percent(both[1] / both[0] - 1)


def _cost_row(label: str, compared: Compared, figure: Callable[[Cost], float]) -> tuple[str, ...]:
    both = _both_costs(compared, figure)
    cells = (NONE, NONE) if both is None else tuple(units.count(one) for one in both)
    return (label, *cells, _change(compared, figure))


def _time_rows(label: str, latency: Latency | None) -> list[tuple[str, ...]]:
    if latency is None:
        return []
    times = (NONE if one is None else units.seconds(one) for one in (latency.baseline_s, latency.variant_s))
    return [(label, *times, change_words(latency))]


def _level_row(one: PairedDifference) -> tuple[str, ...]:
    label = METRIC_NAMES[one.metric] + (" accuracy" if one.metric in ("top1", "top5") else "")
    levels = [NONE if level is None else level.text for level in (one.baseline, one.variant)]
    difference = one.difference
    if difference.mean is None:
        return (label, *levels, NONE)
    decimals = 4 if one.metric == "loss" else 2
    shown = f"{difference.mean:+.{decimals}f}"
    half = "" if difference.half_width is None else f" ± {difference.half_width:.{decimals}f}"
    return (label, *levels, shown + half)


def _trained_row(
    label: str, record: AccuracyRecord, value: Callable[[SeedOutcome], float], show: Callable[[float], str]
) -> tuple[str, ...]:
    """Means over the seeds, without a difference: the machine may have been busier with one than with the other."""
    found = [
        [value(outcome) for one in record.seeds if (outcome := getattr(one, arm)) is not None]
        for arm in ("baseline", "variant")
    ]
    return (label, *(show(mean(values)) if values else NONE for values in found), NONE)
