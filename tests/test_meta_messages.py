"""What a pass on fake tensors says when it fails, and the forms of its example input."""

import pytest
import torch
from torch import Tensor, nn

from selab.attention.auto_sites import block_ends
from selab.attention.insert import insert_se
from selab.attention.inserted import check_inserted
from selab.cost.count import count
from selab.errors import ModelError
from selab.fusion.fuse import fuse
from selab.meta import passages


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 16, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        out: Tensor = self.conv(torch.cat((a, b), 1))
        return out


class Steered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y if y.mean() > 0 else -y


def test_several_inputs_are_given_by_their_shapes() -> None:
    shapes = ((2, 3, 8, 8), (2, 3, 8, 8))
    assert passages(TwoInputs(), ["conv"], shapes)["conv"].input_shape == (2, 6, 8, 8)
    assert fuse(TwoInputs().eval(), inputs=shapes).in_place_reason == ""


@pytest.mark.parametrize(
    ("example", "words"),
    [
        ({}, "without tensors"),
        ((), "without tensors"),
        ({"a": torch.zeros(1, 3, 8, 8), "c": torch.zeros(1, 3, 8, 8)}, "name the inputs"),
    ],
)
def test_the_message_names_what_is_wrong_with_the_example(example: object, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        passages(TwoInputs(), ["conv"], example)  # type: ignore[arg-type]
    if not example:
        with pytest.raises(ModelError, match="without tensors"):
            count(TwoInputs(), example)  # type: ignore[arg-type]
        with pytest.raises(ModelError, match="without tensors"):
            block_ends(TwoInputs(), example)  # type: ignore[arg-type]


def test_a_network_steered_by_values_does_not_blame_its_input() -> None:
    with pytest.raises(ModelError, match=r'values of a tensor.*on="cpu", --on cpu') as caught:
        passages(Steered(), ["conv"], (1, 3, 8, 8))
    assert "give the shape" not in str(caught.value)
    reason = fuse(Steered().eval(), input_nchw=(1, 3, 8, 8)).in_place_reason
    assert "input_nchw" not in reason
    assert "values" in reason


def test_fuse_refuses_torchscript_and_names_the_argument() -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3)).eval()
    with pytest.raises(ModelError, match="TorchScript"):
        fuse(torch.jit.script(net))  # type: ignore[no-untyped-call]
    with pytest.raises(ModelError, match="inputs 5"):
        fuse(net, inputs=5)  # type: ignore[arg-type]


def test_blocks_are_inserted_below_the_wrapper_of_torch_compile() -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU())
    compiled = torch.compile(net, backend="eager")
    insert_se(compiled, "_orig_mod.0", input_nchw=(1, 3, 8, 8), reduction=4)  # type: ignore[arg-type]
    assert check_inserted(compiled, input_nchw=(1, 3, 8, 8)) == ("_orig_mod.0",)  # type: ignore[arg-type]
    assert check_inserted(net, input_nchw=(1, 3, 8, 8)) == ("0",)
