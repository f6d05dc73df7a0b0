"""The notebook runs from top to bottom, is committed without outputs, and shows results."""

import ast
import contextlib
import io
import json
from pathlib import Path

NOTEBOOK = json.loads((Path(__file__).parent.parent / "docs" / "tutorial.ipynb").read_text())


def test_it_is_committed_without_outputs():
    for cell in NOTEBOOK["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


def test_it_runs():
    names = {}
    said = io.StringIO()
    shown = 0
    with contextlib.redirect_stdout(said):
        for cell in NOTEBOOK["cells"]:
            if cell["cell_type"] != "code":
                continue
            body = ast.parse("".join(cell["source"])).body
            # What a notebook shows below a cell is its last expression.
            last = body.pop() if isinstance(body[-1], ast.Expr) else None
            exec(compile(ast.Module(body, type_ignores=[]), cell["id"], "exec"), names)
            if last is not None:
                value = eval(compile(ast.Expression(last.value), cell["id"], "eval"), names)
                shown += "<table>" in getattr(value, "_repr_html_", str)()
    assert shown == 6
    assert "3 gates converted from sigmoid to hardsigmoid" in said.getvalue()
    assert "MACs +" in said.getvalue()
