"""What `selab fold` decided about each block, and what the folded network costs."""

from collections.abc import Sequence

from selab import units
from selab.judging.choose import Choice
from selab.judging.folding import POINTS, Dead, Folding
from selab.judging.loss import Loss
from selab.records.verdict import change_words
from selab.report.table import Table
from selab.units import NONE


def folding_tables(record: Folding) -> list[Table]:
    """Return the decisions block by block, and the network before and after."""
    return [_choices(record), _networks(record)]


def _choices(record: Folding) -> Table:
    unit = "points" if record.unit == POINTS else "of output"
    return Table(
        title=f"The blocks of {record.arch}: {len(record.folded)} of {len(record.choices)} fold at "
        f"{record.limit:g} {record.unit}",
        columns=("block", "spread", f"alone, {unit}", f"together, {unit}", "decision"),
        rows=tuple(_row(one, record) for one in record.choices),
        notes=(
            "Spread: the root of the channels' mean variance over the images.",
            "Alone: what is lost when this gate alone is its mean; together: on other images, with those that were "
            "chosen before it, the cheapest alone first.",
            f"Chosen on {units.counted(record.chosen_on, 'image')}, two of three of {record.data}.",
            *(_dead_words(one) for one in record.dead),
        ),
        words=frozenset({0, 4}),
        drop_first=(3, 1),
    )


def _row(one: Choice, record: Folding) -> tuple[str, ...]:
    decision = f"folded: {one.where}" if one.folded else f"stays: {one.why_not}"
    return (one.path, f"{one.spread:.4f}", _cost(one.alone, record), _cost(one.together, record), decision)


def _dead_words(one: Dead) -> str:
    said = f"{one.path}: {units.counted(len(one.channels), 'channel')} always about 0"
    if one.pruned:
        return f"{said}: taken out"
    macs = "" if one.macs is None else f"; the convolution before makes them with {units.count(one.macs)} MACs"
    stays = units.plural_of(len(one.channels), "it stays", "they stay")
    return f"{said}{macs}{f'; {stays}: {one.why_not}' if one.why_not else ''}"


def _cost(value: float | None, record: Folding) -> str:
    if value is None:
        return NONE
    return f"{value:.2f}" if record.unit == POINTS else f"{value:.2g}"


def _networks(record: Folding) -> Table:
    rows: list[tuple[str, ...]] = []
    if record.loss is not None:
        loss = record.loss
        before, after = (f"{100 * right / loss.images:.2f} %" for right in (loss.before, loss.after))
        rows.append(("accuracy", before, after, loss_words(loss)))
    more = record.finetuned
    if more is not None:
        alone, tuned = (f"{100 * right / more.loss.images:.2f} %" for right in (more.loss.before, more.loss.after))
        rows.append((f"accuracy, {units.counted(more.epochs, 'epoch')} later", alone, tuned, loss_words(more.loss)))
    rows.append(("largest change of an output", NONE, NONE, f"{record.error:.2g} of the largest output"))
    is_left = len(record.folded) < len(record.choices)
    if record.gate_error is not None and is_left:
        by = f"of that by {record.gate}"
        rows.append((by, NONE, NONE, f"{record.gate_error:.2g} of the largest output"))
        if record.gate_loss is not None:
            rows.append((by, NONE, NONE, loss_words(record.gate_loss)))
    if record.before is not None and record.after is not None:
        for name, show in (("params", units.count), ("macs", units.count), ("bytes", units.size)):
            old, new = getattr(record.before, name), getattr(record.after, name)
            label = {"params": "parameters", "macs": "MACs, all", "bytes": "bytes moved, forward"}[name]
            rows.append((label, show(old), show(new), units.percent(new / old - 1) if old else NONE))
    if record.latency is not None:
        times = [
            NONE if one is None else units.seconds(one) for one in (record.latency.baseline_s, record.latency.variant_s)
        ]
        rows.append((f"forward, {record.runtime}, 1 thread", *times, change_words(record.latency)))
    notes = []
    if record.is_vague:
        notes.append("The interval is wider than the limit: so few images cannot show that the limit is kept.")
    if record.gate and not is_left:
        notes.append("Every block is folded: no gate is left to convert.")
    elif record.gate and not record.gate_error:
        notes.append(f"No gate changed: all that are left were a {record.gate} already.")
    return Table(
        title=f"{record.arch} before and after",
        columns=("", "before", "after", "change"),
        rows=tuple(rows),
        notes=(
            f"On the {units.counted(record.reported_on, 'image')} that did not decide."
            + (" In brackets 95 % intervals." if record.loss is not None or record.latency is not None else ""),
            *notes,
            *(
                [
                    f"Later: after training by {more.recipe} (learning rate {more.lr:g}), before and folded alike. "
                    f"That alone changes the network as it was by {loss_words(more.alone)}."
                ]
                if more is not None
                else []
            ),
        ),
    )


def summary_table(records: Sequence[Folding]) -> Table:
    """Return a table of foldings, one row each."""
    rows = []
    for one in records:
        loss = one.loss
        before, after = one.before, one.after
        rows.append(
            (
                one.arch,
                one.data,
                f"{one.limit:g} {'points' if one.unit == POINTS else 'of output'}",
                f"{len(one.folded)} of {len(one.choices)}",
                NONE if loss is None else f"{100 * loss.before / loss.images:.2f} %",
                NONE if loss is None else loss_words(loss),
                f"{one.error:.2g}",
                NONE if before is None or after is None else units.percent(after.params / before.params - 1),
                NONE if one.latency is None else f"{change_words(one.latency)}, {one.runtime}",
            )
        )
    return Table(
        title="Gates folded into weights",
        columns=("network", "images", "limit", "folded", "accuracy", "after", "output", "parameters", "forward"),
        rows=tuple(rows),
        notes=(
            "After: change of the accuracy on images that did not decide, with a 95 % interval. Output: the largest "
            "change of one, over the largest output. Forward: of one image, measured side by side. What costs more "
            "than its limit there was not written.",
        ),
        words=frozenset({0, 1, 2, 8}),
    )


def loss_words(loss: Loss) -> str:
    """Return `-0.12 points [-0.40, 0.16]`: what a change does to the accuracy."""
    return f"{-loss.points:+z.2f} points [{-loss.high:z.2f}, {-loss.low:z.2f}]"
