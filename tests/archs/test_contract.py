"""What every family of archs/ keeps to, whoever wrote it: facts, names, sites, imports, expected totals."""

import ast
import importlib
import re
import runpy
import sys
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from selab.kernels.residual import ADD_RELU, FORMULAS, formula_of

ARCHS = files("selab.archs")
FAMILIES: dict[str, dict[str, Any]] = {
    entry.name.removesuffix(".toml"): tomllib.loads(entry.read_text(encoding="utf-8"))
    for entry in sorted(ARCHS.iterdir(), key=lambda entry: entry.name)
    if entry.name.endswith(".toml")
}
VARIANTS = [(family, name) for family, facts in FAMILIES.items() for name in facts["variants"]]
BASELINES = [(family, name) for family, name in VARIANTS if "se" not in FAMILIES[family]["variants"][name]]


def build(family: str, name: str) -> Any:
    """The network of a variant without its SE, on the meta device."""
    facts = FAMILIES[family]
    module, _, attribute = facts["builder"].partition(":")
    arguments = {"num_classes": facts["num_classes"], **facts["variants"][name].get("arguments", {})}
    with torch.device("meta"):
        return getattr(importlib.import_module(module), attribute)(**arguments)


FAMILY_KEYS = {"family", "source", "builder", "input_chw", "num_classes", "variants"}
VARIANT_KEYS = {"title", "baseline", "arguments", "note", "se", "published"}
SE_KEYS = {"sites", "placement", "reduction", "squeeze_from", "divisor", "squeeze", "gate", "bias"}
SE_MORE_KEYS = {"activation", "stages"}
PUBLISHED_KEYS = {"metric", "value", "printed", "dataset", "source", "where", "note"}
METRICS = {"top1_error_pct", "top5_error_pct", "loss", "params", "macs", "forward_s", "forward_backward_s"}


@pytest.mark.parametrize("family", FAMILIES)
def test_family_states_its_facts(family: str) -> None:
    facts = FAMILIES[family]
    assert set(facts) == FAMILY_KEYS
    assert facts["family"] == family
    assert facts["builder"].startswith(f"selab.archs.{family}:")
    assert ARCHS.joinpath(f"{family}.py").is_file()


def test_no_two_variants_share_a_name() -> None:
    names = [name for _, name in VARIANTS]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("family", "name"), VARIANTS)
def test_variant_states_its_facts(family: str, name: str) -> None:
    facts = FAMILIES[family]["variants"]
    variant = facts[name]
    assert set(variant) <= VARIANT_KEYS
    assert variant["title"]
    if "se" in variant:
        # A variant with SE is named se_<baseline>…, or has SE of its own and its baseline is <name>_no_se.
        assert name.startswith("se_") or variant["baseline"] == f"{name}_no_se"
        assert SE_KEYS <= set(variant["se"]) <= SE_KEYS | SE_MORE_KEYS
        baseline = facts[variant["baseline"]]
        assert variant.get("arguments") == baseline.get("arguments")
        assert "se" not in baseline
    else:
        assert not name.startswith("se_")
        assert "baseline" not in variant


@pytest.mark.parametrize(("family", "name"), VARIANTS)
def test_published_number_says_where_it_is_from(family: str, name: str) -> None:
    published = FAMILIES[family]["variants"][name].get("published", [])
    places = [(entry["metric"], entry["source"], entry["where"]) for entry in published]
    assert len(places) == len(set(places))
    for entry in published:
        assert set(entry) <= PUBLISHED_KEYS
        assert entry["metric"] in METRICS
        assert entry["source"]
        assert entry["where"]
        assert entry["value"] > 0
        if entry["metric"].endswith("_error_pct"):
            assert entry["dataset"]
            assert entry["value"] < 100
        elif entry["metric"] == "loss":
            assert entry["dataset"]
        elif entry["metric"] in ("params", "macs"):
            assert isinstance(entry["value"], int)
            found = re.fullmatch(
                r"([\d.,]+)([TGBMk]?)(?: ?(?:FLOPs|[GM]FLOPs|MAdds|MACs))?", entry["printed"].replace(" ", "")
            )
            assert found is not None
            factor = {"G": 1e9, "B": 1e9, "M": 1e6, "k": 1e3, "": 1.0}[found[2]]
            assert entry["value"] == round(float(found[1].replace(",", "")) * factor)
        else:
            assert "batch" in entry["note"] or "images" in entry["note"]


@pytest.mark.parametrize(("family", "name"), VARIANTS)
def test_variant_builds_and_gives_logits(family: str, name: str) -> None:
    facts = FAMILIES[family]
    network = build(family, name)
    network.eval()
    logits = network(torch.empty(2, *facts["input_chw"], device="meta"))
    assert logits.shape == (2, facts["num_classes"])


@pytest.mark.parametrize(("family", "name"), BASELINES)
def test_sites_keep_their_contract(family: str, name: str) -> None:
    network = build(family, name)
    for group, paths in network.site_groups().items():
        assert paths, group
        assert len(set(paths)) == len(paths)
        for path in paths:
            site = network.get_submodule(path)
            if group == "residual":
                assert isinstance(site.branch, nn.Sequential)
                assert not any(child.isdigit() for child, _ in site.branch.named_children())
                assert not list(site.join.parameters())
                assert not list(site.join.buffers())


@pytest.mark.parametrize(("family", "name"), BASELINES)
def test_no_module_stands_in_two_places(family: str, name: str) -> None:
    network = build(family, name)
    assert len(list(network.named_modules())) == len(list(network.named_modules(remove_duplicate=False)))


@pytest.mark.parametrize("entry", sorted(f"{family}.py" for family in [*FAMILIES, "__init__", "layers"]))
def test_archs_import_torch_and_their_siblings_only(entry: str) -> None:
    tree = ast.parse(ARCHS.joinpath(entry).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                # Relative, so that the folder works under any name: `archs` in a checkout, `selab.archs` installed.
                assert node.level == 1
                assert ARCHS.joinpath(f"{node.module}.py").is_file()
                continue
            names = [node.module or ""]
        for name in names:
            top = name.partition(".")[0]
            assert top == "torch" or top in sys.stdlib_module_names


def test_every_module_has_its_toml() -> None:
    modules = {entry.name.removesuffix(".py") for entry in ARCHS.iterdir() if entry.name.endswith(".py")}
    assert modules - {"__init__", "layers"} == set(FAMILIES)


def test_the_joins_are_those_that_kernels_fuse() -> None:
    layers = importlib.import_module("selab.archs.layers")
    assert {layers.Add.formula, layers.AddReLU.formula} == set(FORMULAS)
    assert formula_of(layers.Add()) == "branch + shortcut"
    assert formula_of(layers.AddReLU()) == ADD_RELU


def test_no_family_repeats_a_layer_of_another() -> None:
    """Two classes or functions of the same code, docstrings apart, belong into `archs/layers.py`."""
    places: dict[str, str] = {}
    for name in sorted([*FAMILIES, "layers"]):
        for node in ast.parse(ARCHS.joinpath(f"{name}.py").read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                for inner in ast.walk(node):
                    if isinstance(inner, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(inner) is not None:
                        del inner.body[0]
                here = f"{name}.{node.name}"
                assert places.setdefault(ast.dump(node), here) == here


def test_every_variant_has_expected_totals() -> None:
    """Parameters and MACs of each variant stand in the tests of its family, from a source or by arithmetic."""
    expected: set[str] = set()
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        if path.name != Path(__file__).name:
            expected |= set(runpy.run_path(str(path)).get("TOTALS", ()))
    assert expected == {name for _, name in VARIANTS}
