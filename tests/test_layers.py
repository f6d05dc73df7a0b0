"""One rule holds the layout: a package imports only what stands below it."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "selab"
RANK = {
    "errors": 0,
    "units": 0,
    "_version": 0,
    "meta": 1,
    "records": 1,
    "kernels": 1,
    "attention": 2,
    "graphs": 2,
    "models": 3,
    "fusion": 3,
    "cost": 3,
    "deploy": 4,
    "judging": 4,
    "bench": 5,
    "training": 5,
    "experiments": 6,
    "report": 7,
    "api": 8,
    "cli": 9,
    "__init__": 10,
    "__main__": 10,
}
MODULES = sorted(path for path in ROOT.rglob("*.py"))


def place_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path):
    """(line, `package.module` below selab) of every import in a file, late ones and those for types too."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level and path.parent.name == "archs":
                continue  # siblings: the folder is `archs` in a checkout and `selab.archs` when installed
            assert node.level == 0, f"{path}: relative import in line {node.lineno}"
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "selab" else [node.module]
        yield from ((node.lineno, name.partition(".")[2]) for name in names if name.split(".")[0] == "selab")


def test_every_place_has_a_rank():
    assert {place_of(path) for path in MODULES} == RANK.keys()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_package_imports_only_what_stands_below_it(path):
    here = place_of(path)
    for line, name in imports(path):
        target = name.split(".")[0] or "__init__"
        assert target != "archs", f"line {line}: networks are named by their TOML, not by an import"
        assert target == here or RANK[target] < RANK[here], f"line {line}: {here} must not import {target}"


def test_no_circle_of_modules():
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in MODULES}
    graph = {}
    for path in MODULES:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found = {target for _, target in imports(path)} | {
            f"{node.module.partition('.')[2]}.{alias.name}"
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("selab.")
            for alias in node.names
        }
        packages = {target for target in found if any(other.startswith(f"{target}.") for other in names)}
        graph[name] = (found & names) - {name} - packages
    done = set()

    def visit(name, trail):
        assert name not in trail, " → ".join([*trail, name])
        if name not in done:
            for target in graph[name]:
                visit(target, [*trail, name])
            done.add(name)

    for name in graph:
        visit(name, [])


@pytest.mark.parametrize(
    "modules",
    [
        "selab, selab.errors, selab.units",
        "selab.records.types, selab.records.store, selab.records.verdict, selab.records.toml, selab.records.acceptance",
        "selab.models.spec, selab.models.catalog, selab.models.external, selab.models.key_maps",
        "selab.attention.config",
        "selab.training.recipe, selab.training.record, selab.training.verdict",
        "selab.cli, selab.cli.main",
    ],
)
def test_starts_without_torch(modules):
    code = f"import {modules}, sys; print([name for name in ('torch', 'matplotlib', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_archs_stand_alone():
    for path in sorted((ROOT.parent / "archs").glob("*.py")):
        assert not list(imports(path)), path.name


def test_sizes():
    """The top of selab/ fits a glance, and so does a file."""
    assert len([path for path in ROOT.iterdir() if path.name not in ("__pycache__", "py.typed")]) <= 22
    sources = [*MODULES, *(ROOT.parent / "archs").glob("*.py"), *(ROOT / "kernels").glob("*.[ch]")]
    long = {str(path.relative_to(ROOT.parent)): len(path.read_text().splitlines()) for path in sources}
    assert not {name: lines for name, lines in long.items() if lines > 600}


def test_functions_have_at_most_twelve_parameters():
    """Commands take shared options as one value. GPU kernels are exempt: there is no other way to pass arguments."""
    wide = []
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and "triton.jit" not in map(ast.unparse, node.decorator_list):
                every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                own = [one for one in every if one.arg not in ("self", "cls")]
                if len(own) > 12:
                    wide.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {len(own)}")
    assert not wide, wide


def test_commands_are_short():
    long = [
        f"{path.name}:{node.lineno} {node.name}"
        for path in sorted((ROOT / "cli").glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > 60
    ]
    assert not long, long


def test_every_package_is_in_the_distributions():
    listed = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {".".join(path.parent.relative_to(ROOT.parent).parts) for path in ROOT.rglob("__init__.py")}
    assert found | {"selab.archs"} <= set(listed)


def test_no_catch_all_module_and_no_shadowed_library():
    forbidden = {"utils", "helpers", "common", "core", "profile", "trace"}
    assert not {path.stem for path in MODULES} & forbidden
