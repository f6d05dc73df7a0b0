"""What several processes found of a tax, gathered pair by pair."""

import re

import msgspec
import pytest
from fake_runs import paired_run

from selab.experiments import tax
from selab.experiments.children import Found
from selab.experiments.job import Request, resolve
from selab.experiments.tax import TaxOrder
from selab.experiments.tax_gathered import Gathered, TaxFound
from selab.experiments.tax_record import read_tax_record, read_tax_records

PAIRS = [("baseline", "again"), ("baseline", "plain"), ("baseline", "reference"), ("baseline", "fast")]


def found(reference, *, failed=(), **changes):
    runs = {("baseline", "again"): 1.0, ("baseline", "reference"): reference, ("baseline", "fast"): 1.02}
    given = {
        "runs": tuple(("wall", *pair, paired_run(ratio, blocks=2, wobble=0.0)) for pair, ratio in runs.items()),
        "failed": failed,
        "saved": {},
        "remarks": {},
    }
    return TaxFound(**given | changes)


@pytest.fixture
def gathered():
    job = resolve(Request(arch="se_small_cnn", threads=1, processes=3, phases=("forward",)))
    return Gathered(job=job, pairs=PAIRS)


def latencies(gathered):
    return {(pair.baseline, pair.variant): pair.latency for pair in gathered.summaries()}


def test_each_process_is_one_sample(gathered):
    assert gathered.words() == "measuring"
    for process, ratio in enumerate((1.10, 1.12, 1.11)):
        gathered.add(process, found(ratio))
    reference = latencies(gathered)["baseline", "reference"]
    assert (reference.unit, reference.verdict_kind) == ("process", "slower")
    assert reference.ratio == pytest.approx((1.10 * 1.12 * 1.11) ** (1 / 3))
    assert len(reference.controls) == 3
    assert gathered.words() == "reference +11.0 % [8.5, 13.5], fused +2.0 % [2.0, 2.0]"


def test_a_process_that_died_is_left_out_and_named(gathered):
    for process, ratio in enumerate((1.10, 5.0, 1.12, 1.11)):
        gathered.add(process, found(ratio, failed=(("wall", "plain", "it was dying"),) if process == 1 else ()))
    assert gathered.has_failed("plain")
    gathered.drop(1, "process 2: ended by SIGKILL; its samples are left out")
    assert not gathered.has_failed("plain")
    assert gathered.deaths == ["process 2: ended by SIGKILL; its samples are left out"]
    assert latencies(gathered)["baseline", "reference"].ratio == pytest.approx((1.10 * 1.12 * 1.11) ** (1 / 3))


def test_a_network_that_fails_says_why(gathered):
    gathered.add(0, found(1.1, failed=(("wall", "plain", "out of memory: no room"),)))
    assert latencies(gathered)["baseline", "plain"].verdict == "no result: out of memory: no room"


def test_what_the_first_process_says_of_networks_counts(gathered):
    gathered.add(0, found(1.1, saved={"fast": 5}, remarks={"fast": "fused: all"}))
    gathered.add(1, found(1.1, saved={"fast": 6, "reference": 7}, remarks={"fast": "fused: some"}))
    assert (gathered.saved, gathered.remarks) == ({"fast": 5, "reference": 7}, {"fast": "fused: all"})


def test_orders_and_findings_travel_as_json():
    job = resolve(Request(arch="se_small_cnn", phases=("forward",)))
    order = TaxOrder(job=job, implementations=("reference",), seed=3, seconds=0.5)
    for one in (order, found(1.1, failed=(("wall", "plain", "why"),))):
        assert msgspec.json.decode(msgspec.json.encode(one), type=type(one)) == one


@pytest.mark.parametrize("processes", [2, 3])
def test_an_interruption_keeps_what_has_an_interval(selab, toy, tmp_path, monkeypatch, processes):
    def cut_short(*_):
        for number in range(processes):
            what = found(1.1 + number / 100)
            plain = ("wall", "baseline", "plain", paired_run(1.01, blocks=2, wobble=0.0))
            what = msgspec.structs.replace(what, runs=(*what.runs, plain))
            yield Found(number=number, where=f"process {number + 1}", what=what)
        raise KeyboardInterrupt

    monkeypatch.setattr(tax, "in_processes", cut_short)
    out = tmp_path / "out"
    status, said, error = selab("tax", "--arch", f"{toy}:se_toy", "--impl", "reference", "--out", out)
    assert status == 130, error
    files = list(out.rglob("*.json"))
    if processes == 2:
        assert "nothing was written: an interval needs 3 processes" in " ".join(error.split())
        assert files == []
        return
    assert "+11.0 %" in said
    assert "interrupted: fewer processes than planned" in " ".join(said.split())
    (path,) = files
    assert path.name.endswith(".partial.json")
    assert "interrupted; what was measured until then is in" in " ".join(error.split())
    assert {len(pair.latency.runs) for pair in read_tax_record(path).pairs} == {3}
    # It is no whole record.
    assert read_tax_records(path.parents[1]) == []


@pytest.mark.slow
def test_three_processes(selab, toy, tmp_path):
    words = ["tax", "--arch", f"{toy}:se_toy", "--impl", "reference", "--impl", "fused", "--free-heap"]
    status, shown, error = selab(*words, "--processes", 3, "--budget", 1, "--out", tmp_path)
    assert status == 0, error
    assert re.search(r"process 3 of 3, about \d+ s left: reference (about )?[+-]", " ".join(error.split()))
    assert "measuring for about" in error
    (path,) = tmp_path.rglob("*.json")
    record = read_tax_record(path)
    assert {len(pair.latency.runs) for pair in record.pairs} == {3}
    assert {pair.latency.unit for pair in record.pairs} == {"process"}
    assert record.profiled is not None
    assert "fused" in shown
