"""What gates do, as a table: one row a block, in the order of the network."""

from selab import units
from selab.judging.record import Gates
from selab.judging.statistics import CONSTANT, HIGH, LOW, BlockGates
from selab.report.table import Table
from selab.units import NONE

# Fewer images show no spread, and no class.
_FEW = 50
_COLUMNS = ("block", "channels", "mean", "spread", "between classes", "low", "high", "constant", "dead")


def gates_table(gates: Gates) -> Table:
    """Return the table of a network's gates."""
    labelled = f", {units.counted(len(gates.classes), 'class', 'classes')}" if gates.classes else ""
    notes = [
        "Spread: the root of the channels' mean variance over the images.",
        f"Low and high: share of the factors below {LOW} and above {HIGH}. Constant: channels whose factors all lie "
        f"within {CONSTANT}. Dead: channels whose factors are all below {LOW}.",
    ]
    if gates.classes:
        notes.insert(
            1, "Between classes: share of the variance that lies between the classes' means (epsilon squared)."
        )
    still = [one.path for one in gates.blocks if len(one.constant) == one.channels]
    if gates.images < _FEW:
        notes.append(f"Few images ({gates.images}) say little about how much gates vary; look at more.")
    elif still:
        notes.append(f"The gates do not depend on the image in {', '.join(still)}.")
    return Table(
        title=f"The gates of {gates.arch} over {units.counted(gates.images, 'image')} of {gates.data}{labelled}",
        columns=_COLUMNS,
        rows=tuple(_row(one) for one in gates.blocks),
        notes=tuple(notes),
        drop_first=(5, 6, 1, 8, 7),
    )


def _row(block: BlockGates) -> tuple[str, ...]:
    return (
        block.path,
        str(block.channels),
        f"{_mean(block.mean):.3f}",
        f"{block.spread:.4f}",
        _between(block),
        units.share(_mean(block.low)),
        units.share(_mean(block.high)),
        str(len(block.constant)),
        str(len(block.dead)),
    )


def _mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values)


def _between(block: BlockGates) -> str:
    if block.specificity is None:
        return NONE
    if block.specificity_low is None or block.specificity_high is None:
        return units.share(block.specificity)
    bounds = f"[{block.specificity_low * 100:.1f}, {block.specificity_high * 100:.1f}]"
    return f"{units.share(block.specificity)} {bounds}"
