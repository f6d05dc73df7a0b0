"""Blocks from outside: registered, from a file, and from an installed package."""

import importlib.metadata
import json

import pytest
import torch
from torch import nn

from selab.attention import config as block_configs
from selab.attention import registry
from selab.attention.base import Attention
from selab.attention.config import BLOCKS, ExternalConfig, as_keys, block_config, changed
from selab.attention.insert import insert_se, remove_se
from selab.attention.registry import register_block
from selab.errors import InsertionError, SpecError
from selab.models import catalog
from selab.models.build import build
from selab.models.spec import as_builtins, parse_family

CHW = (1, 3, 8, 8)
BLOCK = """
import torch
from selab.attention import Attention

class Halve(Attention):
    def __init__(self, channels, *, factor: float = 0.5, groups: int = 1, twice: bool = False):
        super().__init__(channels)
        self.factor, self.twice = factor, twice
        self.weight = torch.nn.Parameter(torch.ones(channels))
    def forward(self, x):
        return self.weight[:, None, None] * x * self.factor * (2 if self.twice else 1)
    def macs(self, height, width):
        return 2 * self.channels * height * width

class Function:
    pass

class NoChannels(Halve):
    def __init__(self, width):
        super().__init__(width)

class Unfinished(Attention):
    def macs(self, height, width):
        return 0
"""
FAMILY = """
family = "mine"
source = "here"
builder = "mine:Net"
input_chw = [3, 8, 8]
num_classes = 4
[variants.plain]
title = "plain"
[variants.with_block]
title = "with a block"
baseline = "plain"
[variants.with_block.se]
sites = ["conv"]
block = "halve.py:Halve"
factor = 0.25
"""
NET = """
from torch import nn
class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, num_classes)
    def forward(self, x):
        return self.head(self.conv(x).mean((2, 3)))
"""


class Scale(Attention):
    """x * factor."""

    def __init__(self, channels, *, factor: int = 2, init="he"):
        super().__init__(channels, init)
        self.factor = factor

    def forward(self, x):
        return x * self.factor

    def macs(self, height, width):
        return self.channels * height * width


@pytest.fixture(autouse=True)
def registries(monkeypatch):
    monkeypatch.setattr(registry, "_CLASSES", dict(registry._CLASSES))
    known = dict(BLOCKS)
    yield
    BLOCKS.clear()
    BLOCKS.update(known)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "halve.py").write_text(BLOCK)
    (tmp_path / "mine.py").write_text(NET)
    (tmp_path / "mine.toml").write_text(FAMILY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


class TestRegistered:
    def test_it_is_known_everywhere(self, net):
        register_block("scale", Scale)
        plain = net(torch.ones(CHW))
        assert insert_se(net, "0", block="scale", factor=3, input_nchw=CHW)[0].macs == 8 * 36
        torch.testing.assert_close(net(torch.ones(CHW)), 3 * plain)
        config = changed(None, "block=scale,sites=0,factor=5,init=identity")
        assert (type(config), config.factor, config.init) == (BLOCKS["scale"], 5, "identity")
        text = FAMILY.replace('"halve.py:Halve"', '"scale"').replace("0.25", "4")
        assert parse_family(text, origin="a")["with_block"].se.factor == 4

    def test_its_keys_are_checked(self, net):
        register_block("scale", Scale)
        with pytest.raises(SpecError, match="factor: 'x' is not a whole number"):
            changed(None, "block=scale,sites=0,factor=x")
        with pytest.raises(SpecError, match=r"reduction: unknown key; allowed for scale: block, sites, .*factor"):
            changed(None, "block=scale,sites=0,reduction=4")
        with pytest.raises(SpecError, match="factor: expected int, got float"):
            insert_se(net, "0", block="scale", factor=2.5, input_nchw=CHW)

    def test_a_name_that_is_taken(self):
        register_block("scale", Scale)
        with pytest.raises(SpecError, match=r"register_block 'scale': is taken by .*\.Scale; give replace=True"):
            register_block("scale", Scale)
        register_block("scale", Scale, replace=True)
        with pytest.raises(SpecError, match="register_block 'eca': is a block of selab; choose another name"):
            register_block("eca", Scale, replace=True)
        with pytest.raises(SpecError, match="register_block 'My block': a name is lower-case letters"):
            register_block("My block", Scale)

    def test_a_class_that_is_no_block(self):
        with pytest.raises(SpecError, match=r"expected a subclass of selab.attention.Attention, got Linear"):
            register_block("linear", nn.Linear)
        with pytest.raises(SpecError, match="got a value of type int"):
            register_block("linear", 3)

        class Placed(Scale):
            def __init__(self, channels, placement="x"):
                super().__init__(channels)

        with pytest.raises(SpecError, match="parameter 'placement' is a key of every block; rename it"):
            register_block("placed", Placed)


class TestFromAFile:
    def test_it_is_built_with_its_keys(self, folder, net):
        plain = net(torch.ones(CHW))
        inserted = insert_se(net, "0", block="halve.py:Halve", twice=True, factor=0.25, input_nchw=CHW)
        assert (inserted[0].block, inserted[0].params) == ("halve.py:Halve", 8)
        torch.testing.assert_close(net(torch.ones(CHW)), plain / 2)
        assert remove_se(net) == 1
        torch.testing.assert_close(net(torch.ones(CHW)), plain)

    def test_from_the_command_line(self, folder):
        variant = catalog.find("resnet18+block=halve.py:Halve,factor=0.25,twice=yes,groups=2,stages=2")
        assert variant.se == ExternalConfig(
            sites="residual",
            stages=(2,),
            target="halve.py:Halve",
            arguments={"factor": 0.25, "twice": True, "groups": 2},
        )
        assert as_keys(variant.se)["factor"] == 0.25
        assert json.dumps(as_builtins(variant)["se"]).count("halve.py:Halve") == 1
        assert len(build(variant, device="meta", input_chw=(3, 32, 32)).insertions) == 2
        again = changed(variant.se, "factor=1")
        assert (again.arguments["factor"], again.arguments["twice"]) == (1, True)
        assert changed(variant.se, "block=eca") == block_config(sites="residual", stages=[2], block="eca")

    def test_the_hash_knows_the_keys(self, folder):
        one, two, again = (
            catalog.find(f"resnet18+block=halve.py:Halve,factor={value}").facts_hash for value in ("1", "2", "1")
        )
        assert one != two
        assert one == again

    def test_finding_it_runs_nothing(self, folder):
        (folder / "halve.py").write_text("raise ValueError('ran')")
        variant = catalog.find("resnet18+block=halve.py:Halve")
        with pytest.raises(SpecError, match=r"halve.py:Halve: ValueError: ran \(.*halve.py, line 1\)"):
            build(variant, device="meta", input_chw=(3, 32, 32))

    def test_beside_a_toml(self, folder, monkeypatch, tmp_path_factory):
        monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
        built = build(catalog.find(f"{folder}/mine.toml:with_block"))
        assert [one.factor for one in built.model.modules() if isinstance(one, Attention)] == [0.25]

    @pytest.mark.parametrize(
        ("block", "keys", "message"),
        [
            ("halv.py:Halve", {}, "halv.py:Halve: there is no file halv.py"),
            ("halve.py:Halv", {}, "halve.py:Halv: there is no such name in it; did you mean Halve"),
            ("halve.py:Function", {}, "expected a subclass of selab.attention.Attention, got Function"),
            ("halve.py:NoChannels", {}, "the first parameter of NoChannels must be `channels`"),
            ("halve.py:Unfinished", {}, "Unfinished does not define forward"),
            ("halve.py:Halve", {"factr": 1}, "halve.py:Halve: factr: unknown key; allowed: factor, groups, twice"),
            ("nowhere.block:Halve", {}, "there is no module 'nowhere'"),
        ],
    )
    def test_what_is_wrong_is_one_line(self, folder, net, block, keys, message):
        with pytest.raises(SpecError, match=message) as caught:
            insert_se(net, "0", block=block, input_nchw=CHW, **keys)
        assert "\n" not in str(caught.value)
        assert len(net) == 2

    def test_identity_needs_a_parameter(self, folder, net):
        with pytest.raises(InsertionError, match=r"init 'identity': halve.py:Halve has no parameter `init`"):
            insert_se(net, "0", block="halve.py:Halve", init="identity", input_nchw=CHW)

    def test_a_key_of_a_toml_must_be_a_plain_value(self):
        with pytest.raises(SpecError, match=r"with_block.se.factor: expected a number, a boolean or text, got list"):
            parse_family(FAMILY.replace("0.25", "[1]"), origin="a")


def test_an_installed_package_offers_blocks(folder, net, monkeypatch):
    entry = importlib.metadata.EntryPoint("halve", "halve:Halve", block_configs.ENTRY_POINTS)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [entry] if group == "selab.blocks" else [])
    assert insert_se(net, "0", block="halve", input_nchw=CHW)[0].block == "halve:Halve"
