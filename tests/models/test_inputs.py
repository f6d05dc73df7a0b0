"""Networks with two inputs: by position, by name, and as one dictionary."""

import json

import pytest
import torch
from torch import nn

from selab.errors import SpecError
from selab.experiments.job import Request, parse_inputs
from selab.models.inputs import Input, example_of, feed

NETWORKS = """
from torch import nn


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(1, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)

    def forward(self, rgb, depth):
        assert depth.shape[1] == 1
        return self.bn(self.a(rgb) + self.b(depth))


class Named(Two):
    def forward(self, *, rgb, depth):
        return super().forward(rgb, depth)


class Mapped(Two):
    def forward(self, batch):
        return super().forward(batch["rgb"], batch["depth"])


class Optional(Two):
    def forward(self, rgb, depth=None):
        return super().forward(rgb, depth)


class Several(Two):
    def forward(self, *images, scale=None):
        return super().forward(*images)


class Free(Two):
    def forward(self, rgb, **others):
        return super().forward(rgb, others["other"])


class Vector(Two):
    def forward(self, scale, rgb, depth):
        return super().forward(rgb, depth) * scale.mean()
"""
POSITIONAL, NAMED = ["3x6x6", "1x6x6"], ["rgb=3x6x6", "depth=1x6x6"]
FORMS = [
    ("Two", POSITIONAL),
    ("Two", NAMED),
    ("Two", ["3x6x6", "depth=1x6x6"]),
    ("Two", ["depth=1x6x6", "rgb=3x6x6"]),
    ("Named", NAMED),
    ("Mapped", NAMED),
    ("Vector", ["5", "3x6x6", "1x6x6"]),
]
SE = ("--insert", "bn", "--se", "reduction=2")
# 36 positions, 8 filters of 3x3 over 3 and 1 channels; and their weights, biases and the norm's scale and shift.
MACS, PARAMS = 36 * 8 * 9 * (3 + 1), 8 * 9 * (3 + 1) + 2 * 8 + 2 * 8
# SE on 8 channels with a squeeze width of 4: two layers with biases.
SE_PARAMS = 2 * 8 * 4 + 4 + 8


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "two.py"
    path.write_text(NETWORKS)
    return path


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        (
            "Two",
            ["dept=1x6x6", "rgb=3x6x6"],
            "--input dept: Two.forward has no argument of this name; did you mean depth?",
        ),
        ("Two", ["3x6x6", "dept=1x6x6"], "--input dept: Two.forward has no argument of this name; did you mean depth?"),
        (
            "Two",
            ["image=3x6x6", "more=1x6x6"],
            "--input image: Two.forward has no argument of this name; known: depth, rgb",
        ),
        (
            "Named",
            ["rgb=3x6x6", "dept=1x6x6"],
            "--input dept: Named.forward has no argument of this name; did you mean",
        ),
        (
            "Optional",
            ["rgb=3x6x6", "dept=1x6x6"],
            "--input dept: Optional.forward has no argument of this name; did you",
        ),
        (
            "Two",
            ["3x6x6", "rgb=1x6x6"],
            "--input rgb: is given twice: the input without a name in place 1 (3x6x6) is the argument rgb of "
            "Two.forward; name every input, as in --input rgb=3x6x6",
        ),
        (
            "Vector",
            ["5", "3x6x6", "rgb=3x6x6"],
            "--input rgb: is given twice: the input without a name in place 2 (3x6x6)",
        ),
        (
            "Two",
            ["3x6x6", "1x6x6", "2x6x6"],
            "--input: 3 without a name, and Two.forward takes 2 such inputs; its arguments: rgb, depth",
        ),
        (
            "Named",
            ["3x6x6", "depth=1x6x6"],
            "--input: 1 without a name, and Named.forward takes 0 such inputs; its arguments: rgb, depth",
        ),
    ],
)
@pytest.mark.parametrize("command", ["count", "show", "sites"])
def test_inputs_without_a_place_in_forward(selab, file, name, given, words, command):
    network = ([] if command == "show" else ["--arch"]) + [f"{file}:{name}"]
    status, _, error = selab(command, *network, *(word for text in given for word in ("--input", text)))
    assert status == 1
    assert words in error.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("Several", ["3x6x6", "1x6x6"]),
        ("Free", ["rgb=3x6x6", "other=1x6x6"]),
        ("Optional", ["3x6x6", "depth=1x6x6"]),
        ("Mapped", ["rgb=3x6x6", "depth=1x6x6", "batch=2"]),
        ("Mapped", ["rgb=3x6x6", "depth=1x6x6", "batches=2"]),
    ],
)
def test_inputs_that_forward_takes_in_another_way(selab, file, name, given):
    words = [word for text in given for word in ("--input", text)]
    status, out, error = selab("count", "--arch", f"{file}:{name}", *words, "--json", "-")
    assert status == 0, error
    assert json.loads(out)["cost"]["macs"]["conv_linear"] == MACS


@pytest.mark.parametrize(("name", "given"), FORMS)
class TestCommands:
    def words(self, given):
        return [word for text in given for word in ("--input", text)]

    def test_count(self, selab, file, tmp_path, name, given):
        words = [*self.words(given), *SE, "--json", "-"]
        status, out, error = selab("count", "--arch", f"{file}:{name}", *words)
        assert status == 0, error
        found = json.loads(out)
        assert found["cost"]["params"] == PARAMS + SE_PARAMS
        assert found["baseline_cost"]["params"] == PARAMS
        assert found["baseline_cost"]["macs"]["conv_linear"] == MACS
        assert found["cost"]["macs"]["conv_linear"] == MACS + 2 * 8 * 4

    def test_sites(self, selab, file, name, given):
        status, out, error = selab("sites", "--arch", f"{file}:{name}", *self.words(given), *SE)
        assert (status, "8×6×6  ← SE" in out) == (0, True), error

    def test_show(self, selab, file, name, given):
        status, out, error = selab("show", f"{file}:{name}", *self.words(given))
        assert (status, f"{PARAMS} parameters" in out) == (0, True), error


def test_a_profile_runs_all_inputs(selab, file, tmp_path, quick_plans):
    words = ["--input", "rgb=3x6x6", "--input", "depth=1x6x6", "--phase", "forward", "--threads", 1]
    words += ["--insert", "bn", "--se", "reduction=2", "--out", tmp_path / "r", "--json", "-"]
    for name in ("Two", "Mapped"):
        status, out, error = selab("profile", "--arch", f"{file}:{name}", *words)
        assert status == 0, error
        assert "--input rgb=3x6x6 --input depth=1x6x6" in out


def test_an_input_that_is_missing_is_said(selab, file):
    status, _, error = selab("count", "--arch", f"{file}:Two", "--input", "3x6x6", "--insert", "bn")
    assert (status, error.count("error: ")) == (1, 1)
    assert "missing 1 required positional argument: 'depth'" in error.splitlines()[-1]


class TestParsing:
    def test_one_input_is_as_before(self):
        assert parse_inputs(["3x6x7"]) == ((3, 6, 7), ())

    def test_several(self):
        image, inputs = parse_inputs(["5", "3x6x6", "b=1x2x3x4"])
        assert image == (3, 6, 6)
        assert [(one.name, one.shape) for one in inputs] == [("", (5,)), ("", (3, 6, 6)), ("b", (1, 2, 3, 4))]
        assert [str(one) for one in inputs] == ["5", "3x6x6", "b=1x2x3x4"]

    def test_the_command_asks_for_the_same_again(self):
        image, inputs = parse_inputs(NAMED)
        command = Request(arch="x", input_chw=image, inputs=inputs).command("count")
        assert command == "selab count --arch x --input rgb=3x6x6 --input depth=1x6x6"

    @pytest.mark.parametrize(
        ("texts", "message"),
        [
            (["a=3x6x6", "a=1x6x6"], "two inputs are called a"),
            (["a=3x6x6", "1x6x6"], "inputs without a name come first"),
            (["5", "7x7"], "none of the inputs is an image"),
            (["3x6x6", "0x6x6"], "is not CxHxW or NAME=CxHxW"),
            (["3x6x6", "=1x6x6"], "is not CxHxW or NAME=CxHxW"),
            (["3x6x6", "1x2x3x4x5x6"], "is not CxHxW or NAME=CxHxW"),
            (["3x6x6", "a b=1x6x6"], "is not CxHxW or NAME=CxHxW"),
            (["3x6x6", "1x6x99999999"], "is not CxHxW or NAME=CxHxW"),
            (["3x6x6", ""], "is not CxHxW or NAME=CxHxW"),
        ],
    )
    def test_mistakes(self, texts, message):
        with pytest.raises(SpecError, match=message):
            parse_inputs(texts)


class _Sum(nn.Module):
    def forward(self, x, y, *, scale):
        return x.sum() + y.sum(), scale


class TestFeeding:
    inputs = (Input(shape=(2,)), Input(shape=(3, 4, 4)), Input(shape=(7,), name="scale"))

    def test_the_image_takes_its_place_and_the_others_are_drawn_once(self):
        model = _Sum()
        feed(model, self.inputs)
        image = torch.ones(5, 3, 4, 4)
        total, scale = model(image)
        again, same = model(image)
        assert scale.shape == (5, 7)
        assert torch.equal(total, again)
        assert scale is same
        assert model(torch.ones(1, 3, 4, 4, dtype=torch.double))[1].dtype == torch.double

    def test_a_whole_call_is_left_as_it_is(self):
        model = _Sum()
        feed(model, self.inputs)
        total, scale = model(torch.ones(1), torch.ones(2), scale=3)
        assert (total.item(), scale) == (3.0, 3)

    def test_a_network_without_several_inputs_gets_no_hook(self):
        model = nn.Identity()
        feed(model, ())
        assert not model._forward_pre_hooks

    def test_an_example_has_the_parameters_type(self):
        model = nn.Conv2d(3, 8, 1).double()
        model.forward = lambda x, y: x
        found = example_of(model, (Input(shape=(3, 4, 4)), Input(shape=(1, 4, 4))), batch=2)
        assert [(one.shape, one.dtype) for one in found] == [
            ((2, 3, 4, 4), torch.double),
            ((2, 1, 4, 4), torch.double),
        ]
