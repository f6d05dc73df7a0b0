"""What benchmark tools print, as records."""

import math

import pytest

from selab.errors import RecordError
from selab.records.imported import (
    TOOLS,
    Imported,
    ToolRun,
    imported_path,
    ratio_of,
    read_imported,
    read_run,
    save_imported,
)

LITERT = """INFO: STARTING!
INFO: Running benchmark for at least 1 iterations and at least 0.5 seconds but terminate if exceeding 150 seconds.
INFO: count=8 first=60000 curr=58000 min=57000 max=60000 avg=58147.4 std=1478 p5=57100 median=57962 p95=60000
INFO: Running benchmark for at least 50 iterations and at least 1 seconds but terminate if exceeding 150 seconds.
INFO: count=50 first=52162 curr=49785 min=49088 max=68610 avg=5.17432e+04 std=607 p5=49620 median=51891 p95=54628
INFO: Inference timings in us: Init: 119515, First inference: 87112, Warmup (avg): 58147.4, Inference (avg): 5.17432e+04
"""
OLD_LITERT = """count=50 first=249042 curr=250889 min=247067 max=254474 avg=249684 std=1442
Inference timings in us: Init: 16242, First inference: 360262, Warmup (avg): 304586, Inference (avg): 249684
"""
ONNXRUNTIME = """Session creation time cost: 0.169475 s
First inference time cost: 109 ms
Total inference time cost: 0.0727021 s
Total inference requests: 10
Average inference time cost total: 7.270205 ms
Min Latency: 0.00720383 s
P50 Latency: 0.00727787 s
"""
OLD_ONNXRUNTIME = """Total inference requests:1
Average inference time cost:734.606 ms
"""
OPENVINO = """[ INFO ] Execution Devices:['CPU']
[ INFO ] Count:            1000 iterations
[ INFO ] Duration:         2910.11 ms
[ INFO ] Latency:
[ INFO ]    Median:        2.87 ms
[ INFO ]    Average:       2.91 ms
[ INFO ]    Min:           2.71 ms
"""
EXECUTORCH = "I 00:00:01.6 executorch:runner.cpp:487] Model executed successfully 50 time(s) in 123.500000 ms.\n"


@pytest.mark.parametrize(
    ("runtime", "text", "expected"),
    [
        ("litert", LITERT, (5.17432e-2, 5.1891e-2, 50)),
        ("litert", OLD_LITERT, (0.249684, None, 50)),
        ("onnxruntime", ONNXRUNTIME, (7.270205e-3, 7.27787e-3, 10)),
        ("onnxruntime", OLD_ONNXRUNTIME, (0.734606, None, 1)),
        ("openvino", OPENVINO, (2.91e-3, 2.87e-3, 1000)),
        ("executorch", EXECUTORCH, (2.47e-3, None, 50)),
    ],
)
def test_what_each_tool_prints(tmp_path, runtime, text, expected):
    (tmp_path / "a.txt").write_text(text)
    run = read_run(tmp_path / "a.txt", runtime)
    mean, median, number = expected
    assert run.mean_s == pytest.approx(mean)
    assert run.median_s == (None if median is None else pytest.approx(median))
    assert run.inferences == number
    assert run.typical_s == pytest.approx(mean if median is None else median)


@pytest.mark.parametrize("runtime", TOOLS)
@pytest.mark.parametrize("text", ["", "Average: ... ms\n" * 3, "Model executed successfully 0 time(s) in 0.0 ms."])
def test_another_text_is_refused(tmp_path, runtime, text):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(RecordError, match=rf"a\.txt: is no output of {TOOLS[runtime][0].split()[0]}"):
        read_run(tmp_path / "a.txt", runtime)


def test_a_time_that_is_none(tmp_path):
    (tmp_path / "a.txt").write_text("Model executed successfully 3 time(s) in 0.0 ms.")
    with pytest.raises(RecordError, match="says 0 s for an inference"):
        read_run(tmp_path / "a.txt", "executorch")


def runs(*seconds):
    return tuple(ToolRun(mean_s=one) for one in seconds)


def test_pairs_cancel_what_drifts():
    base, variant = runs(1.0, 2.0, 4.0), runs(1.1, 2.2, 4.4)
    ratio, low, high = ratio_of(base, variant)
    assert ratio == pytest.approx(1.1)
    assert low == pytest.approx(high) == pytest.approx(1.1)


def test_the_interval_is_students():
    ratio, low, high = ratio_of(runs(1.0, 1.0, 1.0), runs(1.0, math.e, math.e**2))
    # Mean 1, deviation 1, t of two degrees of freedom 4.3027.
    assert math.log(ratio) == pytest.approx(1)
    assert math.log(high) - 1 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-5)
    assert 1 - math.log(low) == pytest.approx(4.302653 / math.sqrt(3), rel=1e-5)


def test_two_pairs_have_no_interval():
    assert ratio_of(runs(1.0, 1.0), runs(2.0, 2.0)) == (pytest.approx(2.0), None, None)


@pytest.mark.parametrize(("base", "variant"), [((), ()), ((1.0,), (1.0, 1.0))])
def test_as_many_of_each(base, variant):
    with pytest.raises(RecordError, match="give as many of each"):
        ratio_of(runs(*base), runs(*variant))


def record(**changes):
    ratio, low, high = ratio_of(runs(1.0, 1.0, 1.1), runs(1.2, 1.3, 1.3))
    facts = {"selab": "0", "arch": "se_mobilenet", "baseline": "mobilenet", "device": "Pixel 8 (cold)", "dtype": "fp32"}
    facts |= {"runtime": "litert", "threads": 4, "ratio": ratio, "ratio_low": low, "ratio_high": high}
    facts |= {"baseline_runs": runs(1.0, 1.0, 1.1), "variant_runs": runs(1.2, 1.3, 1.3)}
    return Imported(**{**facts, **changes})


def test_there_and_back(tmp_path):
    path = imported_path(tmp_path, record())
    assert path.relative_to(tmp_path).parts[:2] == ("pixel-8-cold", "imported")
    save_imported(record(), path)
    assert read_imported(path) == record()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ratio": 1.0}, "ratio: is 1.0, its runs give"),
        ({"ratio_low": None}, "ratio_low: is None"),
        ({"baseline_runs": runs(1.0, 1.0)}, "runs: 2 runs of the baseline and 3 of the network"),
        ({"variant_runs": runs(1.2, 1.3, -1.0)}, r"variant_runs\[2\]: is not between"),
        ({"schema": "selab.imported/9"}, "schema"),
    ],
)
def test_a_record_that_was_changed_is_refused(tmp_path, changes, said):
    save_imported(record(**changes), tmp_path / "a.json")
    with pytest.raises(RecordError, match=said):
        read_imported(tmp_path / "a.json")
