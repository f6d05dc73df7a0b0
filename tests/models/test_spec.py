import msgspec
import pytest

from selab.attention.config import BLOCKS, BUILT_IN, CBAMConfig, ECAConfig, block_config, changed
from selab.errors import SpecError, UnknownNameError
from selab.models import catalog
from selab.models.catalog import baseline_of, find
from selab.models.spec import Variant, parse_family

GOOD = """
family = "toy"
source = "a paper"
builder = "toy:build"
input_chw = [3, 32, 32]
num_classes = 10
[variants.toy]
title = "Toy"
[variants.se_toy]
title = "Toy with SE"
baseline = "toy"
[variants.se_toy.se]
sites = ["layer*"]
bias = false
[[variants.se_toy.published]]
metric = "params"
value = 1.0
source = "a paper"
where = "Table 1"
"""


def test_reads_a_family():
    variant = parse_family(GOOD, origin="toy.toml")["se_toy"]
    assert variant.se.sites == ("layer*",)
    assert variant.se.reduction == 16
    assert variant.baseline == "toy"
    assert variant.published[0].where == "Table 1"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("family =", "family", "toy.toml: not TOML"),
        ("num_classes = 10", "num_clases = 10", "toy.toml: num_clases: unknown key; allowed: family, source"),
        ("num_classes = 10", "", "toy.toml: num_classes: missing"),
        ("num_classes = 10", "num_classes = 0", "toy.toml: num_classes: 0; must be at least 1"),
        ('"toy:build"', '"toy.build"', "toy.toml: builder: 'toy.build' is not of the form 'package.module:callable'"),
        ("[3, 32, 32]", "[3, 32]", "toy.toml: input_chw: expected"),
        ('title = "Toy"', "titel = 1", "toy.toml: variants.toy.titel: unknown key; allowed: title, baseline"),
        ('title = "Toy"', "title = 1", "toy.toml: variants.toy.title: expected str, got int"),
        ("bias = false", "bias = 0", "toy.toml: variants.se_toy.se.bias: expected bool, got int"),
        ("bias = false", "", "toy.toml: variants.se_toy.se.bias: missing"),
        (
            "bias = false",
            "bias = false\nratio = 2",
            "toy.toml: variants.se_toy.se.ratio: unknown key; allowed: block, sites",
        ),
        (
            "bias = false",
            "bias = false\nreduction = 0",
            "toy.toml: variants.se_toy.se.reduction: 0; must be at least 1",
        ),
        (
            "bias = false",
            'bias = false\ngate = "soft"',
            "toy.toml: variants.se_toy.se.gate: invalid enum value 'soft'; allowed: sigmoid, tanh, relu, hardsigmoid",
        ),
        ('baseline = "toy"', 'baseline = "tony"', "variants.se_toy.baseline: no variant 'tony' here; did you mean toy"),
        ('baseline = "toy"', "", "variants.se_toy.baseline: missing"),
        ('where = "Table 1"', 'where = " "', r"variants.se_toy.published\[0\]: source and where must name"),
        ('source = "a paper"\nwhere', "where", r"variants.se_toy.published\[0\].source: missing"),
        ("[variants.toy]", "[variants.Toy]", "variants.Toy: a variant's name is lower-case"),
    ],
)
def test_errors_name_file_and_key(old, new, message):
    assert old in GOOD
    with pytest.raises(SpecError, match=message):
        parse_family(GOOD.replace(old, new, 1), origin="toy.toml")


def test_a_family_without_variants():
    with pytest.raises(SpecError, match=r"toy.toml: no \[variants.NAME\] table"):
        parse_family(GOOD.split("[variants")[0], origin="toy.toml")


def test_the_hash_is_of_what_decides_the_network():
    def hash_of(text):
        return parse_family(text, origin="x.toml")["se_toy"].facts_hash

    assert hash_of(GOOD) == hash_of(GOOD.replace("Toy with SE", "Another title").replace("value = 1.0", "value = 2.0"))
    assert hash_of(GOOD) != hash_of(GOOD.replace("bias = false", "bias = true"))
    assert hash_of(GOOD) != hash_of(GOOD.replace("num_classes = 10", "num_classes = 11"))


class TestCatalog:
    def test_names_are_unique_and_baselines_exist(self):
        for variant in catalog.installed().values():
            baseline = catalog.baseline_of(variant)
            assert (baseline is None) == (variant.se is None)

    def test_bias_is_stated_by_every_variant(self):
        for variant in catalog.installed().values():
            assert variant.se is None or isinstance(variant.se.bias, bool)

    @pytest.mark.parametrize(
        ("name", "nearest"), [("se_mobilnet", "se_mobilenet"), ("resnet-50", "resnet50"), ("VGG16", "vgg16")]
    )
    def test_unknown_names_have_neighbours(self, name, nearest):
        with pytest.raises(UnknownNameError, match=rf"did you mean .*{nearest}"):
            catalog.find(name)

    def test_a_file_and_its_variant(self, tmp_path):
        path = tmp_path / "toy.toml"
        path.write_text(GOOD)
        variant = catalog.find(f"{path}:se_toy")
        assert variant.name == "se_toy"
        assert catalog.baseline_of(variant).name == "toy"
        with pytest.raises(SpecError, match="has 2 variants; name one"):
            catalog.find(str(path))
        with pytest.raises(UnknownNameError, match="no variant 'se_tony'; did you mean se_toy"):
            catalog.find(f"{path}:se_tony")

    def test_a_file_that_is_not_there(self, tmp_path):
        with pytest.raises(SpecError, match="cannot be read: No such file"):
            catalog.find(str(tmp_path / "none.toml"))


def test_one_line_of_changes_is_as_strict_as_a_toml():
    facts = changed(None, "sites=residual,reduction=8,stages=2-4,placement=pre")
    assert facts == block_config(sites="residual", reduction=8, stages=[2, 3, 4], placement="pre", bias=True)
    assert changed(facts, "stages=2+5,bias=no") == block_config(
        sites="residual", reduction=8, stages=[2, 5], placement="pre", bias=False
    )
    assert changed(facts, "sites=a.*+b").sites == ("a.*", "b")


def test_another_kind_of_block_keeps_where_it_stands_and_nothing_else():
    facts = changed(block_config(sites="conv", bias=False, reduction=4, placement="pre"), "block=cbam")
    assert facts == CBAMConfig(sites="conv", placement="pre")
    assert changed(facts, "kernel_size=3").kernel_size == 3
    assert {kind.__struct_config__.tag for kind in BLOCKS.values()} == set(BLOCKS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("reduction=8,,gate=tanh", "character 13: expected KEY=VALUE, found ''; for example reduction=8"),
        ("reduction", "character 1: expected KEY=VALUE, found 'reduction'"),
        ("gate=tanh,gate=relu", "character 11: gate is given twice"),
        (
            "ratio=8",
            r"ratio: unknown key; did you mean reduction.*; allowed for se: block, sites, placement, stages, init, "
            "min_channels, bias",
        ),
        ("reduction=many", "reduction: 'many' is not a whole number"),
        ("reduction=0", "reduction: 0; must be at least 1"),
        ("gate=soft", "gate: invalid enum value 'soft'; allowed: sigmoid, tanh, relu, hardsigmoid"),
        ("block=ecca", "block 'ecca': no such block; did you mean eca"),
        ("block=gc", "block 'gc': no such block; did you mean global_context"),
        ("block=ge", "block 'ge': no such block; did you mean gather_excite, ge_theta, ge_theta_plus"),
        ("block=nothing_like", f"no such block; known: {', '.join(sorted(BUILT_IN))}; or a class of your own"),
        (
            "block=eca,reduction=4",
            "reduction: unknown key; allowed for eca: block, sites, placement, stages, init, min_channels, kernel_size",
        ),
        ("stages=last", "stages: 'last' names no stages; write 3, 2-4 or 2[+]4"),
        ("stages=4-2", "stages: '4-2' ends before it begins"),
        ("bias=1", "bias: '1'; allowed: yes, no"),
    ],
)
def test_a_wrong_line_says_where(text, message):
    with pytest.raises(SpecError, match=message):
        changed(block_config(sites="conv", bias=False), text)


def test_without_facts_to_change_the_sites_must_be_named():
    with pytest.raises(SpecError, match="sites: missing; name a site group or a pattern, or give --insert"):
        changed(None, "reduction=8")


def test_keys_of_other_blocks_are_refused_in_a_toml():
    text = GOOD.replace("bias = false", 'block = "eca"\nreduction = 4')
    with pytest.raises(
        SpecError, match=r"se_toy.se.(reduction|gate|divisor): unknown key; allowed: block, sites, placement"
    ):
        parse_family(text, origin="toy.toml")
    with pytest.raises(
        SpecError, match=r"se_toy.se.block: no such block 'ecca'; did you mean eca.*; or a class of your own"
    ):
        parse_family(GOOD.replace("bias = false", 'bias = false\nblock = "ecca"'), origin="toy.toml")


def test_keys_that_say_nothing_new_leave_the_hash_alone():
    before = parse_family(GOOD, origin="a")["se_toy"].facts_hash
    for line in ('activation = "relu"', "stages = []", 'block = "se"', 'init = "he"'):
        assert (
            parse_family(GOOD.replace("bias = false", f"bias = false\n{line}"), origin="a")["se_toy"].facts_hash
            == before
        )
    for line in ('activation = "silu"', "stages = [2]", 'init = "identity"'):
        assert (
            parse_family(GOOD.replace("bias = false", f"bias = false\n{line}"), origin="a")["se_toy"].facts_hash
            != before
        )


def test_a_word_finds_a_changed_network():
    variant = find("resnet50+reduction=8,stages=2-4,placement=pre")
    assert variant.name == "resnet50+reduction=8,stages=2-4,placement=pre"
    assert baseline_of(variant).name == "resnet50"
    # It begins with the facts of the catalog's se_resnet50, with biases; se_vgg16 has none.
    assert variant.se == msgspec.structs.replace(find("se_resnet50").se, reduction=8, stages=(2, 3, 4), placement="pre")
    assert find("vgg16+reduction=8").se.bias is False
    again = find("se_resnet50+block=eca")
    assert (again.baseline, again.se) == ("resnet50", ECAConfig(sites="residual"))
    assert not again.published


@pytest.mark.parametrize(
    "name",
    ["resnet50", "se_resnet50", "se_resnet50+block=cbam,stages=2-3", "resnet18+block=own.py:Block,width=4,deep=yes"],
)
def test_a_variant_travels_as_json(name):
    variant = find(name)
    again = msgspec.json.decode(msgspec.json.encode(variant), type=Variant)
    assert again == variant
    assert again.facts_hash == variant.facts_hash


@pytest.mark.parametrize(
    ("there", "name", "parts"),
    [
        ("", "mobilenet", ("mobilenet", None)),
        ("", "mobilenet+reduction=8", ("mobilenet", "reduction=8")),
        ("", "mobilenet+block=own/file.py:Gate", ("mobilenet", "block=own/file.py:Gate")),
        ("own/file.py", "mobilenet+block=own/file.py:Gate", ("mobilenet", "block=own/file.py:Gate")),
        ("a+b=c/net.toml", "a+b=c/net.toml", ("a+b=c/net.toml", None)),
        ("a+b=c/net.toml", "a+b=c/net.toml:wide", ("a+b=c/net.toml:wide", None)),
        ("a+b=c/net.toml", "a+b=c/net.toml:wide+reduction=8", ("a+b=c/net.toml:wide", "reduction=8")),
        ("a+b=c/net.py", "a+b=c/net.py:make+sites=x+y", ("a+b=c/net.py:make", "sites=x+y")),
        ("a+b=c/net.onnx", "a+b=c/net.onnx:no_se", ("a+b=c/net.onnx:no_se", None)),
        # What is not there is taken as changes, whose message says so.
        ("", "a+b=c/net.toml:wide", ("a", "b=c/net.toml:wide")),
    ],
)
def test_a_path_may_hold_what_looks_like_changes(tmp_path, monkeypatch, there, name, parts):
    monkeypatch.chdir(tmp_path)
    if there:
        (tmp_path / there).parent.mkdir()
        (tmp_path / there).touch()
    assert catalog.split_address(name) == parts
