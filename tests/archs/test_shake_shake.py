"""Shake-Shake: its coefficients, its two paths, and its shortcut."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from selab.archs.shake_shake import Shake, TwoPathShortcut, shake_shake
from selab.attention.insert import insert_se
from selab.errors import InsertionError

SMALL: dict[str, Callable[[], Any]] = {
    "shake_shake": lambda: shake_shake(8, block="basic", width=4, num_classes=3),
    "shake_even": lambda: shake_shake(11, block="resnext", width=2, groups=2, num_classes=3, shake_backward=False),
}


class Negative(nn.Module):
    """-x."""

    def forward(self, x: Tensor) -> Tensor:
        return -x


def opposed(*, shake_forward: bool = True, shake_backward: bool = True) -> Shake:
    """(2 alpha - 1) x forwards, 2 beta - 1 times the gradient backwards."""
    return Shake(nn.Identity(), Negative(), shake_forward=shake_forward, shake_backward=shake_backward)


def coefficients(shake: Shake, images: int = 6) -> tuple[list[float], list[float]]:
    """Alpha and beta of each image."""
    x = torch.ones(images, 2, 3, 3, requires_grad=True)
    out = shake(x)
    out.sum().backward()
    assert x.grad is not None
    pairs = []
    for mixed in (out.detach(), x.grad):
        per_image = mixed.flatten(1)
        # One coefficient for all of an image.
        assert torch.equal(per_image, per_image[:, :1].expand_as(per_image))
        pairs.append(((per_image[:, 0] + 1) / 2).tolist())
    return pairs[0], pairs[1]


def test_shake_shake_draws_both_coefficients_per_image() -> None:
    torch.manual_seed(3)
    alpha, beta = coefficients(opposed())
    torch.manual_seed(3)
    expected = torch.rand(6), torch.rand(6)
    assert alpha == pytest.approx(expected[0].tolist(), abs=1e-6)
    assert beta == pytest.approx(expected[1].tolist(), abs=1e-6)
    assert len({*alpha, *beta}) == 12


def test_shake_even_has_half_of_each_gradient() -> None:
    torch.manual_seed(3)
    alpha, beta = coefficients(opposed(shake_backward=False))
    assert beta == [0.5] * 6
    assert len(set(alpha)) == 6


def test_even_shake_is_the_other_way_round() -> None:
    torch.manual_seed(3)
    alpha, beta = coefficients(opposed(shake_forward=False))
    assert alpha == [0.5] * 6
    assert len(set(beta)) == 6


def test_shake_is_the_mean_in_eval_mode_and_draws_nothing() -> None:
    state = torch.get_rng_state()
    assert coefficients(opposed().eval()) == ([0.5] * 6, [0.5] * 6)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("small", ["shake_shake", "shake_even"])
def test_a_seed_decides_a_training_pass(small: str) -> None:
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    network = SMALL[small]().train()

    def step(seed: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed)
        network.zero_grad()
        logits = network(x)
        logits.square().sum().backward()
        return logits.detach(), network.stem.conv.weight.grad.clone()

    first, again, other = step(1), step(1), step(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    network.eval()
    assert torch.equal(network(x), network(x))


@pytest.mark.parametrize("small", ["shake_shake", "shake_even"])
def test_shakes_train_on_the_meta_device(small: str) -> None:
    with torch.device("meta"):
        network = SMALL[small]().train()
    logits = network(torch.empty(2, 3, 32, 32, device="meta"))
    assert logits.shape == (2, 3)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("small", ["shake_shake", "shake_even"])
def test_se_gates_the_mixture_of_both_paths(small: str) -> None:
    network = SMALL[small]().train()
    x = torch.randn(4, 3, 32, 32)
    torch.manual_seed(1)
    before = network(x)
    insert_se(network, "residual", reduction=2, init="identity", input_nchw=(1, 3, 32, 32))
    torch.manual_seed(1)
    assert torch.equal(network(x), before)
    block: Any = network.eval().get_submodule("stage1.0")
    seen: list[Tensor] = []
    block.join.se.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    paths = [block.branch.shake.path1, block.branch.shake.path2]
    outputs: list[Tensor] = []
    for path in paths:
        path.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    network(x)
    assert torch.equal(seen[0], 0.5 * (outputs[0] + outputs[1]))


def test_a_gate_inside_one_of_two_paths_is_refused() -> None:
    with pytest.raises(InsertionError, match="ShakeBlock does not name the child"):
        insert_se(SMALL["shake_shake"](), "residual", placement="3x3", reduction=2, input_nchw=(1, 3, 32, 32))


def test_two_path_shortcut_sees_pixels_one_apart() -> None:
    shortcut = TwoPathShortcut(1, 2, stride=2).eval()
    nn.init.ones_(shortcut.conv1.weight)
    nn.init.ones_(shortcut.conv2.weight)
    with torch.no_grad():
        out = shortcut(torch.arange(16.0).reshape(1, 1, 4, 4))
    # Rows and columns 0 and 2; then -1 and 1, where -1 is a zero. BN divides by the root of 1 + 1e-5.
    assert (out * (1 + 1e-5) ** 0.5).flatten().tolist() == pytest.approx([0, 2, 8, 10, 0, 0, 0, 5], abs=1e-5)


def test_grouped_paths_have_the_width_of_their_name() -> None:
    with torch.device("meta"):
        network = shake_shake(29, block="resnext", width=64, groups=4)
    convs = [network.get_submodule(f"stage{stage}.0.branch.shake.path2.conv2") for stage in (1, 2, 3)]
    assert [(conv.groups, conv.in_channels, conv.out_channels) for conv in convs] == [
        (4, 256, 256),
        (4, 512, 512),
        (4, 1024, 1024),
    ]
