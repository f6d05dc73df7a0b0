import math
import random

import msgspec
import pytest

from selab.errors import RecordError
from selab.records import estimate, flags, stats, verdict
from selab.records.types import ABBABlock, Estimate, Flag, Latency, Run


def block(order, *samples):
    return ABBABlock(
        order=order, floor=samples, typical=tuple(2 * s for s in samples), mean=tuple(3 * s for s in samples)
    )


def run_of(quads, **fields):
    known = {
        "calls_per_sample": 1,
        "warmup_calls": 12,
        "warmup_s": 1.0,
        "seed": 0,
        "steady": True,
        "status": "converged",
        "elapsed_s": 4.0,
    }
    return Run(quads=tuple(quads), **{**known, **fields})


def simulated(ratio, *, seed, quads=10, noise=0.004, base=0.010, level=lambda part: 1.0, second=1.0, **fields):
    """A run whose samples are base * ratio, times noise, times the machine's level at that part of the run."""
    draw = random.Random(seed)
    taken = []
    for index in range(quads):
        order = draw.choice(["ABBA", "BAAB"])
        here = base * level(index / quads)
        samples = [
            here * (ratio if arm == "B" else 1.0) * (second if place % 2 else 1.0) * math.exp(draw.gauss(0, noise))
            for place, arm in enumerate(order)
        ]
        taken.append(block(order, *samples))
    return run_of(taken, **fields)


def summary(runs, controls=None, **fields):
    if controls is None:
        controls = [simulated(1.0, seed=seed) for seed in (101, 102)]
    known = {"phase": "forward", "method": "wall", "statistic": "floor", "threads": 1, "mode": "eval"}
    return verdict.summarise(runs=runs, controls=controls, **{**known, **fields})


def estimated(low, ratio, high, baseline_s=0.1):
    return Estimate(
        baseline_s=baseline_s,
        variant_s=baseline_s * ratio,
        ratio=ratio,
        ratio_low=low,
        ratio_high=high,
        pairs=40,
        processes=1,
    )


# ------------------------------------------------------------------------------------------------- pairs and estimates


def test_pairs_are_neighbours_with_the_baseline_first():
    assert estimate.block_pairs(block("ABBA", 1.0, 2.0, 3.0, 4.0), "floor") == ((1.0, 2.0), (4.0, 3.0))
    assert estimate.block_pairs(block("BAAB", 1.0, 2.0, 3.0, 4.0), "floor") == ((2.0, 1.0), (3.0, 4.0))
    assert estimate.block_pairs(block("BAAB", 1.0, 2.0, 3.0, 4.0), "mean") == ((6.0, 3.0), (9.0, 12.0))


@pytest.mark.parametrize("sample", [0.0, -1.0, math.nan, math.inf])
def test_a_sample_that_is_no_time_is_refused(sample):
    with pytest.raises(RecordError, match="positive times"):
        estimate.block_pairs(block("ABBA", 1.0, sample, 1.0, 1.0), "floor")


def test_estimate_of_one_process_is_the_median_and_its_ranks():
    # One pair of each block has the ratio exp(i / 1000), the other exp(-i / 1000): 20 distinct log-ratios around 0.
    quads = [block("ABBA", 1.0, math.exp(i / 1000), math.exp(-i / 1000), 1.0) for i in range(1, 11)]
    found = estimate.estimate([run_of(quads)], "floor")
    assert found.ratio == pytest.approx(1.0, abs=1e-15)
    # Ranks 6 and 15 of -10..-1, 1..10.
    assert found.ratio_low == pytest.approx(math.exp(-5 / 1000), rel=1e-12)
    assert found.ratio_high == pytest.approx(math.exp(5 / 1000), rel=1e-12)
    assert (found.pairs, found.processes) == (20, 1)
    assert estimate.half_width(quads, "floor") == pytest.approx(0.005, rel=1e-9)
    assert estimate.relative_half_width(found) == pytest.approx(0.005, rel=1e-9)
    assert found.baseline_s == 1.0


def test_a_surer_estimate_has_wider_ranks():
    run = run_of([block("ABBA", 0.1, 0.1 * (1 + i / 1000), 0.1 * (1 + i / 1000), 0.1) for i in range(20)])
    logs = [estimate.log_ratio(*pair) for pair in estimate.pairs(run, "floor")]
    found = estimate.estimate([run], "floor", confidence=0.999)
    low, high = stats.median_interval(logs, 0.999)
    assert (found.ratio_low, found.ratio_high) == pytest.approx((math.exp(low), math.exp(high)))
    usual = estimate.estimate([run], "floor")
    assert found.ratio_low < usual.ratio_low <= usual.ratio == found.ratio <= usual.ratio_high < found.ratio_high


def test_slow_linear_drift_cancels_within_a_blocks():
    # Each sample is 1 % longer than the one before; the two pairs of a block err in opposite directions.
    times = iter(0.01 * 1.01**i for i in range(40))
    quads = [block("ABBA", *(next(times) * (1.02 if arm == "B" else 1) for arm in "ABBA")) for _ in range(10)]
    assert estimate.estimate([run_of(quads)], "floor").ratio == pytest.approx(1.02, rel=1e-9)


def test_several_processes_widen_to_what_lies_between_them():
    runs = [simulated(1.02 * factor, seed=seed, noise=0.001) for seed, factor in enumerate((0.98, 1.0, 1.02))]
    singles = [math.log(estimate.estimate([run], "floor").ratio) for run in runs]
    found = estimate.estimate(runs, "floor")
    half = 4.302653 * stats.sample_deviation(singles) / math.sqrt(3)
    assert math.log(found.ratio) == pytest.approx(sum(singles) / 3, rel=1e-12)
    assert estimate.relative_half_width(found) == pytest.approx(half, rel=1e-6)
    assert (found.pairs, found.processes) == (60, 3)


def test_several_processes_are_never_narrower_than_one():
    run = simulated(1.02, seed=1)
    found = estimate.estimate([run, run, run], "floor")
    assert estimate.relative_half_width(found) == pytest.approx(estimate.half_width(run.quads, "floor"), rel=1e-12)


def test_too_few_pairs_give_no_estimate():
    short = simulated(1.02, seed=1, quads=9)
    assert estimate.half_width(short.quads, "floor") is None
    with pytest.raises(estimate.InsufficientPairsError, match="18 pairs"):
        estimate.estimate([short], "floor")
    with pytest.raises(estimate.InsufficientPairsError, match="18 pairs"):
        estimate.estimate([simulated(1.02, seed=1), short], "floor")
    with pytest.raises(estimate.InsufficientPairsError, match="no runs"):
        estimate.estimate([], "floor")
    with pytest.raises(estimate.InsufficientPairsError, match="no control"):
        estimate.noise_floor([], "floor")


def relabelled(run):
    other = {"ABBA": "BAAB", "BAAB": "ABBA"}
    return msgspec.structs.replace(
        run, quads=tuple(msgspec.structs.replace(block, order=other[block.order]) for block in run.quads)
    )


@pytest.mark.parametrize("processes", [1, 3])
def test_swapped_arms_give_the_reciprocal(processes):
    runs = [simulated(1.03, seed=seed, quads=14) for seed in range(processes)]
    forth, back = (estimate.estimate(each, "floor") for each in (runs, [relabelled(run) for run in runs]))
    assert back.ratio == pytest.approx(1 / forth.ratio, rel=1e-15)
    assert back.ratio_low == pytest.approx(1 / forth.ratio_high, rel=1e-15)
    assert back.ratio_high == pytest.approx(1 / forth.ratio_low, rel=1e-15)
    assert (back.baseline_s, back.variant_s) == (forth.variant_s, forth.baseline_s)
    assert estimate.half_width(runs[0].quads, "floor") == estimate.half_width(relabelled(runs[0]).quads, "floor")
    assert summary(runs).verdict_kind == "slower"
    assert summary([relabelled(run) for run in runs]).verdict_kind == "faster"


def test_control_floor_is_the_worse_control():
    controls = [simulated(1.001, seed=1), simulated(0.98, seed=2)]
    worse = estimate.estimate([controls[1]], "floor")
    expected = 1 - worse.ratio + estimate.relative_half_width(worse)
    assert estimate.noise_floor(controls, "floor") == pytest.approx(expected, rel=1e-12)
    assert estimate.noise_floor(controls[:1], "floor") < estimate.noise_floor(controls, "floor")


# ------------------------------------------------------------------------------------------------------------ verdicts


@pytest.mark.parametrize(
    ("interval", "floor", "kind"),
    [
        ((1.017, 1.021, 1.025), 0.005, "slower"),
        ((0.975, 0.979, 0.983), 0.005, "faster"),
        ((1.017, 1.021, 1.025), 0.021, "undecided"),  # not above the floor
        ((1.017, 1.021, 1.025), 0.022, "undecided"),
        ((0.999, 1.021, 1.043), 0.005, "undecided"),  # does not exclude one
        ((1.000, 1.021, 1.043), 0.005, "undecided"),  # touches one
        ((0.996, 1.001, 1.006), 0.005, "equal"),
        ((0.990, 1.000, 1.010), 0.010, "equal"),
        ((0.989, 1.000, 1.009), 0.005, "undecided"),
        ((0.996, 1.001, 1.006), 0.011, "undecided"),  # the machine does not resolve 1 %
        ((1.002, 1.006, 1.009), 0.005, "slower"),  # resolved, though within 1 %
        ((1.002, 1.006, 1.009), 0.007, "equal"),
    ],
)
def test_kinds(interval, floor, kind):
    assert verdict.decide(estimated(*interval), floor) == kind


@pytest.mark.parametrize(
    ("interval", "floor", "difference_s", "text"),
    [
        ((1.017, 1.021, 1.025), 0.005, 0.0021, "slower by 2.10 % [1.70, 2.50], +2.10 ms"),
        ((0.975, 0.979, 0.983), 0.005, -0.0021, "faster by 2.10 % [1.70, 2.50], -2.10 ms"),
        ((1.30, 1.35, 1.40), 0.01, 0.035, "slower by 35.0 % [30.0, 40.0], +35.0 ms"),
        ((1.002, 1.006, 1.009), 0.005, 0.0006, "slower by 0.60 % [0.20, 0.90] (within 1 %), +600 µs"),
        ((0.996, 1.001, 1.006), 0.005, 0.0001, "equal within 1 % [-0.40, +0.60], +100 µs"),
        (
            (0.990, 1.004, 1.018),
            0.005,
            0.0004,
            "no difference measured; cannot exclude -1.0 %..+1.8 % (-1.0 ms..+1.8 ms)",
        ),
        (
            (1.003, 1.011, 1.019),
            0.015,
            0.0011,
            "no difference measured; cannot exclude -1.50 %..+1.90 % (-1.50 ms..+1.90 ms); "
            "+1.10 % is within the noise floor of 1.50 %",
        ),
        (
            (0.996, 1.001, 1.006),
            0.02,
            0.0001,
            "no difference measured; cannot exclude -0.40 %..+0.60 % (-400 µs..+600 µs); the noise floor is 2.00 %",
        ),
    ],
)
def test_sentences(interval, floor, difference_s, text):
    assert verdict.sentence(estimated(*interval), floor, difference_s).text == text


def test_digits_grow_where_a_resolved_difference_would_read_as_none():
    found = estimated(1.00001, 1.0002, 1.03)
    assert verdict.sentence(found, 0.0001, 2e-5).text.startswith("slower by 0.020 % [0.001, 3.000]")


def test_no_noise_at_all_still_reads_well():
    found = estimated(1.02, 1.02, 1.02)
    assert verdict.sentence(found, 0.0, 0.002).text == "slower by 2.0 % [2.0, 2.0], +2.00 ms"


# ----------------------------------------------------------------------------------------------------------- summaries


def test_summary_of_a_slower_variant():
    latency = summary([simulated(1.03, seed=1)])
    assert latency.verdict_kind == "slower"
    assert latency.ratio_low <= 1.03 <= latency.ratio_high
    assert latency.difference_s == pytest.approx(0.010 * 0.03, rel=0.15)
    assert latency.baseline_s == pytest.approx(0.010, rel=0.01)
    assert latency.variant_s == pytest.approx(0.0103, rel=0.01)
    assert latency.flags == ()
    assert latency.error == ""


@pytest.mark.parametrize(
    ("runs", "controls", "reason", "has_ratio"),
    [
        ([simulated(1.03, seed=1, quads=7)], None, "14 pairs in 4 s, 20 are needed", False),
        ([simulated(1.03, seed=1, noise=0.2)], None, "more than ±5 %", True),
        ([simulated(1.03, seed=1)], [], "control: no control run", True),
        ([simulated(1.03, seed=1)], [simulated(1.0, seed=2, quads=3)], "control: 6 pairs", True),
        ([simulated(1.20, seed=1)], [simulated(1.06, seed=2)], "control: the baseline against itself shows", True),
        ([run_of([])], None, "0 pairs", False),
        ([], None, "no runs", False),
    ],
)
def test_no_result_says_why(runs, controls, reason, has_ratio):
    latency = summary(runs, controls)
    assert latency.verdict_kind == "no_result"
    assert latency.verdict.startswith("no result: ")
    assert reason in latency.verdict
    assert (latency.ratio is not None) == has_ratio
    verdict.check(latency)


def test_all_reasons_are_told():
    latency = summary([simulated(1.03, seed=1, quads=7)], [simulated(1.06, seed=2)])
    assert "14 pairs" in latency.verdict
    assert "control: the baseline" in latency.verdict


def test_medians_of_a_short_run_are_kept():
    latency = summary([simulated(1.03, seed=1, quads=7)])
    assert latency.baseline_s == pytest.approx(0.010, rel=0.01)
    assert latency.difference_s is None


def test_an_error_is_the_reason():
    latency = summary([], [], error="out of memory: 9.1 GB asked for")
    assert latency.verdict == "no result: out of memory: 9.1 GB asked for"
    assert latency.verdict_kind == "no_result"
    assert latency.noise_floor is None
    verdict.check(latency)


def test_the_difference_has_the_sign_of_the_ratio_where_the_machine_drifts():
    # Arms of a few quads, times doubling on the way: medians over the run mix levels, pairs do not.
    run = simulated(1.004, seed=3, quads=20, noise=0.001, level=lambda part: 1 + part)
    assert estimate.paired_difference_s([run], "floor") == pytest.approx(0.004 * 0.015, rel=0.2)


@pytest.mark.parametrize(("threads", "kind"), [(1, "slower"), (2, "no_result")])
def test_several_threads_under_contention_give_no_result(threads, kind):
    flagged = msgspec.structs.replace(simulated(1.03, seed=1), flags=(Flag(name="contention", detail="others"),))
    latency = verdict.summarise(
        phase="forward",
        method="wall",
        statistic="floor",
        threads=threads,
        mode="eval",
        runs=[flagged],
        controls=[simulated(1.0, seed=2)],
    )
    assert latency.verdict_kind == kind
    assert ("while 2 threads were measured" in latency.verdict) == (threads == 2)


def test_reasons_against_a_result_one_by_one():
    wide, restless = simulated(1.2, seed=1, noise=0.3), simulated(1.2, seed=2)
    latency = summary([wide], [restless])
    one, other = verdict.no_result_reasons(latency)
    assert (one.split()[:2], other.split()[:2]) == (["the", "interval"], ["control:", "the"])
    assert latency.verdict == f"no result: {one}; {other}"
    assert verdict.no_result_reasons(summary([], [], error="out of memory")) == ["out of memory"]
    assert verdict.no_result_reasons(summary([simulated(1.03, seed=3)])) == []


def test_check_accepts_what_summarise_made_and_what_json_kept():
    latency = summary([simulated(1.03, seed=seed) for seed in range(3)])
    verdict.check(latency)
    again = msgspec.json.decode(msgspec.json.encode(latency), type=Latency)
    verdict.check(again)
    assert verdict.recompute(again) == latency


@pytest.mark.parametrize("field", verdict.FIGURES)
def test_check_names_a_figure_that_disagrees(field):
    latency = summary([simulated(1.03, seed=1)])
    for wrong in (getattr(latency, field) * 1.001, None):
        with pytest.raises(RecordError, match=f"forward wall: {field} is stored"):
            verdict.check(msgspec.structs.replace(latency, **{field: wrong}))


def test_check_writes_the_words_anew():
    latency = summary([simulated(1.03, seed=1)])
    assert verdict.check(msgspec.structs.replace(latency, verdict="faster by 50 %")) == latency


@pytest.mark.parametrize(
    ("field", "wrong"), [("verdict_kind", "equal"), ("flags", (Flag(name="throttled", detail="never"),))]
)
def test_check_names_claims_that_disagree(field, wrong):
    latency = summary([simulated(1.03, seed=1)])
    with pytest.raises(RecordError, match=f"{field} is stored"):
        verdict.check(msgspec.structs.replace(latency, **{field: wrong}))


def test_check_sees_an_altered_sample():
    latency = summary([simulated(1.03, seed=1)])
    altered = msgspec.structs.replace(latency.runs[0], quads=latency.runs[0].quads[:-1] + latency.runs[0].quads[:1])
    with pytest.raises(RecordError):
        verdict.check(msgspec.structs.replace(latency, runs=(altered,)))


# --------------------------------------------------------------------------------------------------------------- flags


def flags_of(run):
    return {flag.name: flag.detail for flag in flags.run_flags(run, "floor")}


def test_a_quiet_run_has_no_flags():
    for seed in range(20):
        assert flags_of(simulated(1.03, seed=seed, quads=20)) == {}


def test_dispersion_flag():
    found = flags_of(simulated(1.0, seed=1, quads=40, noise=0.1))
    assert set(found) == {"dispersion"}
    assert "robust deviation" in found["dispersion"]


def test_outlier_flag_and_that_outliers_stay_in():
    calm = simulated(1.0, seed=1, quads=20)
    spiked = tuple(
        msgspec.structs.replace(each, floor=(each.floor[0] * 1.5, *each.floor[1:])) if index % 3 == 0 else each
        for index, each in enumerate(calm.quads)
    )
    run = msgspec.structs.replace(calm, quads=spiked)
    assert "7 of 80 samples" in flags_of(run)["outliers"]
    assert estimate.estimate([run], "floor").pairs == 40


def test_drift_flag_of_the_machine():
    found = flags_of(simulated(1.0, seed=1, quads=20, level=lambda part: 1 + 0.2 * part))
    assert "the baseline's time changed by +1" in found["drift"]
    assert "ratio" not in found["drift"]


def test_drift_flag_of_the_ratio():
    early, late = (simulated(ratio, seed=seed, quads=10) for ratio, seed in ((1.02, 1), (1.06, 2)))
    run = msgspec.structs.replace(early, quads=early.quads + late.quads)
    assert "the ratio changed by +" in flags_of(run)["drift"]


@pytest.mark.parametrize(("second", "word"), [(1.03, "slower"), (0.97, "faster")])
def test_order_effect_flag(second, word):
    run = simulated(1.0, seed=1, quads=20, second=second)
    found = flags_of(run)
    assert set(found) == {"order_effect"}
    assert word in found["order_effect"]
    assert estimate.estimate([run], "floor").ratio == pytest.approx(1.0, abs=0.005)


def test_steadiness_and_the_samplers_own_flags():
    carried = Flag(name="contention", detail="load 3.1 on 2 cores")
    run = simulated(1.0, seed=1, steady=False, warmup_s=10.0, warmup_calls=40, flags=(carried,))
    assert flags_of(run) == {
        "no_steady_state": "after 10 s and 40 calls of warm-up, two equal windows still differed by 1 % or more; "
        "the machine had not reached a steady speed; stop other programs and measure again",
        "contention": "load 3.1 on 2 cores",
    }


def test_flags_of_several_processes_are_merged_and_counted():
    carried = Flag(name="contention", detail="load 3.1")
    runs = [simulated(1.0, seed=seed, flags=(carried,) if seed else ()) for seed in range(3)]
    assert flags.merged_flags(runs, "floor") == (Flag(name="contention", detail="in 2 of 3 processes: load 3.1"),)


def test_flags_never_change_the_figures():
    plain = simulated(1.03, seed=1)
    flagged = msgspec.structs.replace(plain, steady=False, flags=(Flag(name="throttled", detail="98 °C"),))
    first, second = summary([plain]), summary([flagged])
    assert [getattr(first, name) for name in verdict.FIGURES] == [getattr(second, name) for name in verdict.FIGURES]
    assert first.verdict == second.verdict
    assert [flag.name for flag in second.flags] == ["no_steady_state", "throttled"]
