"""The runs that say how often the command is wrong: which there are, what goes on, and what is concluded."""

import json
import subprocess
import sys
from pathlib import Path

import error_rates
import pytest

SCRIPT = Path(error_rates.__file__)


def line(run, *figures):
    return {"run": run, "figures": {f"forward {number}": list(one) for number, one in enumerate(figures, start=1)}}


def test_a_part_of_the_runs_is_of_all_networks():
    first = [run.name for run in error_rates.runs([error_rates.SAME, error_rates.DEFAULT], None)][:5]
    assert first == [
        *(f"same {arch} 0" for arch in ("small_cnn", "mobilenet", "resnet18")),
        *(f"default {arch} 0" for arch in ("se_mobilenet", "se_small_cnn")),
    ]
    assert len(list(error_rates.runs([error_rates.SAME], None))) >= 100
    assert len(list(error_rates.runs([error_rates.DEFAULT], None))) >= 20


def test_false_verdicts_and_missed_differences_are_counted():
    same = [
        line("same mobilenet 0", (1.0, 0.99, 1.01, 0.01, "undecided", 4), (1.05, 1.04, 1.06, 0.01, "slower", 4)),
        line("same mobilenet 1", (1.0, 0.99, 1.01, 0.01, "equal", 4), (1.0, 0.9, 1.1, 0.1, "no_result", 4)),
    ]
    missed = [line("planted mobilenet 0", (1.02, 0.99, 1.04, 0.01, "undecided", 4))]
    rows = error_rates.table([*same, *missed]).splitlines()[2:]
    assert rows == [
        "| same: mobilenet | 2 | 4 | 1 | 1 of 3 verdicts are false (33.3 %) | ±1.00 % |",
        "| planted: mobilenet | 1 | 1 | 0 | 1 not found (100.0 %) | ±2.46 % |",
    ]


def test_an_interval_should_hold_the_mean_of_all():
    lines = [
        line(f"default se_mobilenet {number}", (ratio, ratio - 0.02, ratio + 0.02, 0.01, "slower", 8))
        for number, ratio in enumerate((1.10, 1.11, 1.09, 1.15))
    ]
    (row,) = error_rates.table(lines).splitlines()[2:]
    assert "| 4 | 4 | 0 | 2 do not hold the grand mean (50.0 %) |" in row


def test_the_page_shows_what_the_journal_says(root):
    lines = error_rates.lines_of(root / "profiles" / "amd-epyc-2c" / "acceptance" / "error_rates.jsonl")
    page = (root / "docs" / "measuring.md").read_text(encoding="utf-8")
    assert error_rates.table(lines) in page
    same = [one[4] for line in lines if line["run"].startswith("same") for one in line["figures"].values()]
    false = sum(verdict in ("slower", "faster") for verdict in same)
    said = sum(verdict != "no_result" for verdict in same)
    assert f"{false} of {said} are ({100 * false / said:.1f} %)" in " ".join(page.split())


@pytest.mark.slow
def test_what_is_in_the_journal_is_not_run_again(tmp_path):
    journal = tmp_path / "rates.jsonl"
    words = [sys.executable, SCRIPT, "--journal", journal, "--dry-run", "--runs", "1", "--kind", "planted"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (whole,) = map(json.loads, journal.read_text().splitlines())
    assert whole["run"] == "planted mobilenet 0"
    ratio, low, high, _, _, processes = whole["figures"]["forward 1"]
    assert low <= ratio <= high
    assert processes == 3
    journal.write_text(journal.read_text() + '{"run": "cut o')
    again = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "planted: mobilenet | 1 | 1 |" in again.stdout
    assert " s  " not in again.stdout
