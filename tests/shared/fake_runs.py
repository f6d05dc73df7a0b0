"""Made-up runs, shared by the tests of what is computed from them."""

from selab.records.types import ABBABlock, Run


def paired_run(ratio, *, blocks=10, wobble=1e-4, variant_wobble=None, **fields):
    """Return a run of 1 ms against `ratio` ms in ABBA blocks, two pairs each.

    Args:
        ratio: variant / baseline.
        blocks: how many.
        wobble: the baseline's time grows by 0, 1 and 2 times this share in turn.
        variant_wobble: by which the variant's time is off `ratio` times the baseline's of its block: minus, not at all
            and plus this share in turn. By default the variant takes the same time in every block.
        fields: other fields of the run.
    """
    quads = []
    for index in range(blocks):
        step = index % 3
        base, other = 1e-3 * (1 + wobble * step), ratio * 1e-3
        if variant_wobble is not None:
            other = ratio * base * (1 + variant_wobble * (step - 1))
        four = (base, other, other, base)
        quads.append(ABBABlock(order="ABBA", floor=four, typical=four, mean=four))
    default = {
        "calls_per_sample": 1,
        "warmup_calls": 10,
        "warmup_s": 1.0,
        "seed": 0,
        "steady": True,
        "status": "converged",
        "elapsed_s": 1.0,
    }
    return Run(**{**default, **fields}, quads=tuple(quads))
