"""`fuse` traces networks of any arguments, and says how a network can be traced that failed."""

import copy

import pytest
import torch
from torch import nn

from selab.attention.se import SqueezeExcitation
from selab.errors import ModelError
from selab.fusion.fuse import fuse


class Two(nn.Module):
    """Takes an image and a factor."""

    def __init__(self):
        super().__init__()
        self.conv, self.se = nn.Conv2d(3, 8, 3), SqueezeExcitation(8, 2)

    def forward(self, image, factor):
        return self.se(self.conv(image)) * factor


class Listed(Two):
    """Takes dicts of images."""

    def forward(self, batch):
        return [self.se(self.conv(one)) for one in batch["images"]][-1] * batch["factor"]


IMAGE, FACTOR = torch.randn(1, 3, 8, 8), torch.tensor(2.0)


@pytest.mark.parametrize(
    ("kind", "inputs"),
    [
        (Two, (IMAGE, FACTOR)),
        (Two, [IMAGE, 3.0]),
        (Two, {"image": IMAGE, "factor": FACTOR}),
        (Listed, ({"images": [IMAGE], "factor": FACTOR},)),
        (Listed, {"batch": {"images": (IMAGE,), "factor": 2}}),
    ],
)
@pytest.mark.parametrize("how", ["inputs", "input_nchw"])
def test_other_arguments_than_one_image(kind, inputs, how):
    model = kind().eval()
    fused = copy.deepcopy(model)
    fusion = fuse(fused, **{how: inputs})
    assert not fusion.in_place_reason
    assert [one.in_place for one in fusion.blocks] == [True]
    with torch.inference_mode():
        given = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
        torch.testing.assert_close(fused(*given[0], **given[1]), model(*given[0], **given[1]))


def test_a_tensor_is_an_example():
    assert not fuse(nn.Sequential(nn.Conv2d(3, 8, 3), SqueezeExcitation(8, 2)), inputs=IMAGE).in_place_reason


@pytest.mark.parametrize("inputs", [(), (1, 2), ("abc",), 3, "abc", [[]]])
def test_what_is_no_example_is_refused(inputs):
    with pytest.raises(ModelError, match=r"a tuple of arguments or a dict of keyword arguments, as inputs="):
        fuse(Two(), inputs=inputs)


def test_where_the_trace_fails_the_blocks_are_fused_and_the_next_step_is_said():
    fusion = fuse(Two())
    assert str(fusion).startswith("fused 1 SE block; the network fails")
    assert str(fusion).endswith("give the shape of its input as input_nchw=(N, C, H, W), or other arguments as inputs=")


def test_a_part_that_takes_images_is_named():
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3), SqueezeExcitation(8, 2))

        def forward(self, images, targets):
            return self.backbone(images[0]), targets

    model = Detector()
    assert str(fuse(model)).endswith("or fuse a part that takes images, such as selab.fuse(model.backbone)")
    assert str(fuse(model.backbone, input_nchw=(1, 3, 8, 8))) == "fused 1 SE block (in place)"
