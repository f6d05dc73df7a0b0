"""The formats of a table."""

import csv
import io
import json
import re
import shutil
import subprocess

import pytest
from rich.console import Console

from selab.errors import UnknownNameError
from selab.report import latex
from selab.report.table import FORMATS, Table, render
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
    assert lines[3] == r"\label{tab:cost-time-of-5}"
    assert r"se\_net & 1,234 & +0.2 \% \\" in lines
    assert r"a $\rightarrow$ b & 3$\times$3 & -- \\" in lines
    assert r"100 \% of \$1" in lines
    assert lines[4] == r"\begin{tabular}{lrr}"


def test_latex_sets_code_between_backquotes_in_a_typewriter_font():
    assert latex.escape("as `selab_x` says `") == r"as \texttt{selab\_x} says \textasciigrave{}"


def test_latex_brackets_in_front_of_a_row_are_no_argument():
    text = Table(title="t", columns=("[a", "b"), rows=(("[1, 2]", "*"),)).latex()
    assert r"{[}1, 2] & {*} \\" in text
    assert r"{[}a & b \\" in text


def test_latex_notes_stand_below_the_rows_and_labels_differ():
    text = render([TABLE, TABLE], "latex")
    assert re.findall(r"\\label\{(.*)\}", text) == ["tab:cost-time-of-5", "tab:cost-time-of-5-2"]
    one = text.split(r"\end{table}")[0]
    assert one.index(r"\end{tabular}") < one.index(r"\begin{minipage}") < one.index(r"100 \% of")
    assert text.startswith("% Needs")


def test_csv_is_one_table_with_the_columns_of_all():
    other = Table(title="Other", columns=("x", "y", "params", "y"), rows=(("1", "2", "3", "4"),))
    rows = list(csv.reader(render([TABLE, TABLE, other], "csv").splitlines()))
    assert [row[0] for row in rows].count("table") == 1
    assert rows[0] == ["table", "name", "params", "change", "y", "y"]
    assert rows[1:3] == rows[3:5] == [[TABLE.title, *row, "", ""] for row in TABLE.rows]
    assert rows[5] == ["Other", "1", "3", "", "2", "4"]
    assert list(csv.reader(render([TABLE], "csv").splitlines()))[1] == [TABLE.title, *TABLE.rows[0]]


def test_json_is_the_tables():
    (one,) = json.loads(render([TABLE], "json"))
    assert one == {
        "title": TABLE.title,
        "columns": list(TABLE.columns),
        "rows": [list(row) for row in TABLE.rows],
        "notes": list(TABLE.notes),
    }


def test_a_format_that_there_is_not_is_refused():
    with pytest.raises(UnknownNameError, match=r"--format latx: no such format.*latex"):
        render([TABLE], "latx")


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
        words=frozenset({0, 1, 3, 4}),
    )
    assert limit in shown(grid, 80)
    assert "se_mobilenet" in shown(grid, 40)


WIDE = Table(
    title="Wide",
    columns=("", "forward+backward", "95 % interval", "base", "variant"),
    rows=(("mobilenet_v3_large_no_se", "+21.7 % [19.3, 23.4]", "[1.0515, 1.2017]", "21.02 ms", "23.40 ms"),),
    drop_first=(3, 4),
)


def test_columns_are_left_out_in_their_order_and_said():
    assert "Left out" not in shown(WIDE, 100)
    narrow = " ".join(shown(WIDE, 64).split())
    assert "Left out at this width: base; variant. Use a wider terminal or --format csv." in narrow
    assert "23.40 ms" not in narrow
    for whole in ("forward+backward", "mobilenet_v3_large_no_se", "+21.7 %", "[19.3, 23.4]", "[1.0515, 1.2017]"):
        assert whole in shown(WIDE, 64)


def test_a_header_breaks_only_between_words():
    text = shown(WIDE, 78)
    assert "95 %" in text
    assert "forward+backward" in text


def test_a_long_name_stands_on_a_line_of_its_own():
    name = "timm:resnet50+sites=layer*.*.bn3,reduction=8,placement=identity"
    long = Table(title="t", columns=WIDE.columns, rows=((name, *WIDE.rows[0][1:]), WIDE.rows[0]))
    text = shown(long, 80)
    assert name in text.splitlines()
    assert "mobilenet_v3_large_no_se  " in text


def test_a_table_that_nothing_can_make_fit_still_names_its_rows():
    assert "mobilenet_v3_large_no_se" in shown(WIDE, 24)


# ------------------------------------------------------------------------------------------- every table that there is
def parts(cell, *, number):
    """What must stay on one line: words; of a number, the number with its unit, and its interval."""
    return re.split(r" (?=\[|±)", cell) if number else cell.split()


@pytest.mark.parametrize("width", [80, 100])
def test_nothing_breaks_inside_a_word_or_a_number(tables, width):
    assert len(tables) > 300
    for table in tables:
        text = render([table], "rich", width=width)
        lines = text.splitlines()
        assert max(map(len, lines)) <= width, table.title
        said = re.search(r"Left out at this width: (.*?)\. Use a wider", " ".join(text.split()))
        left_out = said[1].split("; ") if said else []
        kept = [index for index, head in enumerate(table.columns) if index == 0 or head not in left_out]
        assert len(kept) >= min(2, len(table.columns)), table.title
        for row in (table.columns, *table.rows):
            for index in kept:
                number = index not in table.words and row is not table.columns
                for part in parts(row[index], number=number):
                    assert any(part in line for line in lines), (table.title, part)
        for row in table.rows:
            if " " not in row[0]:
                assert any(line.startswith(row[0]) for line in lines), (table.title, row[0])


def bare(text):
    """LaTeX without commands, escapes and mathematics."""
    return re.sub(r"\\[a-zA-Z]+|\\[#$%&_{}\\]|\$\\[a-z]+\$|\$-\$", "", text)


def test_latex_of_every_table_is_balanced_and_escaped(tables):
    for table in tables:
        text = render([table], "latex").removeprefix(latex.PREAMBLE_NOTE)
        opened = []
        for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", text):
            if kind == "begin":
                opened.append(name)
            else:
                assert opened.pop() == name
        assert not opened
        body = text.split(r"\toprule")[1].split(r"\bottomrule")[0]
        rows = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert len(rows) == len(table.rows) + 1
        assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {len(table.columns) - 1}
        rest = bare(text)
        assert not set(rest) & set('#$%_^`|<>"'), (table.title, set(rest) & set('#$%_^`|<>"'))
        assert rest.count("{") == rest.count("}")
        assert rest.isascii(), sorted({one for one in rest if not one.isascii()})


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_latex_of_every_table_compiles(tables, tmp_path):
    # TeX keeps only so many floats without a page; the tables are what is tested.
    body = render(tables, "latex").replace("\\end{table}\n", "\\end{table}\n\\clearpage\n")
    (tmp_path / "t.tex").write_text(
        "\\documentclass{article}\n\\usepackage{booktabs}\n\\begin{document}\n" + body + "\\end{document}\n"
    )
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace", check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "t.pdf").exists()


def test_every_format_writes_every_table(tables):
    for form in FORMATS:
        text = render(tables[:20], form)
        assert text.endswith("\n")
        assert "se_resnet50" in text or form == "latex"
