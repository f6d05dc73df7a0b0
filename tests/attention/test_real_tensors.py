"""Networks in which the values of tensors decide what is computed: sites, insertion, checks and fusion run on them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import selab
from selab.attention.auto_sites import block_ends, trace_ends
from selab.attention.channel_dim import larger_images
from selab.errors import InsertionError, ModelError
from selab.fusion.fuse import runtimes

NCHW = (2, 3, 16, 16)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.relu(x + self.branch(x))
        return out


class Steered(nn.Module):
    """Leaves its last block out where what its first block computes is small, as it is behind a gate of one half."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), Residual(), Residual()
        nn.init.constant_(self.stem.bias, 4.0)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.stem(x)
        if y.mean().item() > 3.5:
            y = self.first(y)
        y = self.last(y) if self.first.branch(y).abs().mean() > self.threshold else y
        y = y[y.abs().amax((1, 2, 3)) > 0]
        out: Tensor = self.head(y.mean((2, 3)))
        return out

    threshold = 0.0


class ChannelsLast(nn.Module):
    """Computes (N, H, W, C) maps by layers that do not tell where the channels are; values choose the sign."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 4, stride=4), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.stem(x).permute(0, 2, 3, 1))
        return y if y.sum() > 0 else -y


def built() -> Steered:
    torch.manual_seed(0)
    return Steered().eval()


@pytest.mark.parametrize(
    "call",
    [
        lambda net: selab.insert_se(net, "auto", input_nchw=NCHW, reduction=4),
        lambda net: selab.insert_se(net, "stem", input_nchw=NCHW, reduction=4),
        lambda net: selab.check_inserted(net, input_nchw=NCHW),
        lambda net: trace_ends(net, NCHW),
        lambda net: selab.count(net, NCHW),
        lambda net: runtimes(net, NCHW),
    ],
)
def test_the_message_names_the_next_step(call: Callable[[nn.Module], Any]) -> None:
    net = built()
    net.add_module("se", selab.SqueezeExcitation(8, 4))
    with pytest.raises(ModelError, match=r'values of a tensor.*; run it on real tensors: on="cpu", --on cpu$'):
        call(net)


def test_fusion_names_the_next_step() -> None:
    fusion = selab.fuse(built(), input_nchw=NCHW)
    assert fusion.in_place_reason.endswith('; run it on real tensors: on="cpu", --on cpu')


def test_automatic_sites() -> None:
    net = Steered()
    # Of the first block the branch runs twice, so that it is no site.
    assert [end.path for end in block_ends(net, NCHW, on="cpu")] == ["last.branch"]
    found = selab.insert_se(net, "auto", input_nchw=NCHW, reduction=4, on="cpu")
    assert [one.path for one in found] == ["last.branch"]
    assert selab.check_inserted(net, input_nchw=NCHW, inserted=found, on="cpu") == ("last.branch",)


def test_insertion_follows_the_way_of_the_network_without_blocks() -> None:
    net, plain = built(), built()
    x = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(NCHW)
    # Behind a block that halves the stem's output, the last block does not run.
    with torch.no_grad():
        net.threshold = plain.threshold = 0.9 * float(plain.first.branch(plain.first(plain.stem(x))).abs().mean())
    state = {key: value.clone() for key, value in net.state_dict().items()}
    found = selab.insert_se(net, ["stem", "last.branch"], inputs=x, reduction=4, on="cpu", init="identity")
    assert [one.path for one in found] == ["stem", "last.branch"]
    # First images, then channels, height and width of the gated maps.
    assert [(one.channels, one.height, one.width) for one in found] == [(8, 16, 16)] * 2
    assert all(torch.equal(net.state_dict()[key], value) for key, value in state.items())
    with torch.no_grad():
        assert torch.equal(net(x), plain(x))
    assert selab.check_inserted(net, inputs=x, on="cpu") == ("stem", "last.branch")
    assert selab.remove_se(net) == 2
    he = selab.insert_se(net, ["stem", "last.branch"], inputs=x, reduction=4, on="cpu")
    with torch.no_grad():
        for block in (module for module in net.modules() if isinstance(module, selab.SqueezeExcitation)):
            for parameter in block.parameters():
                parameter.zero_()
    assert len(he) == 2
    # The gates are one half now: the network takes another way, and a check on real tensors sees it.
    with pytest.raises(InsertionError, match=r"last\.branch\.se: this SE block ran 0 times"):
        selab.check_inserted(net, inputs=x, on="cpu")


def test_channels_are_found_by_the_real_pass() -> None:
    net = ChannelsLast()
    (one,) = selab.insert_se(net, "norm", input_nchw=NCHW, reduction=4, on="cpu")
    assert (one.channels, one.height, one.width) == (8, 4, 4)


def test_larger_images_keep_their_values() -> None:
    x = torch.rand(1, 3, 4, 6)
    larger: Any = larger_images({"image": x, "ids": torch.arange(4)}, 2, 1, on="cpu")
    assert larger["image"].shape == (1, 3, 8, 6)
    assert set(larger["image"].unique().tolist()) == set(x.unique().tolist())
    assert torch.equal(larger["ids"], torch.arange(4))
    assert larger_images((1, 3, 4, 6), 2, 2, on="cpu") == (1, 3, 8, 12)
    assert larger_images(((1, 3, 4, 6), (1, 5)), 2, 1) == ((1, 3, 8, 6), (1, 5))
    fake: Any = larger_images(x, 2, 2)
    assert fake.is_meta
    assert fake.shape == (1, 3, 8, 12)


def test_fusion_on_real_tensors() -> None:
    x = torch.randn(NCHW)
    net = built()
    selab.insert_se(net, "last.branch", inputs=x, reduction=4, on="cpu")
    with torch.no_grad():
        expected = net(x)
        fusion = selab.fuse(net, inputs=x, on="cpu")
        assert fusion.in_place_reason == ""
        assert [(one.path, one.reason) for one in fusion.blocks] == [("last.branch.se", "")]
        # Fused as a whole, it is traced once more: the modules of the first call must not blur the second.
        again = selab.fuse(net, inputs=x, on="cpu")
        assert (again.norms, again.blocks) == (fusion.norms, fusion.blocks)
        torch.testing.assert_close(net(x), expected)
        torch.testing.assert_close(net(x), expected)


@pytest.mark.parametrize("inputs", [(2, 3, 16, 16), torch.zeros(2, 3, 16, 16)])
def test_real_and_fake_tensors_lead_to_the_same_fusion(inputs: Any) -> None:
    found = []
    for on in ("fake", "cpu"):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        ).eval()
        selab.insert_se(net, ["2", "4"], inputs=inputs, reduction=4, on=on)  # type: ignore[arg-type]
        found.append(str(selab.fuse(net, inputs=inputs, on=on)))  # type: ignore[arg-type]
    assert found[0] == found[1]
    assert "folded" in found[0]


@pytest.mark.parametrize(
    "call",
    [
        lambda net, on: selab.insert_se(net, "stem", input_nchw=NCHW, on=on),
        lambda net, on: selab.check_inserted(net, input_nchw=NCHW, on=on),
        lambda net, on: selab.fuse(net, input_nchw=NCHW, on=on),
        lambda net, on: selab.count(net, NCHW, on=on),
        lambda _net, on: selab.build("se_small_cnn", on=on),
    ],
)
@pytest.mark.parametrize("on", ["meta", "cuda", None, 3])
def test_other_places_are_refused(call: Callable[[nn.Module, Any], Any], on: Any) -> None:
    with pytest.raises(ModelError, match=r"on .*: allowed: fake, cpu"):
        call(built(), on)
