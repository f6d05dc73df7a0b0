"""The looks of a table."""

import csv
import io

from rich.console import Console

from selab.report.table import Table
from selab.units import NONE

TABLE = Table(
    title="Cost & time_of 5 %",
    columns=("", "params", "change"),
    rows=(("se_net", "1,234", "+0.2 %"), ("a → b", "3×3", NONE)),
    notes=("100 % of $1",),
)


def test_csv_is_read_back():
    rows = [[TABLE.title, *row] for row in TABLE.rows]
    assert list(csv.reader(TABLE.csv().splitlines())) == [["table", "name", "params", "change"], *rows]
    assert list(csv.reader(TABLE.csv(first=False).splitlines())) == rows


def test_latex_escapes_what_it_must():
    lines = TABLE.latex().splitlines()
    assert lines[2] == r"\caption{Cost \& time\_of 5 \%}"
    assert r"se\_net & 1,234 & +0.2 \% \\" in lines
    assert r"a $\rightarrow$ b & 3$\times$3 & -- \\" in lines
    assert r"100 \% of \$1" in lines
    assert lines[3] == r"\begin{tabular}{lrr}"


def test_markdown_aligns_numbers_right():
    assert TABLE.markdown().splitlines()[3] == "| --- | ---: | ---: |"


def shown(grid, width):
    console = Console(file=io.StringIO(), width=width)
    console.print(grid)
    return console.file.getvalue()


def test_brackets_are_text_wherever_they_stand():
    words = "[enforce fail at alloc.cpp:1] x"
    grid = Table(title=words, columns=("", words), rows=((words, words),), notes=(words,))
    assert shown(grid, 200).count(words) == 5


def test_names_are_not_broken_while_there_is_room():
    limit = "latency_ratio_forward_backward"
    grid = Table(
        title="Budgets",
        columns=("budget", "limit", "at most", "found", ""),
        rows=(("se_mobilenet", limit, "1.2", "the baseline against itself shows up to 10.7 %, more than 5 %", "over"),),
        words=frozenset({0, 1, 4}),
    )
    assert limit in shown(grid, 80)
    assert "se_mobilenet" in shown(grid, 40)
