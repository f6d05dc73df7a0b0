"""The looks of a table."""

import csv

from selab.grid import NONE, Grid

TABLE = Grid(
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
