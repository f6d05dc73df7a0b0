"""How results print: one line in a REPL, a table by rich, HTML in a notebook, plain values and data frames."""

from collections.abc import Iterator
from html import escape
from importlib import import_module
from typing import Any

import msgspec

from selab.errors import SelabError


class Displayed:
    """Mixin for results; a class says its `summary`, `columns` and `rows`, and gets every form from them."""

    __slots__ = ()

    def summary(self) -> str:
        """Return one line."""
        raise NotImplementedError

    def columns(self) -> tuple[str, ...]:
        """Return the names of the columns of `rows`."""
        raise NotImplementedError

    def rows(self) -> list[tuple[object, ...]]:
        """Return the table's rows, numbers in base units."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Return the table as plain values, column by column."""
        values = list(zip(*self.rows(), strict=True)) or [()] * len(self.columns())
        return {name: msgspec.to_builtins(list(column)) for name, column in zip(self.columns(), values, strict=True)}

    def to_dataframe(self) -> Any:
        """Return the table as a pandas.DataFrame.

        Raises:
            SelabError: pandas is not installed.
        """
        return _pandas().DataFrame(self.rows(), columns=list(self.columns()))

    def __repr__(self) -> str:
        return self.summary()

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.table import Table
        from rich.text import Text

        headers = [column.replace("_", " ") for column in self.columns()]
        rows = [[shown(cell) for cell in row] for row in self.rows()]
        kept, left_out = _fitting(headers, rows, options.max_width)
        table = Table()
        for index in kept:
            table.add_column(Text(headers[index]), justify="left" if index == 0 else "right")
        for row in rows:
            table.add_row(*(Text(row[index]) for index in kept))
        yield Text(self.summary())
        yield table
        if left_out:
            yield Text(f"Columns left out at this width: {', '.join(left_out)}.")

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{escape(column)}</th>" for column in self.columns())
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(shown(cell))}</td>" for cell in row) + "</tr>" for row in self.rows()
        )
        return f"<p>{escape(self.summary())}</p><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _fitting(headers: list[str], rows: list[list[str]], width: int) -> tuple[list[int], list[str]]:
    """Return the columns that fit a width without a break inside a word, and the names of the others, last ones first.

    A column is at least as wide as its longest word; a border takes three characters.
    """
    least = [
        max(len(word) for text in (header, *cells) for word in text.split(" "))
        for header, *cells in zip(headers, *rows, strict=True)
    ]
    kept = list(range(len(headers)))
    while len(kept) > 1 and sum(least[index] + 3 for index in kept) + 1 > width:
        kept.pop()
    return kept, [headers[index] for index in range(len(headers)) if index not in kept]


class DisplayedValues(Displayed):
    """Mixin for a result that is one set of values; a class says its `summary` and `values`."""

    __slots__ = ()

    def values(self) -> dict[str, Any]:
        """Return quantity → value, in base units."""
        raise NotImplementedError

    def columns(self) -> tuple[str, ...]:
        """Return the names of the columns of `rows`."""
        return "quantity", "value"

    def rows(self) -> list[tuple[object, ...]]:
        """Return one row for each quantity."""
        return list(self.values().items())

    def to_dict(self) -> dict[str, Any]:
        """Return quantity → value."""
        return self.values()

    def to_dataframe(self) -> Any:
        """Return one row as a pandas.DataFrame, with a column for each quantity.

        Raises:
            SelabError: pandas is not installed.
        """
        return _pandas().DataFrame([self.values()])


def _pandas() -> Any:
    try:
        return import_module("pandas")
    except ImportError:
        raise SelabError("to_dataframe needs pandas; pip install pandas, or use to_dict()") from None


def shown(value: object) -> str:
    """Return a cell's text: exact integers, six significant digits, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
