"""Imports go down the floors, never up, and never in a circle."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "selab"

FLOORS = [
    {"errors", "units", "stats"},
    {
        "spec",
        "record",
        "foreign",
        "keys",
        "catalog",
        "verdict",
        "store",
        "grid",
        "recipe",
        "recipes",
        "accuracy_record",
        "accuracy_verdict",
        "tax_record",
        "download",
        "facts",
        "devices",
    },
    {
        "kernels",
        "attention",
        "se",
        "sites",
        "probe",
        "ends",
        "insert",
        "fusing",
        "joins",
        "reading",
        "waiting",
        "brought",
        "build",
        "weights",
        "styles",
    },
    {"measure", "accuracy"},
    {
        "request",
        "workers",
        "profiling",
        "published",
        "tables",
        "tree",
        "plots",
        "ink",
        "comparing",
        "accuracy_tables",
        "pages",
        "differing",
        "budget",
        "advice",
        "tracing",
        "roofs",
        "taxing",
        "tax_tables",
        "sweep",
        "cluster",
    },
    {"cli", "training_commands", "console", "options"},
]
TORCH_FREE = FLOORS[5] | FLOORS[0] | FLOORS[1]


def floor_of(name):
    return next(index for index, floor in enumerate(FLOORS) if name in floor)


def imports(path):
    """(module, whether it is imported when the file itself is) for each import in a file."""
    tree = ast.parse(path.read_text())
    later = [outer for outer in ast.walk(tree) if isinstance(outer, ast.FunctionDef) or _is_for_types(outer)]
    inside = {id(node) for outer in later for node in ast.walk(outer)}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" if node.module == "selab" else node.module for alias in node.names]
        for name in names:
            yield name, id(node) not in inside


def _is_for_types(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def modules():
    return sorted(path for path in ROOT.rglob("*.py") if path.name != "__init__.py")


def name_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_import_goes_up(path):
    here = floor_of(name_of(path))
    for module, _ in imports(path):
        if module.startswith("selab."):
            target = module.split(".")[1]
            assert target != "archs", "networks are named by their TOML, not by an import"
            if target != "__version__":
                assert floor_of(target) <= here, f"{path.name} on floor {here} imports {module}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_torch_stays_above_floor_one(path):
    if name_of(path) in TORCH_FREE:
        assert not [name for name, at_once in imports(path) if at_once and name.split(".")[0] == "torch"]


def test_no_circles():
    graph = {}
    for path in modules():
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        graph[name] = {m.removeprefix("selab.") for m, _ in imports(path) if m.startswith("selab.")}
    done = set()

    def visit(name, trail):
        assert name not in trail, " → ".join([*trail, name])
        if name in graph and name not in done:
            for target in graph[name]:
                visit(target, [*trail, name])
            done.add(name)

    for name in graph:
        visit(name, [])


def test_no_catch_all_rooms_and_no_shadowed_library():
    forbidden = {"utils", "helpers", "common", "core", "profile", "trace"}
    assert not {path.stem for path in modules()} & forbidden
