"""A table before it has a look, and its looks: a terminal's, Markdown's, CSV's, LaTeX's, JSON's."""

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

from rich import table as rich_table
from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

# A name in the first column, up to this long, is not broken over two lines, however narrow the terminal is.
_LONGEST_NAME = 24


def _width(lines: Sequence[Sequence[str]]) -> int:
    """Of a table as a terminal shows it: the widest line of each column, and two between them."""
    columns = zip(*lines, strict=True)
    return sum(max(len(line) for cell in column for line in cell.split("\n")) + 2 for column in columns)


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table: the first column is words, the others are numbers, aligned right; notes stand under it."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    words: frozenset[int] = frozenset({0})

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """As a terminal shows it. Too narrow a one gets headers and intervals on two lines, then folded words."""
        lines = [self.columns, *self.rows]
        if _width(lines) > options.max_width:
            lines = [tuple(head if i in self.words else head.replace(" ", "\n") for i, head in enumerate(self.columns))]
            lines += [
                tuple(cell if i in self.words else cell.replace(" [", "\n[") for i, cell in enumerate(row))
                for row in self.rows
            ]
        whole = _width(lines) <= options.max_width
        names = self._names(lines, options.max_width)
        table = rich_table.Table(header_style="bold", box=SIMPLE_HEAD)
        table.padding = (0, 1, 0, 0)
        for index, column in enumerate(lines[0]):
            words = index in self.words
            table.add_column(
                Text(column),
                justify="left" if words else "right",
                overflow="fold",
                no_wrap=index in names or (whole and not words),
            )
        # As it is: to rich a bare string is markup, and "[enforce fail at …]" would be gone.
        for row in lines[1:]:
            table.add_row(*map(Text, row))
        # Not the table's own title, which would be broken at the table's width.
        yield Text(self.title, style="bold")
        yield table
        yield from map(Text, self.notes)

    def _names(self, lines: Sequence[Sequence[str]], width: int) -> set[int]:
        """Columns that are not broken: short names in front, and single words while the rest keeps a third."""
        longest = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
        found = {0} if longest[0] <= _LONGEST_NAME else set()
        for index in sorted(self.words - {0}):
            single = not any(" " in line[index] for line in lines)
            if single and sum(longest[one] + 2 for one in (*found, index)) <= width * 2 / 3:
                found.add(index)
        return found

    def markdown(self) -> str:
        """As a Markdown table."""
        align = ["---" if index in self.words else "---:" for index in range(len(self.columns))]
        lines = [self.columns, align, *self.rows]
        cells = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
        notes = "".join(f"\n\n{note}" for note in self.notes)
        return f"### {self.title}\n\n" + "\n".join(cells) + notes + "\n"

    def csv(self, *, first: bool = True) -> str:
        """As comma-separated values (RFC 4180), the table's title in front of each row; its notes have no place in it.

        Args:
            first: whether the columns are named; tables of the same columns may stand below each other in one file.
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        head = [("table", self.columns[0] or "name", *self.columns[1:])] if first else []
        writer.writerows((*head, *((self.title, *row) for row in self.rows)))
        return text.getvalue()

    def latex(self) -> str:
        """As a LaTeX table (package booktabs), the notes below it."""
        align = "".join("l" if index in self.words else "r" for index in range(len(self.columns)))
        lines = [" & ".join(map(_latex, line)) + r" \\" for line in (self.columns, *self.rows)]
        notes = "".join(f"\n\n{_latex(note)}" for note in self.notes)
        body = "\n".join((lines[0], r"\midrule", *lines[1:]))
        return (
            f"\\begin{{table}}\n\\centering\n\\caption{{{_latex(self.title)}}}\n\\begin{{tabular}}{{{align}}}\n\\toprule\n"
            f"{body}\n\\bottomrule\n\\end{{tabular}}{notes}\n\\end{{table}}\n"
        )

    def as_builtins(self) -> dict[str, object]:
        """For `--json`."""
        return {"title": self.title, "columns": self.columns, "rows": self.rows, "notes": self.notes}


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "×": r"$\times$",
    "→": r"$\rightarrow$",
    "−": "$-$",
    "±": r"$\pm$",
    "µ": r"$\mu$",
    "–": "--",
    **{character: f"\\{character}" for character in "#$%&_{}"},
}


def _latex(text: str) -> str:
    return re.sub(r"[^\w\s]|_", lambda found: _LATEX.get(found[0], found[0]), text)
