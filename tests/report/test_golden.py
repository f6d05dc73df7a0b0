"""The committed half that no machine changes: costs in profiles/, and the tables in docs/."""

import re
from pathlib import Path

import msgspec
import pytest
import torch
from catalog_networks import built, cost

from selab.bench.runner import DTYPES
from selab.cost.count import count
from selab.experiments import profiling
from selab.experiments.compare import read_compared
from selab.experiments.equal_time import EqualTime, times_words
from selab.experiments.tax_record import read_tax_records
from selab.judging.folding import FOLDINGS
from selab.judging.record import read_gates
from selab.models import catalog, composed, provenance
from selab.models.catalog import installed
from selab.records import store
from selab.records.types import from_json
from selab.report import pages
from selab.report.accuracy import name_of
from selab.training.record import read_accuracy_records

SAME = ("params", "buffer_elements", "macs", "macs_backward", "flops", "flops_backward", "bytes", "activations", "se")


def committed(root):
    return sorted((root / "profiles").rglob("*.json"))


def test_there_are_profiles(root):
    names = [path.name for path in committed(root)]
    assert any(name.startswith("se_mobilenet.") for name in names)


@pytest.mark.xdist_group("catalog")
def test_costs_are_those_of_today_s_counter(root):
    fresh = {}
    for path in committed(root):
        if path.parent.name in ("acceptance", "accuracy", "equal-time", "tax", "folding", "gates"):
            continue
        record = from_json(path.read_bytes(), where=path.name)
        work = record.workload
        for name, stored in ((record.arch, record.cost), (record.baseline, record.baseline_cost)):
            # Networks that torchvision builds are counted in tests/interop.
            if stored is None or composed.is_one(catalog.find(name)):
                continue
            key = (name, work.batch, work.input_chw, work.dtype)
            if key not in fresh:
                # What is quantised is counted before.
                dtype = DTYPES.get(work.dtype, torch.float32)
                fresh[key] = count(built(name).model, (work.batch, *work.input_chw), dtype=dtype)
            for field in SAME:
                assert getattr(stored, field) == getattr(fresh[key], field), f"{path.name}: {name}: {field}"


def test_records_are_complete_fresh_and_those_of_their_samples(root):
    for path in committed(root):
        if path.parent.parent.name == "profiles":
            record = store.read_record(path)
            assert record.complete, path.name
            assert not provenance.is_stale(record), path.name


def test_comparisons_are_complete_and_fresh(root):
    found = [one for folder in sorted((root / "profiles").iterdir()) for one in read_accuracy_records(folder)]
    assert {record.arch for record in found} >= {"se_small_cnn", "se_small_cnn+init=identity"}
    for record in found:
        assert record.complete
        assert "stale" not in name_of(record)


def test_times_of_baselines_as_slow_are_those_that_the_comparisons_name(root):
    for path in sorted((root / "profiles").glob("*/equal-time/*.json")):
        found = msgspec.json.decode(path.read_bytes(), type=EqualTime)
        assert found.machine == path.parents[1].name
        compared = [one for one in read_accuracy_records(path.parents[1]) if one.baseline in found.chosen]
        assert {one.baseline for one in compared} == set(found.chosen)
        for record in compared:
            assert (record.arch, record.facts_hash) == (found.arch, found.facts_hash)
            words = times_words(found, record.baseline)
            assert words in record.warnings
            # The width and the blocks take the same time within 2 %.
            ratio = next(one.latency.ratio for one in found.tried if one.network.name == record.baseline)
            assert ratio == pytest.approx(found.variant.ratio, rel=0.02)


def test_comparisons_of_implementations_are_fresh_and_those_of_their_quads(root):
    for folder in sorted((root / "profiles").iterdir()):
        for record in read_tax_records(folder):
            assert not provenance.is_stale(record), record.command


@pytest.mark.xdist_group("catalog")
def test_cost_tables_are_those_of_today_s_counter(root):
    """docs/tables holds every variant's cost in exact integers; `nox -s cost_tables` renders it."""
    rendered = pages.cost_pages({name: cost(name) for name in installed()})
    committed_pages = {path.name: path.read_text() for path in (root / "docs" / "tables").glob("*")}
    assert committed_pages == rendered


def test_the_accuracies_in_the_docs_are_rendered(root):
    text = (root / "docs" / "results.md").read_text()
    (folder,) = {one for one in re.findall(r"\(\.\./(profiles/[^)]+)\)", text) if (root / one / "accuracy").is_dir()}
    grids = pages.named_tables("accuracy", {}, pages.Found(compared=read_compared(root / folder)))
    assert pages.spliced(text, "accuracy", pages.page("accuracy", grids, ()), where="docs/results.md") == text


def test_the_taxes_in_the_docs_are_rendered(root):
    text = (root / "docs" / "se-tax-results.md").read_text()
    folder = root / re.search(r"\.\./(profiles/[^/)]+)", text)[1]
    grids = pages.named_tables("tax", {}, pages.Found(taxes=read_tax_records(folder)))
    assert pages.spliced(text, "tax", pages.page("tax", grids, ()), where="docs/se-tax-results.md") == text


def test_the_runtimes_in_the_docs_are_rendered(root):
    text = (root / "docs" / "runtimes.md").read_text()
    folder = root / re.search(r"\[Records\]\(\.\./(profiles/[^/)]+)", text)[1]
    records = store.read_records(folder)
    grids = pages.named_tables("runtimes", {}, pages.Found(profiles=records, taxes=read_tax_records(folder)))
    body = pages.page("runtimes", grids, records)
    assert pages.spliced(text, "runtimes", body, where="docs/runtimes.md") == text


def test_the_gates_in_the_docs_are_rendered(root):
    text = (root / "docs" / "gates.md").read_text()
    folder = root / re.search(r"\[Records\]\(\.\./(profiles/[^/)]+)", text)[1]
    found = pages.Found(foldings=FOLDINGS.read_folder(folder))
    body = pages.page("gates", pages.named_tables("gates", {}, found), [])
    assert pages.spliced(text, "gates", body, where="docs/gates.md") == text
    # What was recorded of gates can still be read.
    assert all(read_gates(path).blocks for path in (folder / "gates").glob("*.json"))


@pytest.mark.parametrize("name", ["added", "mobile", "paper-2"])
def test_tables_in_the_docs_are_rendered(root, committed_costs, name):
    text = (root / "docs" / "results.md").read_text()
    folder = re.search(r"\(\.\./(profiles/[^)]+)\)", text)[1]
    records = store.read_records(root / folder)
    costs = {one: committed_costs[one] for one in pages.costs_needed(name)}
    body = pages.page(name, pages.named_tables(name, costs, pages.Found(profiles=records)), records)
    assert pages.spliced(text, name, body, where="docs/results.md") == text


@pytest.mark.parametrize("folder", sorted(path.name for path in Path(__file__).parents[2].glob("profiles/*/")))
def test_pages_of_machines_are_rendered(root, selab, committed_costs, monkeypatch, tmp_path, folder):
    """`selab table report --profiles profiles/FOLDER --out profiles/FOLDER/README.md --replace` renders them."""
    monkeypatch.setattr(profiling, "counted", lambda names: {name: committed_costs[name] for name in names})
    status, _, error = selab("table", "report", "--profiles", root / "profiles" / folder, "--out", tmp_path / "page.md")
    assert status == 0, error
    assert (tmp_path / "page.md").read_text() == (root / "profiles" / folder / "README.md").read_text()
