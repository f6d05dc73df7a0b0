import pytest
import torch

from selab.errors import InsertionError, SpecError
from selab.models import catalog
from selab.models.build import build
from selab.models.spec import parse_family


def test_baseline_and_variant_of_one_seed_share_their_common_layers():
    base, other = (
        build(catalog.find(name), seed=3).model.state_dict() for name in ("mobilenet_0_25", "se_mobilenet_0_25")
    )
    assert all(torch.equal(value, other[key]) for key, value in base.items())
    assert not torch.equal(
        base["head.fc.weight"], build(catalog.find("mobilenet_0_25"), seed=4).model.state_dict()["head.fc.weight"]
    )


def test_the_caller_s_random_state_stays():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    build(catalog.find("se_small_cnn"), seed=9)
    assert torch.equal(torch.random.get_rng_state(), before)


def toy(tmp_path, code, **changes):
    """A family of one's own: a TOML and a module beside it."""
    (tmp_path / "toy_family.py").write_text(code)
    text = """
family = "toy"
source = "here"
builder = "toy_family:build"
input_chw = [3, 8, 8]
num_classes = 2
[variants.toy]
title = "Toy"
[variants.se_toy]
title = "Toy with SE"
baseline = "toy"
se = { sites = "0", bias = true, reduction = 2 }
"""
    for old, new in changes.items():
        text = text.replace(old, new)
    return parse_family(text, origin="toy.toml", file=str(tmp_path / "toy.toml"))


@pytest.fixture(autouse=True)
def forget_the_toy():
    import sys

    yield
    sys.modules.pop("toy_family", None)


CODE = """
from torch import nn
def build(num_classes):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 6 * 6, num_classes))
"""


def test_a_user_s_module_beside_the_toml(tmp_path):
    built = build(toy(tmp_path, CODE)["se_toy"])
    assert [item.path for item in built.insertions] == ["0"]
    assert built.model(torch.zeros(1, 3, 8, 8)).shape == (1, 2)


@pytest.mark.parametrize(
    ("code", "changes", "message"),
    [
        (CODE, {"toy_family:build": "toy_familie:build"}, "builder: 'toy_familie:build' cannot be imported"),
        (
            CODE,
            {"toy_family:build": "toy_family:make"},
            "cannot be imported: .*toy_family.py:make: there is no such name in it; known: build",
        ),
        (CODE.replace("num_classes):", "classes):"), {}, "refuses its arguments"),
        ("def build(num_classes):\n    return 3\n", {}, "does not return a torch.nn.Module"),
    ],
)
def test_a_builder_that_cannot_build(tmp_path, code, changes, message):
    with pytest.raises(SpecError, match=message):
        build(toy(tmp_path, code, **changes)["se_toy"])


def test_facts_that_ask_for_the_impossible_name_the_file(tmp_path):
    with pytest.raises(InsertionError, match=r"toy\.toml: variants\.se_toy: pattern '9' matches no module"):
        build(toy(tmp_path, CODE, **{'sites = "0"': 'sites = "9"'})["se_toy"])
