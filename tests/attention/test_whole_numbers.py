"""Options that count something take whole numbers: nothing is rounded silently, and a bool is no number."""

import numpy
import pytest
from torch import nn

import selab as package
from selab.attention import blocks
from selab.attention.config import block_config
from selab.attention.gather_excite import GETheta, GEThetaPlus
from selab.attention.se import SqueezeExcitation, latent_width, squeeze_width
from selab.attention.selective_kernel import SelectiveKernel
from selab.errors import InsertionError, SelabError, SpecError

NO_WHOLE = [1.5, 2.0, True, "4", None, float("nan")]
CLASSES = [
    (SqueezeExcitation, "reduction"),
    (SqueezeExcitation, "divisor"),
    (blocks.CBAM, "reduction"),
    (blocks.CBAM, "kernel_size"),
    (blocks.CoordinateAttention, "reduction"),
    (blocks.SCSE, "reduction"),
    (blocks.GatherExcite, "extent"),
    (blocks.ECA, "kernel_size"),
    (SqueezeExcitation, "squeeze_channels"),
    (GETheta, "extent"),
    (GEThetaPlus, "extent"),
    (GEThetaPlus, "reduction"),
    (SelectiveKernel, "branches"),
    (SelectiveKernel, "groups"),
    (SelectiveKernel, "reduction"),
]
MAY_BE_NONE = ("kernel_size", "squeeze_channels")


@pytest.fixture
def net():
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU())


@pytest.mark.parametrize("value", NO_WHOLE, ids=repr)
@pytest.mark.parametrize(("kind", "name"), CLASSES, ids=lambda one: getattr(one, "__name__", one))
def test_classes(kind, name, value):
    if value is None and name in MAY_BE_NONE and kind is not blocks.CBAM:
        pytest.skip("None is the default")
    with pytest.raises(InsertionError, match=rf"{name} .*: must be a whole number, got {type(value).__name__}"):
        kind(64, **{name: value})


@pytest.mark.parametrize("kind", [SqueezeExcitation, *(one for one, _ in CLASSES), blocks.ESE, blocks.SSE])
def test_channels(kind):
    for value in (64.0, True):
        with pytest.raises(InsertionError, match=r"channels .*: must be a whole number"):
            kind(value)


def test_whole_numbers_of_other_libraries_are_taken():
    assert SqueezeExcitation(numpy.int64(64), numpy.int32(4)).squeeze_channels == 16
    assert squeeze_width(64, numpy.int64(16)) == 4


KEYS = {
    "reduction": {},
    "divisor": {},
    "min_channels": {},
    "kernel_size": {"block": "cbam"},
    "extent": {"block": "gather_excite"},
    "branches": {"block": "sk"},
    "groups": {"block": "sk"},
}


@pytest.mark.parametrize("value", [1.5, 2.0, True, "4", float("nan")], ids=repr)
@pytest.mark.parametrize("name", KEYS)
def test_insertion(net, name, value):
    with pytest.raises(SpecError, match=f"{name}: "):
        package.insert_se(net, "1", input_nchw=(1, 3, 8, 8), **KEYS[name], **{name: value})
    assert len(list(net.modules())) == 3


@pytest.mark.parametrize("name", KEYS)
@pytest.mark.parametrize("text", ["1.5", "4.0", "yes", "true", "1e1"])
def test_the_command_line(selab, name, text):
    keys = "".join(f"{key}={value}," for key, value in KEYS[name].items())
    status, out, error = selab("count", "--arch", "resnet18", "--insert", "residual", "--se", f"{keys}{name}={text}")
    assert (status, out) == (1, "")
    assert f"{name}: '{text}' is not a whole number" in error


class TestLatentChannels:
    @pytest.mark.parametrize(("value", "width"), [(1, 1), (7, 7), (7.0, 7), (0.5, 32), (0.3, 19)])
    def test_right(self, value, width):
        assert latent_width(64, value) == width
        assert block_config(sites="0", bias=True, latent_channels=value).latent_channels == value

    @pytest.mark.parametrize("value", [1.5, 63.999, True, False, 0, 0.0, -1, -0.5, float("inf"), float("nan"), "4"])
    def test_wrong(self, net, value):
        with pytest.raises(InsertionError, match="latent_channels "):
            latent_width(64, value)
        with pytest.raises(SelabError, match="latent_channels: "):
            package.insert_se(net, "1", input_nchw=(1, 3, 8, 8), latent_channels=value)
        assert len(list(net.modules())) == 3

    @pytest.mark.parametrize("text", ["1.5", "63.999", "0", "0.0", "-1", "yes"])
    def test_the_command_line(self, selab, text):
        words = ["count", "--arch", "resnet18", "--insert", "residual", "--se", f"latent_channels={text}"]
        status, out, error = selab(*words)
        assert (status, out) == (1, "")
        assert "latent_channels: " in error


@pytest.mark.parametrize("name", ["seed", "threads"])
def test_measure(net, name):
    with pytest.raises(SelabError, match=f"selab.measure: {name} True: must be a whole number"):
        package.measure(net, baseline=net, input=(1, 3, 8, 8), **{name: True})
