"""Energy of a variant against its baseline, from the steps of a counter around calls of both."""

import math
from collections.abc import Iterator, Sequence

from selab.records import stats
from selab.records.types import Energy, EnergyBlock, Phase

LEAST_BLOCKS = 3
"""So many ABBA blocks have an interval."""
_MOST_J = 1e9


def summarise(phase: Phase, counter: str, blocks: Sequence[EnergyBlock], *, batch: int, error: str = "") -> Energy:
    """Return the figures of some blocks.

    The change of a block is the mean of its two pairs' logarithms, the ratio that of all blocks, with Student's t
    interval over them.

    Args:
        phase: what one call is.
        counter: its name.
        blocks: joules of one call.
        batch: images of a call.
        error: why there are no more blocks.
    """
    sides = [_sides(block) for block in blocks]
    if not sides:
        return Energy(phase=phase, counter=counter, error=error)
    baseline_j, variant_j = (stats.median([side[place] for side in sides]) / batch for place in (0, 1))
    changes = [math.log(variant / baseline) for baseline, variant in sides]
    found = stats.paired_t_interval(changes) if len(changes) >= LEAST_BLOCKS else None
    low, high = (None, None) if found is None else (math.exp(found[0] - found[1]), math.exp(found[0] + found[1]))
    return Energy(
        phase=phase,
        counter=counter,
        blocks=tuple(blocks),
        baseline_j=baseline_j,
        variant_j=variant_j,
        ratio=math.exp(stats.mean(changes)),
        ratio_low=low,
        ratio_high=high,
        error=error,
    )


def _sides(block: EnergyBlock) -> tuple[float, float]:
    """Return the geometric means of the baseline's and the variant's two samples."""
    letters = list(zip(block.order, block.joules, strict=True))
    baseline, variant = (
        math.sqrt(math.prod(joules for letter, joules in letters if letter == side)) for side in ("A", "B")
    )
    return baseline, variant


def mistaken_energy(energy: Energy, batch: int, where: str) -> Iterator[str]:
    """Yield what the blocks of a stored energy do not give: field and reason."""
    samples = [joules for block in energy.blocks for joules in block.joules]
    if not all(0 < joules <= _MOST_J for joules in samples):
        yield f"{where}.blocks: have a sample that is not above 0 J, or above {_MOST_J:g} J"
        return
    again = summarise(energy.phase, energy.counter, energy.blocks, batch=batch, error=energy.error)
    for name in ("baseline_j", "variant_j", "ratio", "ratio_low", "ratio_high"):
        stored, computed = getattr(energy, name), getattr(again, name)
        if (stored is None) != (computed is None) or (
            stored is not None and not math.isclose(stored, computed, rel_tol=1e-9)
        ):
            yield f"{where}.{name}: is stored as {stored!r}, its blocks give {computed!r}"
