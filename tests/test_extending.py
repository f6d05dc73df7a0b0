"""The examples of docs/extending.md run, and so do the templates of `selab new`."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from selab.attention import config, registry
from selab.attention.insert import insert_se
from selab.cli.main import app
from selab.cost import RULES
from selab.cost import rules as cost_rules
from selab.cost.count import count
from selab.errors import SelabError, SpecError, UnknownNameError
from selab.models import catalog
from selab.models.build import build

PAGE = Path(__file__).parent.parent / "docs" / "extending.md"
FENCE = re.compile(r"^```(\w+)(?: title=\"([\w.]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_CLASSES", dict(registry._CLASSES))
    blocks, rules, modules, path = dict(config.BLOCKS), dict(RULES), set(sys.modules), list(sys.path)
    yield tmp_path
    for table, known in ((config.BLOCKS, blocks), (RULES, rules)):
        table.clear()
        table.update(known)
    cost_rules.FOUND.clear()
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def selab(line):
    result = CliRunner().invoke(app, shlex.split(line)[1:], catch_exceptions=False)
    assert result.exit_code == 0, f"{line}: {result.output}"
    return result.output


def test_the_page_runs(folder):
    sys.path.insert(0, str(folder))
    names, ran = {}, []
    for language, title, text in FENCE.findall(PAGE.read_text()):
        if title:
            (folder / title).write_text(text)
        elif language == "bash":
            for line in text.splitlines():
                selab(line)
                ran.append(line)
        elif language == "python":
            exec(compile(text, str(PAGE), "exec"), names)
            ran.append("python")
    assert ran.count("python") == 3
    assert {line.split()[1] for line in ran if line != "python"} == {"new", "count", "show"}


def test_the_family_of_the_template_has_every_placement(folder):
    assert "next: selab count --arch mynet.toml:se_mynet" in selab("selab new family mynet").splitlines()
    text = (folder / "mynet.toml").read_text()
    for placement in ("standard", "pre", "post", "identity"):
        (folder / "mynet.toml").write_text(text.replace('# placement = "standard"', f'placement = "{placement}"'))
        built = build(catalog.find("mynet.toml:se_mynet"), device="meta")
        assert [one.placement for one in built.insertions] == [placement] * 3
    assert catalog.baseline_of(catalog.find("mynet.toml:se_mynet")).name == "mynet"


def test_the_block_of_the_template_counts_itself_right(folder):
    selab("selab new block my_gate --out blocks")
    for init in ("he", "identity"):
        net = nn.Sequential(nn.Conv2d(3, 8, 3))
        keys = {"block": "blocks/my_gate.py:MyGate", "slope": 2.0, "init": init}
        (inserted,) = insert_se(net, "0", input_nchw=(1, 3, 10, 10), **keys)
        se = count(net, (1, 3, 10, 10)).se
        assert inserted.macs == se.squeeze.macs + se.excitation.macs + se.scale.macs
    block = next(module for module in net.modules() if type(module).__name__ == "MyGate")
    y = torch.randn(2, 8, 4, 4)
    torch.testing.assert_close(block(y), y, rtol=0, atol=0)


def test_nothing_is_overwritten(folder):
    (folder / "mynet.py").write_text("mine")
    with pytest.raises(SelabError, match=r"mynet.py: exists; use --replace"):
        CliRunner().invoke(app, ["new", "family", "mynet"], catch_exceptions=False)
    assert not (folder / "mynet.toml").exists()
    assert (folder / "mynet.py").read_text() == "mine"
    selab("selab new family mynet --replace")
    assert "nn.Module" in (folder / "mynet.py").read_text()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        *((name, "a name begins with a letter") for name in ("My", "3net", "a-b")),
        *((name, "is a module or keyword that the template needs") for name in ("torch", "class")),
    ],
)
def test_a_name_that_cannot_be(folder, name, words):
    with pytest.raises(SpecError, match=words):
        CliRunner().invoke(app, ["new", "block", name], catch_exceptions=False)
    assert not list(folder.iterdir())


def test_a_name_that_is_missing(folder):
    done = CliRunner().invoke(app, ["new", "block", ""])
    assert (done.exit_code, list(folder.iterdir())) == (2, [])


def test_families_of_one_folder_and_of_two(folder):
    for place, width in (("one", 4), ("two", 6)):
        (folder / place).mkdir()
        for family in ("a", "b"):
            (folder / place / f"{family}.toml").write_text(
                f'family = "{family}"\nsource = "here"\nbuilder = "net_of_{family}:make"\ninput_chw = [3, 8, 8]\n'
                'num_classes = 4\n[variants.plain]\ntitle = "plain"\n'
            )
            (folder / place / f"net_of_{family}.py").write_text(
                f"from torch import nn\ndef make(num_classes): return nn.Conv2d(3, {width + (family == 'b')}, 3)\n"
            )
    widths = [
        build(catalog.find(f"{place}/{family}.toml:plain")).model.out_channels
        for place in ("one", "two")
        for family in ("a", "b")
    ]
    assert widths == [4, 5, 6, 7]
    with pytest.raises(UnknownNameError, match="no variant 'plan'; did you mean plain"):
        catalog.find("one/a.toml:plan")


@pytest.mark.parametrize(
    ("builder", "message"),
    [
        (
            "net:mak",
            r"mine.toml: builder: 'net:mak' cannot be imported: .*no such name in it; did you mean make",
        ),
        ("nett:make", r"mine.toml: builder: 'nett:make' cannot be imported: No module named 'nett'; it is looked up"),
        ("net:NUMBER", r"mine.toml: builder: 'net:NUMBER' is not callable"),
        ("net:none", r"mine.toml: builder: net:none does not return a torch.nn.Module"),
    ],
)
def test_a_toml_that_names_a_missing_builder(folder, builder, message):
    (folder / "net.py").write_text("NUMBER = 3\ndef make(num_classes): pass\ndef none(num_classes): pass\n")
    (folder / "mine.toml").write_text(
        f'family = "a"\nsource = "here"\nbuilder = "{builder}"\ninput_chw = [3, 8, 8]\nnum_classes = 4\n'
        '[variants.plain]\ntitle = "plain"\n'
    )
    with pytest.raises(SpecError, match=message) as caught:
        build(catalog.find("mine.toml"))
    assert "\n" not in str(caught.value)
