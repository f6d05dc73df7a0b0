"""A table, and its formats: a terminal's, Markdown, CSV, LaTeX and JSON."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from selab.errors import UnknownNameError, nearest
from selab.report import latex, layout

TableFormat = Literal["rich", "markdown", "csv", "latex", "json"]
FORMATS: tuple[TableFormat, ...] = get_args(TableFormat)


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table: its first column names the rows, the others are numbers, aligned right; notes stand below it.

    Attributes:
        title: one line above the table.
        columns: headers, `""` for the names' column.
        rows: one cell for each column.
        notes: one sentence or more each.
        words: indices of columns that hold text, aligned left and wrapped between words.
        drop_first: indices of columns, the least important first. A terminal that is too narrow for all columns leaves
            them out in this order, then the others from the right; the first column always stays.
        label: of the LaTeX table, without `tab:`; by default made from the title.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    words: frozenset[int] = frozenset({0})
    drop_first: tuple[int, ...] = ()
    label: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Write the table for a terminal; see `selab.report.layout` for what a narrow one shows."""
        found = layout.fit(self, options.max_width)
        yield Text(self.title, style="bold")
        yield from layout.lines(found, bold_header=True)
        notes = list(self.notes)
        if found.left_out:
            notes.append(f"Left out at this width: {'; '.join(found.left_out)}. Use a wider terminal or --format csv.")
        for note in notes:
            yield from layout.paragraph(note, options.max_width)

    def markdown(self) -> str:
        """Return a Markdown table under a heading, its notes as paragraphs."""
        align = ["---" if index in self.words else "---:" for index in range(len(self.columns))]
        lines = [self.columns, align, *self.rows]
        cells = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
        notes = "".join(f"\n\n{note}" for note in self.notes)
        return f"### {self.title}\n\n" + "\n".join(cells) + notes + "\n"

    def csv(self, *, first: bool = True, titles: Sequence[str] = ()) -> str:
        """Return comma-separated values (RFC 4180), the table's title in front of each row, without the notes.

        Args:
            first: whether to write the header.
            titles: one for each row, instead of the table's own.
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        head = [("table", self.columns[0] or "name", *self.columns[1:])] if first else []
        named = zip(titles or [self.title] * len(self.rows), self.rows, strict=True)
        writer.writerows((*head, *((title, *row) for title, row in named)))
        return text.getvalue()

    def latex(self, *, label: str = "") -> str:
        """Return a LaTeX table float, its notes in a paragraph of their own below the rows.

        Args:
            label: instead of the table's own, without `tab:`.
        """
        return latex.table(
            self.title, self.columns, self.rows, self.notes, words=self.words, label=label or self.label or self.title
        )

    def as_builtins(self) -> dict[str, object]:
        """Return dictionaries and lists, for JSON."""
        return {"title": self.title, "columns": self.columns, "rows": self.rows, "notes": self.notes}


def _joined(tables: Sequence[Table]) -> Table:
    """Return all rows as one table with the columns of all, in the order in which they first occur."""
    columns: dict[tuple[str, int], None] = {}
    lines: list[tuple[str, dict[tuple[str, int], str]]] = []
    for one in tables:
        own = [(name, one.columns[1:index].count(name)) for index, name in enumerate(one.columns) if index]
        columns.update(dict.fromkeys(own))
        lines += [(row[0], dict(zip(own, row[1:], strict=True))) for row in one.rows]
    first = {one.columns[0] for one in tables if one.columns}
    return Table(
        title="",
        columns=(first.pop() if len(first) == 1 else "", *(name for name, _ in columns)),
        rows=tuple((name, *(cells.get(column, "") for column in columns)) for name, cells in lines),
    )


def render(tables: Sequence[Table], form: TableFormat | str, *, width: int | None = None) -> str:
    """Write tables as text in one of `FORMATS`.

    Args:
        tables: in their order; as CSV they become one, with an empty cell where a table lacks a column of another.
        form: `rich` is plain text for a terminal.
        width: characters to a line, for `rich`; by default the terminal's.

    Raises:
        UnknownNameError: no such format.
    """
    if form == "rich":
        console = Console(file=io.StringIO(), width=width, color_system=None, emoji=False, legacy_windows=False)
        for index, one in enumerate(tables):
            if index:
                console.print()
            console.print(one, highlight=False)
        return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]
    if form == "markdown":
        return "\n".join(one.markdown() for one in tables)
    if form == "csv":
        return _joined(tables).csv(titles=[one.title for one in tables for _ in one.rows])
    if form == "latex":
        labels = latex.unique_labels([one.label or one.title for one in tables])
        floats = (one.latex(label=label) for one, label in zip(tables, labels, strict=True))
        return latex.PREAMBLE_NOTE + "\n".join(floats)
    if form == "json":
        return json.dumps([one.as_builtins() for one in tables], indent=1, ensure_ascii=False) + "\n"
    raise UnknownNameError(f"--format {form}: no such format{nearest(form, FORMATS)}")
