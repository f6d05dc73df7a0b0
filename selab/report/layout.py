"""How a terminal shows a table: which columns fit, and where their cells wrap.

Nothing breaks inside a word or a number. A table that is too wide first wraps headers at spaces and puts intervals on a
second line, then gives long names lines of their own, then leaves columns out, the least important ones first.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from rich.cells import cell_len
from rich.text import Text

_GAP = 2
# A name up to this long keeps its column; a longer one may get a line of its own above its row.
_LONGEST_NAME = 28
# Text in a narrower column takes too many lines; other columns are left out instead.
_LEAST_TEXT = 22


class TableLike(Protocol):
    """What is laid out."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Headers."""

    @property
    def rows(self) -> tuple[tuple[str, ...], ...]:
        """Cells, one for each column."""

    @property
    def words(self) -> frozenset[int]:
        """Indices of columns that hold text."""

    @property
    def drop_first(self) -> tuple[int, ...]:
        """Indices of columns, the least important first."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A table as a terminal shows it.

    Attributes:
        widths: characters of each column shown.
        right: whether a column is aligned right.
        header: lines of each header.
        rows: lines of each cell.
        names: a name that stands on a line of its own above its row, or "".
        left_out: headers of the columns that do not fit.
    """

    widths: tuple[int, ...]
    right: tuple[bool, ...]
    header: tuple[tuple[str, ...], ...]
    rows: tuple[tuple[tuple[str, ...], ...], ...]
    names: tuple[str, ...]
    left_out: tuple[str, ...]


def fit(table: TableLike, width: int) -> Layout:
    """Return the layout with the most columns that fits a width; below two columns it may be wider."""
    shown = list(range(len(table.columns)))
    order = _dropped_in_order(table)
    names_apart = False
    while (widths := _widths(table, shown, width, names_apart=names_apart)) is None:
        if not names_apart and _has_long_names(table):
            names_apart = True
        elif order:
            shown.remove(order.pop(0))
        else:
            widths = [max(_least(table, index, names_apart=names_apart), 1) for index in shown]
            break
    left_out = tuple(table.columns[index] for index in range(len(table.columns)) if index not in shown)
    return _laid_out(table, shown, widths, names_apart=names_apart, left_out=left_out)


def lines(found: Layout, *, bold_header: bool = False) -> Iterator[Text]:
    """Yield the lines of a table: headers, a rule, rows."""
    if any(any(cell) for cell in found.header):
        for line in _row_lines(found, found.header, bottom=True):
            yield Text(line, style="bold" if bold_header else "", overflow="fold")
    yield Text("─" * (sum(found.widths) + _GAP * (len(found.widths) - 1)), overflow="fold")
    for name, row in zip(found.names, found.rows, strict=True):
        if name:
            yield Text(name, overflow="fold")
        for line in _row_lines(found, row):
            yield Text(line, overflow="fold")


def paragraph(text: str, width: int) -> Iterator[Text]:
    """Yield the lines of a note, wrapped between words; a number keeps its unit."""
    for line in _wrapped(text, width, number=False):
        yield Text(line, overflow="fold")


def _row_lines(found: Layout, cells: Sequence[Sequence[str]], *, bottom: bool = False) -> Iterator[str]:
    """Yield the lines of one row; headers stand at the bottom of theirs."""
    height = max(map(len, cells))
    columns = []
    for cell, width, right in zip(cells, found.widths, found.right, strict=True):
        empty = [""] * (height - len(cell))
        padded = [*empty, *cell] if bottom else [*cell, *empty]
        columns.append([" " * (width - cell_len(line)) + line if right else _padded(line, width) for line in padded])
    for parts in zip(*columns, strict=True):
        yield (" " * _GAP).join(parts).rstrip()


def _padded(line: str, width: int) -> str:
    return line + " " * (width - cell_len(line))


def _dropped_in_order(table: TableLike) -> list[int]:
    """Return which columns are left out, in order; two always stay: the names and the most important other one."""
    rest = [index for index in range(len(table.columns) - 1, 0, -1) if index not in table.drop_first]
    return [*table.drop_first, *rest][:-1]


def _has_long_names(table: TableLike) -> bool:
    return any(cell_len(row[0]) > _LONGEST_NAME for row in table.rows) and len(table.columns) > 2


def _unbreakable(text: str, *, number: bool) -> list[str]:
    """Return the parts of a cell that stay on one line: words, or a number with its unit, or its interval."""
    if number:
        return re.split(r" (?=\[|±)", text)
    # A number and its unit stay together, and so does an interval.
    kept = re.sub(r"(?<=\d) (?=(?:%|[µmkMGT]?(?:s|B|Hz)\b|[kMGT]\b))|(?<=,) (?=[\d.−-]+\])", "\N{NO-BREAK SPACE}", text)
    return [part.replace("\N{NO-BREAK SPACE}", " ") for part in kept.split(" ")]


def _cells(table: TableLike, index: int, *, names_apart: bool) -> list[str]:
    cells = [row[index] for row in table.rows]
    if index == 0 and names_apart:
        return [cell for cell in cells if cell_len(cell) <= _LONGEST_NAME]
    return cells


def _header_parts(header: str) -> list[str]:
    return _unbreakable(header.replace("95 % interval", "95\N{NO-BREAK SPACE}% interval"), number=False)


def _longest(parts: Sequence[str]) -> int:
    return max((cell_len(part) for part in parts), default=0)


def _natural(table: TableLike, index: int, *, names_apart: bool) -> int:
    """Return the width of a column whose cells are not wrapped."""
    return _longest([table.columns[index], *_cells(table, index, names_apart=names_apart)])


def _least(table: TableLike, index: int, *, names_apart: bool) -> int:
    """Return the least width in which a column can be read."""
    number = index not in table.words
    cells = _cells(table, index, names_apart=names_apart)
    least = _longest(
        [*_header_parts(table.columns[index]), *(part for cell in cells for part in _unbreakable(cell, number=number))]
    )
    return least if number else max(least, min(_LEAST_TEXT, _longest(cells)))


def _widths(table: TableLike, shown: Sequence[int], width: int, *, names_apart: bool) -> list[int] | None:
    """Return a width for each column shown, or None where they do not fit."""
    room = width - _GAP * (len(shown) - 1)
    natural = [_natural(table, index, names_apart=names_apart) for index in shown]
    if sum(natural) <= room:
        return natural
    widths = [_least(table, index, names_apart=names_apart) for index in shown]
    if sum(widths) > room:
        return None
    # What is left goes to cells, of text first, to each column an equal share; headers come last.
    cells = [
        max(least, _longest(_cells(table, index, names_apart=names_apart)))
        for index, least in zip(shown, widths, strict=True)
    ]
    order = sorted(range(len(shown)), key=lambda place: (shown[place] not in table.words, cells[place]))
    left = room - sum(widths)
    for wanted, shares in ((cells, True), (cells, False), (natural, False)):
        for count, place in zip(range(len(order), 0, -1), order, strict=True):
            more = min(max(0, wanted[place] - widths[place]), left // count if shares else left)
            widths[place] += more
            left -= more
    return widths


def _wrapped(text: str, width: int, *, number: bool, header: bool = False) -> tuple[str, ...]:
    """Return the lines of a cell, wrapped between its unbreakable parts."""
    if cell_len(text) <= width and "\n" not in text:
        return (text,)
    found: list[str] = []
    for paragraph in text.split("\n"):
        parts = _header_parts(paragraph) if header else _unbreakable(paragraph, number=number)
        line = parts[0]
        for part in parts[1:]:
            if cell_len(line) + 1 + cell_len(part) <= width:
                line += f" {part}"
            else:
                found.append(line)
                line = part
        found.append(line)
    return tuple(found)


def _laid_out(
    table: TableLike, shown: Sequence[int], widths: Sequence[int], *, names_apart: bool, left_out: tuple[str, ...]
) -> Layout:
    names = []
    rows = []
    for row in table.rows:
        apart = names_apart and cell_len(row[0]) > _LONGEST_NAME
        names.append(row[0] if apart else "")
        rows.append(
            tuple(
                _wrapped("" if apart and index == 0 else row[index], width, number=index not in table.words)
                for index, width in zip(shown, widths, strict=True)
            )
        )
    return Layout(
        widths=tuple(widths),
        right=tuple(index not in table.words for index in shown),
        header=tuple(
            _wrapped(table.columns[index], width, number=False, header=True)
            for index, width in zip(shown, widths, strict=True)
        ),
        rows=tuple(rows),
        names=tuple(names),
        left_out=left_out,
    )
