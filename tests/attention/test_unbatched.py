"""Blocks on the feature map of one image, (C, H, W): as on a batch of one; every other shape is refused."""

import copy

import pytest
import torch
from torch import nn

import selab
from selab.attention.base import Attention
from selab.attention.blocks import CBAM, ECA, ESE, SCSE, SSE, CoordinateAttention, GatherExcite
from selab.attention.config import BUILT_IN
from selab.attention.ela import ELA
from selab.attention.gated_site import gated_site
from selab.attention.gather_excite import GETheta, GEThetaPlus
from selab.attention.global_context import GlobalContext
from selab.attention.grn import GRN
from selab.attention.inserted import inserted_blocks
from selab.attention.se import GatedJoin, SqueezeExcitation
from selab.attention.selective_kernel import SelectiveKernel
from selab.attention.simam import SimAM
from selab.attention.triplet import TripletAttention
from selab.errors import InsertionError, ModelError

C, H, W = 8, 5, 6
MAKERS = {
    **{
        f"se {impl}": lambda impl=impl: SqueezeExcitation(C, 4, impl=impl)
        for impl in ("auto", "reference", "torch", "operator")
    },
    "se max": lambda: SqueezeExcitation(C, 4, squeeze="max"),
    "se none": lambda: SqueezeExcitation(C, 4, squeeze="none"),
    "se identity": lambda: SqueezeExcitation(C, 4, init="identity"),
    "eca": lambda: ECA(C),
    "cbam": lambda: CBAM(C, reduction=4),
    "coordinate": lambda: CoordinateAttention(C),
    "scse": lambda: SCSE(C),
    "sse": lambda: SSE(C),
    "gather_excite": lambda: GatherExcite(C),
    "gather_excite 2": lambda: GatherExcite(C, extent=2),
    "ese": lambda: ESE(C),
    "grn": lambda: GRN(C),
    "simam": lambda: SimAM(C),
    "global_context": lambda: GlobalContext(C, reduction=4),
    "triplet": lambda: TripletAttention(C),
    "ela": lambda: ELA(C),
    "ge_theta": lambda: GETheta(C),
    "ge_theta 2": lambda: GETheta(C, extent=2),
    "ge_theta_plus": lambda: GEThetaPlus(C, reduction=4),
    "sk": lambda: SelectiveKernel(C),
    "sk 3": lambda: SelectiveKernel(C, branches=3, groups=2),
}
OTHER_WIDTHS = [(1, C - 1, H, W), (2, C + 1, H, W), (C, 1, H, W), (1, H, W, C), (2, 2 * C, H, W)]
ALL = pytest.mark.parametrize("name", list(MAKERS))


def made(name):
    torch.manual_seed(0)
    block = MAKERS[name]().eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.5)
    return block


def image(*size, seed=1):
    return torch.randn(size or (C, H, W), generator=torch.Generator().manual_seed(seed))


def test_every_block_is_tried():
    assert {name.split()[0] for name in MAKERS} == BUILT_IN


@ALL
@pytest.mark.parametrize("size", [(C, H, W), (C, C, C), (C, 1, 1)])
def test_one_image_is_gated_as_a_batch_of_one(name, size):
    block, x = made(name), image(*size)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            out = block(x)
            assert out.shape == x.shape
            torch.testing.assert_close(out, block(x[None])[0], rtol=0, atol=0)
            # Also where the call for a batch of one is cached.
            torch.testing.assert_close(block(x), out, rtol=0, atol=0)


@ALL
def test_gradients_of_one_image(name):
    block = made(name).double()
    grads = []
    for batched in (False, True):
        x = image().double().requires_grad_()
        out = block(x[None])[0] if batched else block(x)
        out.square().sum().backward()
        grads.append([x.grad, *(p.grad for p in block.parameters())])
        block.zero_grad()
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


@ALL
def test_the_input_is_kept(name):
    block, x = made(name), image()
    before = x.clone()
    with torch.no_grad():
        block(x)
    assert torch.equal(x, before)


@ALL
@pytest.mark.parametrize("size", [(C,), (H, W), (C + 1, H, W), (2, C, 3, H, W), (C, C, C, C, C), (), *OTHER_WIDTHS])
def test_other_shapes_are_refused_in_one_line(name, size):
    """Many of them would be gated by means over the wrong dimensions."""
    block, x = made(name), torch.ones(size)
    with pytest.raises(ModelError, match=r"expected a feature map \(N, 8, H, W\) or \(8, H, W\)") as raised:
        block(x)
    assert str(list(size)) in str(raised.value)
    assert "\n" not in str(raised.value)


@ALL
@pytest.mark.parametrize("size", OTHER_WIDTHS)
def test_another_width_is_refused_however_the_block_is_called(name, size):
    """Where no layer depends on the width, the block would gate such a feature map."""
    block, x = made(name), torch.ones(size)
    ways = {
        "training": lambda: made(name).train()(x),
        "inference": lambda: torch.inference_mode()(made(name))(x),
        "after a right one": lambda: (block(image()[None]), block(image()[None]), block(x)),
        "join": lambda: GatedJoin(Add(), made(name), "branch")(x, x),
        "output of a join": lambda: GatedJoin(Add(), made(name), "output")(x, x),
    }
    for way, call in ways.items():
        with pytest.raises(ModelError, match=r"expected a feature map \(N, 8, H, W\)"):
            pytest.fail(f"{way}: {call()}")
    with pytest.raises(torch.jit.Error, match=r"expected a feature map \(N, 8, H, W\)"):
        torch.jit.script(block)(x)


@pytest.mark.parametrize("name", ["eca", "gather_excite", "ese", "se auto"])
def test_another_width_is_refused_by_a_fused_block(name):
    network = nn.Sequential(nn.Identity(), made(name), nn.ReLU()).eval()
    selab.fuse(network, input_nchw=(1, C, H, W))
    with torch.no_grad():
        assert network(image()[None]).shape == (1, C, H, W)
        for size in OTHER_WIDTHS:
            with pytest.raises(ModelError, match=r"expected a feature map \(N, 8, H, W\)"):
                network(torch.ones(size))


def test_a_block_whose_channels_were_pruned():
    """What removes whole channels gives the layers another width, and does not know the block's own attribute."""
    block, x = made("se auto"), image(2, C - 2, H, W)
    block.fc1, block.fc2 = nn.Linear(C - 2, 2), nn.Linear(2, C - 2)
    with torch.no_grad():
        gate = block.fc2(block.fc1(x.mean((2, 3))).relu()).sigmoid()
        torch.testing.assert_close(block(x), x * gate[:, :, None, None])


@pytest.mark.filterwarnings("error", "ignore:.*torch.jit.trace.* is deprecated")
def test_a_trace_does_not_warn_about_the_width():
    for name in ("se auto", "eca"):
        block, x = made(name), image(1, C, H, W)
        torch.testing.assert_close(torch.jit.trace(block, x)(x), block(x))


@ALL
def test_as_vmap_script_trace_and_fx_call_it(name):
    block, x = made(name), image(3, C, H, W)
    with torch.no_grad():
        expected = block(x)
        near = {"rtol": 1e-5, "atol": 1e-6}
        # An implementation that is asked for by name is refused where the operations are traced.
        by_name = name in ("se torch", "se operator")
        if not by_name:
            torch.testing.assert_close(torch.func.vmap(block)(x), expected, **near)
        scripted = torch.jit.script(block)
        torch.testing.assert_close(scripted(x), expected, **near)
        torch.testing.assert_close(scripted(x[0]), expected[0], **near)
        if not by_name:
            torch.testing.assert_close(torch.fx.symbolic_trace(block)(x), expected, **near)


@pytest.mark.parametrize("name", ["se auto", "eca", "cbam", "gather_excite 2"])
def test_compiled_whole(name):
    torch._dynamo.reset()
    block, x = made(name), image()
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), block(x))
    torch.testing.assert_close(compiled(x[None]), block(x[None]))


def test_runtime_names_the_implementation_of_a_batch_of_one():
    block = made("se auto")
    assert block.runtime(image()) == block.runtime(image(1, C, H, W))


class Add(nn.Module):
    formula = "relu(branch + shortcut)"

    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, branch, shortcut):
        return self.relu(branch + shortcut)


@pytest.mark.parametrize("edge", ["branch", "shortcut", "output"])
@pytest.mark.parametrize("name", ["se auto", "se torch", "eca"])
def test_joins(name, edge):
    join = GatedJoin(Add(), made(name), edge)
    branch, shortcut = image(), image(seed=2)
    with torch.no_grad():
        torch.testing.assert_close(join(branch, shortcut), join(branch[None], shortcut[None])[0])


def test_a_site_with_channels_last():
    """(H, W, C) of one image."""
    norm = nn.LayerNorm(C)
    site = gated_site(norm, made("se auto"), "output", one_tensor=True, channels_last=True)
    x = image(2, H, W, C)
    out = site(x)
    torch.testing.assert_close(out, site.se(norm(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    torch.testing.assert_close(site(x[0]), out[0])


@pytest.mark.parametrize("block", sorted(BUILT_IN))
def test_a_network_with_blocks_takes_one_image(block):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(inplace=True), nn.Conv2d(16, 16, 3), nn.AdaptiveAvgPool2d(1)
    ).eval()
    selab.insert_se(
        net, ["1", "2"], input_nchw=(1, 3, 9, 9), block=block, **({"reduction": 4} if block == "se" else {})
    )
    x = image(3, 9, 9)
    with torch.no_grad():
        expected = net(x[None])[0]
        torch.testing.assert_close(net(x), expected)
        selab.fuse(net, input_nchw=(1, 3, 9, 9))
        for _ in range(2):
            torch.testing.assert_close(net(x), expected)
            torch.testing.assert_close(net(x[None])[0], expected)


def test_a_block_of_your_own_decides_itself():
    class Own(Attention):
        def macs(self, height, width):
            return 0

        def forward(self, x):
            return x + x.dim()

    assert torch.equal(Own(C)(torch.zeros(C, 2)), torch.full((C, 2), 2.0))


# ---------------------------------------------------------------------- networks that take one image, (C, H, W)
class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.c1, self.relu, self.c2 = nn.Conv2d(3, C, 3, padding=1), nn.ReLU(), nn.Conv2d(C, C, 3, padding=1, stride=2)

    def forward(self, x):
        return self.c2(self.relu(self.c1(x)))


class Added(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, C, 3), nn.Sequential(nn.ReLU(), nn.Conv2d(C, C, 3, padding=1))

    def forward(self, x):
        x = self.stem(x)
        return x + self.body(x)


class Classified(nn.Module):
    """Takes one size of image only."""

    def __init__(self):
        super().__init__()
        self.features, self.fc = Plain(), nn.Linear(C * 10 * 14, 5)

    def forward(self, x):
        return self.fc(self.features(x).flatten())


def gated_by_hand(model, site, block, x):
    """Run a network without blocks and gate the output of a site as the definition says."""

    def gate(_module, _args, out):
        s = block.fc2(block.fc1(out.mean((1, 2))[None]).relu()).sigmoid()[0]
        return out * s[:, None, None]

    handle = model.get_submodule(site).register_forward_hook(gate)
    out = model(x)
    handle.remove()
    return out


@pytest.mark.parametrize(
    ("kind", "site", "size"),
    [
        (Plain, "c1", (C, 20, 28)),
        (Plain, "relu", (C, 20, 28)),
        (Plain, "c2", (C, 10, 14)),
        (Added, "body", (C, 18, 26)),
        (Added, "body.0", (C, 18, 26)),
        (Classified, "features.c1", (C, 20, 28)),
        (Classified, "features.relu", (C, 20, 28)),
        (Classified, "features", (C, 10, 14)),
    ],
)
@pytest.mark.parametrize("given", ["a tensor", "keywords", "a shape"])
@pytest.mark.parametrize("on", ["fake", "cpu"])
@torch.no_grad
def test_a_site_of_a_network_that_takes_one_image(kind, site, size, given, on):
    x = torch.randn(3, 20, 28)
    example = {"a tensor": {"inputs": x}, "keywords": {"inputs": {"x": x}}, "a shape": {"input_nchw": (3, 20, 28)}}[
        given
    ]
    model = kind().eval()
    plain = copy.deepcopy(model)
    (one,) = selab.insert_se(model, site, reduction=4, on=on, **example)
    assert (one.path, one.channels, one.height, one.width) == (site, *size)
    ((_, block),) = inserted_blocks(model).values()
    torch.testing.assert_close(model(x), gated_by_hand(plain, site, block, x))
    assert selab.check_inserted(model, inserted=[site], on=on, **example) == (site,)
    expected = selab.count(plain, x).macs.all + one.macs
    assert selab.count(model, x).macs.all == expected
    selab.remove_se(model)
    assert torch.equal(model(x), plain(x))


@torch.no_grad
def test_automatic_sites_of_a_network_that_takes_one_image():
    x, model = torch.randn(3, 20, 28), Added().eval()
    found = selab.insert_se(model, "auto", inputs=x, reduction=4)
    batched = selab.insert_se(Added().eval(), "auto", inputs=x[None], reduction=4)
    assert [one.path for one in found] == [one.path for one in batched] == ["body"]
    assert model(x).shape == (C, 18, 26)


class Tokens(nn.Module):
    def __init__(self, images):
        super().__init__()
        self.images, self.conv, self.fc = images, nn.Conv2d(16, 16, 1), nn.Linear(16, 16)

    def forward(self, x):
        return self.fc(self.conv(x).flatten(2).transpose(1, 2) if self.images else x)


@pytest.mark.parametrize("images", [True, False])
def test_tokens_are_no_image(images):
    x = torch.randn(2, 16, 4, 4) if images else torch.randn(2, 6, 16)
    with pytest.raises(
        InsertionError, match=r"fc: its output is a tensor of shape \(2, \d+, 16\); SE needs \(N, C, H, W\)"
    ):
        selab.insert_se(Tokens(images), "fc", inputs=x, reduction=4)


def test_attention_scores_are_no_image():
    class Scores(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.soft = nn.Conv2d(3, C, 1), nn.Softmax(2)

        def forward(self, x):
            y = self.conv(x).flatten(1)
            return self.soft(y[:, :, None] * y[:, None, :])

    with pytest.raises(InsertionError, match=r"SE needs .* with a height and width that follow the input's"):
        selab.insert_se(Scores(), "soft", inputs=torch.randn(3, 4, 5), reduction=4)
