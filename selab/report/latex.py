"""LaTeX tables with booktabs: escaped text, one float for each table."""

import re
from collections.abc import Sequence

PREAMBLE_NOTE = "% Needs \\usepackage{booktabs} in the preamble.\n"

# A column of text whose longest cell has more characters is set as a paragraph, or it would leave the page.
_LONGEST_LINE = 40

_ESCAPES = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    # LaTeX's default font has other glyphs in these three places.
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "`": r"\textasciigrave{}",
    "×": r"$\times$",
    "→": r"$\rightarrow$",
    "←": r"$\leftarrow$",
    "−": "$-$",
    "±": r"$\pm$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "≈": r"$\approx$",
    "·": r"$\cdot$",
    "µ": r"$\mu$",
    "–": "--",
    "—": "---",
    "…": r"\ldots{}",
    "\N{NO-BREAK SPACE}": "~",
    **{character: f"\\{character}" for character in "#$%&_{}"},
}


def escape(text: str) -> str:
    r"""Return text for LaTeX: special characters escaped, `code` between backquotes as `\texttt{code}`."""
    parts = re.split(r"`([^`]+)`", text)
    return "".join(rf"\texttt{{{_escaped(part)}}}" if index % 2 else _escaped(part) for index, part in enumerate(parts))


def _escaped(text: str) -> str:
    return re.sub(r"[^\w\s]|_|\N{NO-BREAK SPACE}|µ", lambda found: _ESCAPES.get(found[0], found[0]), text)


def label_of(text: str) -> str:
    """Return a label made from a title: lower case letters, digits and hyphens, `tab:` in front."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    return "tab:" + "-".join(words)[:60].rstrip("-")


def unique_labels(titles: Sequence[str]) -> list[str]:
    """Return one label for each title; of equal ones, the second gets `-2` at its end."""
    seen: dict[str, int] = {}
    labels = []
    for title in titles:
        label = label_of(title)
        seen[label] = seen.get(label, 0) + 1
        labels.append(label if seen[label] == 1 else f"{label}-{seen[label]}")
    return labels


def table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    notes: Sequence[str],
    *,
    words: frozenset[int],
    label: str,
) -> str:
    """Return a `table` float with caption, label, booktabs rules, and the notes in a box of their own below.

    Args:
        title: the caption.
        columns: headers.
        rows: cells of text.
        notes: set in a small font below the table, one paragraph each.
        words: indices of columns aligned left.
        label: a label, or a title to make one from.
    """
    align = "".join(_alignment(index, rows, words) for index in range(len(columns)))
    lines = [" & ".join(map(_cell, line)) + r" \\" for line in (columns, *rows)]
    body = "\n".join((r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"))
    below = ""
    if notes:
        paragraphs = "\n\n".join(map(escape, notes))
        below = (
            "\n\\par\\medskip\n\\begin{minipage}{\\linewidth}\n\\footnotesize\n"
            f"\\setlength{{\\parskip}}{{2pt}}\n{paragraphs}\n\\end{{minipage}}"
        )
    return (
        f"\\begin{{table}}\n\\centering\n\\caption{{{escape(title)}}}\n"
        f"\\label{{{label if label.startswith('tab:') else label_of(label)}}}\n"
        f"\\begin{{tabular}}{{{align}}}\n{body}\n\\end{{tabular}}{below}\n\\end{{table}}\n"
    )


def _cell(text: str) -> str:
    r"""Return a cell; a bracket or star at its beginning would be read as an argument of the `\\` before it."""
    return f"{{{text[0]}}}{escape(text[1:])}" if text[:1] in ("[", "*") else escape(text)


def _alignment(index: int, rows: Sequence[Sequence[str]], words: frozenset[int]) -> str:
    if index not in words:
        return "r"
    longest = max((len(row[index]) for row in rows), default=0)
    return "l" if longest <= _LONGEST_LINE else r"p{0.4\linewidth}"
