"""Kinds of block ends: spellings of residual additions, merged sums, concatenations, stages, and what is no image."""

import functools
import operator

import pytest
import torch
import torch.nn.functional as F
from site_networks import NCHW, conv, found, left_out, network, normed
from torch import nn

from selab.attention.auto_sites import block_ends
from selab.errors import InsertionError


class Block(nn.Module):
    """A branch `f` (convolution and BatchNorm), joined with its input by `way(self, x)`."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.conv, self.bn = conv(), nn.BatchNorm2d(8)
        self.mix = conv(16, 1, out=8)
        self.valid, self.wide = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, padding=2)
        self.gamma = nn.Parameter(torch.ones(8, 1, 1))
        self.weights = nn.Parameter(torch.ones(2))
        self.drop = nn.Dropout(0.1)
        self.register_buffer("space", torch.zeros(1, 8, 16, 16))

    def f(self, x):
        return self.bn(self.conv(x))

    def forward(self, x):
        return self.way(self, x)


RESIDUAL = {
    "f + x": lambda s, x: s.f(x) + x,
    "torch.add, alpha": lambda s, x: torch.add(x, s.f(x), alpha=0.5),
    "torch.add, out": lambda s, x: torch.add(x, s.f(x), out=torch.empty_like(x)),
    "torch.add, out of a buffer": lambda s, x: torch.add(x, s.f(x), out=s.space),
    "add_ to x": lambda s, x: x.add_(s.f(x)),
    "iadd": lambda s, x: operator.iadd(x, s.f(x)),
    "assignment of all": lambda s, x: x.copy_(x + s.f(x)),
    "x - f": lambda s, x: x - s.f(x),
    "x - (-f)": lambda s, x: x - (-s.f(x)),
    "f - (-x)": lambda s, x: s.f(x) - (-x),
    "sub_": lambda s, x: x.sub_(s.f(x)),
    "rsub": lambda s, x: torch.rsub(s.f(x), x),
    "lerp": lambda s, x: torch.lerp(x, s.f(x), 0.5),
    "lerp by a tensor": lambda s, x: torch.lerp(x, s.f(x), s.gamma),
    "lerp_": lambda s, x: x.lerp_(s.f(x), 0.5),
    "addcmul": lambda s, x: torch.addcmul(x, s.gamma, s.f(x)),
    "addcmul_": lambda s, x: x.addcmul_(s.f(x), s.gamma, value=0.5),
    "addcmul of the shortcut": lambda s, x: torch.addcmul(s.f(x), s.gamma, x),
    "addcdiv": lambda s, x: torch.addcdiv(x, s.f(x), s.gamma),
    "layer scale": lambda s, x: x + s.gamma * s.f(x),
    "sum of a list": lambda s, x: sum([x, s.f(x)]),
    "reduce": lambda s, x: functools.reduce(operator.add, [x, s.f(x)]),
    "stack and sum": lambda s, x: torch.stack([x, s.f(x)]).sum(0),
    "stack and mean": lambda s, x: torch.stack([x, s.f(x)]).mean(dim=0),
    "stack at the end": lambda s, x: torch.stack([s.f(x), x], -1).sum(-1),
    "weighted stack": lambda s, x: (torch.stack([x, s.f(x)]) * s.weights.view(2, 1, 1, 1, 1)).sum(0),
    "concatenated and summed": lambda s, x: torch.cat([x[None], s.f(x)[None]]).sum(0),
    "another share of x": lambda s, x: x + s.f(F.relu(x)) + 0.1 * x,
    "another precision": lambda s, x: (x.double() + s.f(x).double()).float(),
}


class TestSpellings:
    @pytest.mark.parametrize("way", RESIDUAL)
    def test_the_end_of_the_branch_is_found(self, way):
        assert found(network(Block(RESIDUAL[way]))) == [("1.bn", "residual")]

    @pytest.mark.parametrize(
        ("way", "path"),
        [
            (lambda s, x: x + s.drop(s.f(x)), "1.bn"),
            (lambda s, x: x[:, :, 1:-1, 1:-1] + s.valid(x), "1.valid"),
            (lambda s, x: x + s.wide(x)[:, :, 1:-1, 1:-1], "1.wide"),
            (lambda s, x: x + F.pad(s.wide(x), (-1, -1, -1, -1)), "1.wide"),
            (lambda s, x: x + F.pad(s.valid(x), (1, 1, 1, 1)), "1.valid"),
        ],
    )
    def test_dropout_crops_and_padding(self, way, path):
        assert found(network(Block(way))) == [(path, "residual")]

    @pytest.mark.parametrize(
        ("way", "reason"),
        [
            (lambda s, x: torch.maximum(x, s.f(x)), "`maximum` is neither an addition nor a concatenation"),
            (lambda s, x: torch.stack([x, s.f(x)]).amax(0), "`stack` is neither"),
            (lambda s, x: torch.einsum("nbchw,n->bchw", torch.stack([x, s.f(x)]), s.weights), "`stack` is neither"),
            (lambda s, x: torch.cat([x, s.f(x)]).view(2, *x.shape).sum(0), "`cat` along dimension 0 is neither"),
            (lambda s, x: torch._foreach_add([x], [s.f(x)])[0], "`_foreach_add` is neither"),
            (lambda s, x: x + torch.einsum("bchw,c->bchw", s.f(x), s.gamma[:, 0, 0]), "no single module to attach to"),
            (lambda s, x: x + F.conv2d(x, s.conv.weight, padding=1), "no single module to attach to"),
            (lambda s, x: (x.flatten(2) + s.f(x).flatten(2)).view_as(x), "its tensors are 1×8×256, not feature maps"),
        ],
    )
    def test_what_is_not_found_is_left_out_with_a_reason(self, way, reason):
        model = network(Block(way))
        assert found(model) == []
        assert reason in left_out(model)
        with pytest.raises(InsertionError, match="tracing finds no block end"):
            block_ends(model, NCHW)


class TestTokens:
    @pytest.mark.parametrize(
        ("tokens", "shape"),
        [
            (lambda x: x.flatten(2).transpose(1, 2), "1×256×8"),
            (lambda x: x.permute(0, 2, 3, 1), "1×16×16×8"),
            # Four patches of 64 pixels.
            (lambda x: x.permute(0, 2, 3, 1).reshape(1, 4, 64, 8), "1×4×64×8"),
        ],
    )
    def test_additions_of_tokens_are_named(self, tokens, shape):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.patches = conv(3, out=8)
                self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

            def forward(self, x):
                x = tokens(self.patches(x))
                x = x + self.first(x)
                return x + self.second(x)

        assert found(Net()) == []
        assert left_out(Net()) == f"the addition in the network and 1 more: its tensors are {shape}, not feature maps"

    def test_they_are_named_beside_other_reasons(self):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.patches, self.position, self.linear = conv(3, out=8), conv(groups=8), nn.Linear(8, 8)

            def forward(self, x):
                x = self.patches(x)
                x = (x + self.position(x)).flatten(2).transpose(1, 2)
                return x + self.linear(x)

        assert found(Net()) == []
        assert "a positional encoding" in left_out(Net())
        assert "the addition in the network: its tensors are 1×256×8, not feature maps" in left_out(Net())


class Parallel(nn.Module):
    """torch.cat of branches, and what `after` makes of it."""

    def __init__(self, *branches, after=None):
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.after = after or nn.Identity()

    def forward(self, x):
        return self.after(torch.cat([branch(x) for branch in self.branches], 1))


class DenseLayer(nn.Module):
    def __init__(self, channels, growth=4):
        super().__init__()
        self.conv = conv(channels, out=growth)

    def forward(self, x):
        return torch.cat([x, self.conv(F.relu(x))], 1)


class DenseBlock(nn.Module):
    """A list that grows, concatenated before each layer, as torchvision has it."""

    def __init__(self, channels=8, growth=4, depth=3):
        super().__init__()
        self.layers = nn.ModuleList(conv(channels + growth * i, out=growth) for i in range(depth))

    def forward(self, x):
        features = [x]
        for layer in self.layers:
            features.append(layer(F.relu(torch.cat(features, 1))))
        return torch.cat(features, 1)


class Shuffled(nn.Module):
    """ShuffleNetV2's basic block: half of the channels pass, and the groups are interleaved (arXiv 1807.11164)."""

    def __init__(self):
        super().__init__()
        self.branch = nn.Sequential(conv(4, 1), nn.ReLU(), normed(4, groups=4), conv(4, 1), nn.ReLU())

    def forward(self, x):
        kept, changed = x.chunk(2, 1)
        n, c, h, w = x.shape
        return torch.cat((kept, self.branch(changed)), 1).view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class TestConcatenations:
    def test_after_the_concatenation(self):
        """As in SE-Inception (arXiv 1709.01507, Fig. 2): the block's output."""
        nested = Parallel(conv(out=4), Parallel(conv(out=2), conv(out=2)))
        model = network(Parallel(conv(out=4), nn.Sequential(conv(), nn.ReLU(), conv(out=4))), nested)
        assert found(model) == [("1", "concatenation"), ("2", "concatenation")]
        assert block_ends(model, NCHW)[0].reason == "after the concatenation in 1"

    def test_after_the_pointwise_convolution_of_the_block(self):
        """VoVNet's one-shot aggregation, arXiv 1904.09730, Fig. 3."""
        model = network(Parallel(conv(), nn.Sequential(conv(), nn.ReLU()), after=normed(16, 1, out=8)))
        assert found(model) == [("1", "concatenation")]

    def test_the_squeeze_of_the_next_block_is_not_part_of_it(self):
        fires = [nn.Sequential(conv(8, 1), nn.ReLU(), Parallel(conv(8, 1, out=4), conv(out=4))) for _ in range(2)]
        assert found(network(*fires)) == [("1.2", "concatenation"), ("2.2", "concatenation")]

    def test_the_ends_of_dense_blocks(self):
        model = network(DenseBlock(), conv(20, 1, out=8), DenseBlock(), out=20)
        assert found(model) == [("1", "concatenation"), ("3", "concatenation")]
        layers = [nn.Sequential(*(DenseLayer(8 + 4 * i) for i in range(3))) for _ in range(2)]
        model = network(layers[0], conv(20, 1, out=8), layers[1], out=20)
        assert found(model) == [("1", "concatenation"), ("3", "concatenation")]

    def test_after_the_shuffle(self):
        model = network(Shuffled(), Shuffled())
        assert found(model) == [("1", "concatenation"), ("2", "concatenation")]
        assert "its feature map is concatenated with others" in left_out(model)

    def test_blocks_of_one_class_with_and_without_a_shortcut(self):
        class Osa(Parallel):
            def __init__(self, shortcut):
                super().__init__(conv(), conv(), after=conv(16, 1, out=8))
                self.shortcut = shortcut

            def forward(self, x):
                y = super().forward(x)
                return x + y if self.shortcut else y

        model = network(Osa(False), Osa(True), Parallel(conv(out=4), conv(out=4)))
        assert found(model) == [("1", "concatenation"), ("2.after", "residual")]

    def test_additions_of_a_concatenating_cell_are_not_blocks(self):
        """NASNet's cells: sums of two branches each, concatenated (arXiv 1707.07012, Fig. 4)."""

        class Cell(nn.Module):
            def __init__(self):
                super().__init__()
                self.one, self.two, self.three = conv(out=4), nn.Sequential(conv(), conv(out=4)), conv(out=4)

            def forward(self, x):
                return torch.cat([self.one(x) + self.two(x), self.three(x)], 1)

        assert found(network(Cell(), Cell())) == [("1", "concatenation"), ("2", "concatenation")]

    def test_a_decoder_is_no_block(self):
        class UNet(nn.Module):
            def __init__(self):
                super().__init__()
                self.down, self.deep, self.up = conv(3, out=8), conv(), conv(16, out=8)

            def forward(self, x):
                y = self.down(x)
                z = F.interpolate(self.deep(F.max_pool2d(y, 2)), scale_factor=2.0)
                return self.up(torch.cat([y, z], 1))

        assert found(UNet()) == []
        assert "different resolutions" in left_out(UNet())

    @pytest.mark.parametrize("transposed", [True, False])
    def test_the_levels_of_a_decoder_are_named(self, transposed):
        def double(channels, out):
            return nn.Sequential(
                *(conv(channels, out=out), nn.BatchNorm2d(out), nn.ReLU(), conv(out), nn.BatchNorm2d(out), nn.ReLU())
            )

        def up(channels, out):
            if transposed:
                return nn.ConvTranspose2d(channels, out, 2, 2)
            return nn.Sequential(nn.Upsample(scale_factor=2), conv(channels, 1, out=out))

        class UNet(nn.Module):
            """arXiv 1505.04597, Fig. 1, with three levels."""

            def __init__(self):
                super().__init__()
                self.pool = nn.MaxPool2d(2)
                self.e1, self.e2, self.e3 = double(3, 4), double(4, 8), double(8, 16)
                self.u2, self.d2, self.u1, self.d1 = up(16, 8), double(16, 8), up(8, 4), double(8, 4)
                self.out = conv(4, 1, out=2)

            def forward(self, x):
                a = self.e1(x)
                b = self.e2(self.pool(a))
                y = self.d2(torch.cat([self.u2(self.e3(self.pool(b))), b], 1))
                return self.out(self.d1(torch.cat([self.u1(y), a], 1)))

        text = left_out(UNet())
        assert found(UNet()) == []
        assert "one of its feature maps was upsampled" in text
        assert "e1, e2, e3, d2, d1: the last layers of the levels of an encoder and decoder" in text


class Recurrent(nn.Module):
    """Convolutions, then the rows of their feature map as steps."""

    def __init__(self, *head):
        super().__init__()
        self.f = nn.Sequential(normed(3, out=8), nn.ReLU(), nn.MaxPool2d(2), normed(), nn.ReLU())
        self.head = nn.ModuleList(head)

    def forward(self, x):
        x = self.f(x).mean(2).transpose(1, 2)
        for layer in self.head:
            x = layer(x)
            x = x[0] if isinstance(x, tuple) else x
        return x


class Both(nn.Module):
    """The sum, or the concatenation, of two recurrent layers."""

    def __init__(self, cat):
        super().__init__()
        self.one, self.two, self.cat = nn.GRU(8, 4, batch_first=True), nn.GRU(8, 4, batch_first=True), cat

    def forward(self, x):
        one, two = self.one(x)[0], self.two(x.flip(1))[0].flip(1)
        return torch.cat([one, two], 2) if self.cat else one + two


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(8, 8, batch_first=True)

    def forward(self, x):
        return x + self.rnn(x)[0]


class TestStages:
    @pytest.mark.parametrize(
        "head",
        [
            lambda: [nn.LSTM(8, 5, batch_first=True, bidirectional=True)],
            lambda: [nn.GRU(8, 5, batch_first=True, bidirectional=True, num_layers=2)],
            lambda: [nn.RNN(8, 5, bidirectional=True)],
            lambda: [nn.LSTM(8, 5, batch_first=True), nn.LSTM(5, 3, batch_first=True, bidirectional=True)],
            lambda: [nn.LSTM(8, 5, batch_first=True)],
            lambda: [Both(cat=True)],
            lambda: [Both(cat=False), nn.Linear(4, 2)],
        ],
    )
    def test_before_recurrent_layers(self, head):
        """Their own concatenations and sums join no feature maps."""
        assert found(Recurrent(*head()).eval()) == [("f.1", "stage"), ("f.4", "stage")]

    @pytest.mark.parametrize("head", [Residual, lambda: nn.TransformerEncoderLayer(8, 2, batch_first=True)])
    def test_not_where_tokens_are_added(self, head):
        assert found(Recurrent(head()).eval()) == []
        assert "not feature maps" in left_out(Recurrent(head()).eval())
        assert "|" not in left_out(Recurrent(head()).eval())

    def test_what_makes_a_network_not_plain_is_named(self):
        class Pyramid(nn.Module):
            """Poolings of several sizes, concatenated (arXiv 1406.4729)."""

            def forward(self, x):
                return torch.cat([x, F.max_pool2d(x, 3, 1, 1), F.max_pool2d(x, 5, 1, 2)], 1)

        model = network(nn.ReLU(), conv(), Pyramid(), out=24)
        assert found(model) == []
        assert left_out(model) == "`cat` in 3: it joins several tensors, so the network is no plain sequence of stages"
        with pytest.raises(InsertionError, match=r"no plain sequence of stages\); name modules"):
            block_ends(model, NCHW)

    def test_a_site_holds_no_earlier_stage(self):
        def layer(channels=8):
            return nn.Sequential(normed(channels, out=8), nn.ReLU())

        assert found(nn.Sequential(layer(3), nn.MaxPool2d(2), layer())) == [("0", "stage"), ("2", "stage")]
        parts = nn.Sequential(layer(3), nn.MaxPool2d(2), layer()), nn.Sequential(nn.MaxPool2d(2), layer())
        model = nn.Sequential(*parts)
        assert found(model) == [("0.0", "stage"), ("0.2", "stage"), ("1", "stage")]
        # One stage alone is the whole of its sequence.
        assert found(nn.Sequential(nn.Sequential(layer(3), layer()), nn.MaxPool2d(2))) == [("0", "stage")]

    def test_the_last_layer_before_each_pooling(self):
        model = nn.Sequential(
            *(conv(3, out=8), nn.BatchNorm2d(8), nn.ReLU(True), conv(), nn.ReLU(True), nn.MaxPool2d(2)),
            *(conv(), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(2)),
            *(nn.Flatten(), nn.Linear(128, 4)),
        )
        assert found(model) == [("4", "stage"), ("8", "stage")]

    def test_the_last_layer_before_a_stride(self):
        model = network(nn.ReLU(), conv(stride=2), nn.ReLU(), conv(), nn.ReLU())
        assert found(model) == [("1", "stage"), ("5", "stage")]

    def test_scores_of_classes_are_not_gated(self):
        model = nn.Sequential(conv(3, out=8), nn.ReLU(), conv(), nn.ReLU(), conv(8, 1, out=4), nn.AdaptiveAvgPool2d(1))
        assert found(model) == [("3", "stage")]

    def test_not_with_other_blocks(self):
        assert found(network(Block(RESIDUAL["x - f"]), nn.MaxPool2d(2), conv())) == [("1.bn", "residual")]


class Unfolded(nn.Module):
    """Attention over patches of 2×2 pixels: (N, C, 4, H·W / 4), as MobileViTv2 has it."""

    def __init__(self):
        super().__init__()
        self.local, self.mix = conv(groups=8), conv(kernel_size=1)

    def forward(self, x):
        n, c, h, w = x.shape
        x = self.local(x).view(n, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(n, c, 4, h * w // 4)
        x = x + self.mix(x)
        return x.view(n, c, 2, 2, h // 2, w // 2).permute(0, 1, 4, 2, 5, 3).reshape(n, c, h, w)


class AttentionMaps(nn.Module):
    """Scores (N, heads, L, L) with a convolution over heads, added to what it reads."""

    def __init__(self):
        super().__init__()
        self.heads = conv(2, 3)

    def forward(self, x):
        q = x.flatten(2).view(x.shape[0], 2, 4, -1)
        scores = q.transpose(-1, -2) @ q
        scores = scores + self.heads(scores)
        return (q @ scores.softmax(-1)).reshape(x.shape)


class Windows(nn.Module):
    """A residual convolution on windows of 4×4 pixels: (N·windows, C, 4, 4)."""

    def __init__(self):
        super().__init__()
        self.conv = conv()

    def forward(self, x):
        n, c, h, w = x.shape
        x = x.view(n, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 1, 3, 5).reshape(-1, c, 4, 4)
        x = x + F.relu(self.conv(x))
        return x.view(n, h // 4, w // 4, c, 4, 4).permute(0, 3, 1, 4, 2, 5).reshape(n, c, h, w)


class Positional(nn.Module):
    """x + depthwise(x): a positional encoding, arXiv 2102.10882, Sec. 3.2."""

    def __init__(self):
        super().__init__()
        self.proj = conv(groups=8)

    def forward(self, x):
        return x + self.proj(x)


class TestImages:
    @pytest.mark.parametrize(
        ("block", "reason"),
        [
            (Unfolded, "its feature maps are not (N, C, H, W)"),
            (AttentionMaps, "256×256"),
            (Windows, "its feature maps are not (N, C, H, W)"),
            (Positional, "a positional encoding"),
        ],
    )
    def test_other_tensors_of_four_dimensions_are_left_out(self, block, reason):
        model = network(Block(RESIDUAL["f + x"]), block())
        assert found(model) == [("1.bn", "residual")]
        assert reason in left_out(model)

    def test_a_map_that_was_a_sequence_in_between(self):
        class Tokens(nn.Module):
            def __init__(self):
                super().__init__()
                self.local, self.fc = conv(), nn.Linear(8, 8)

            def forward(self, x):
                y = self.fc(F.gelu(self.local(x)).flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)
                return x + F.relu(self.keep(y))

            def keep(self, y):
                return y

        model = network(Tokens(), Block(RESIDUAL["f + x"]))
        assert ("2.bn", "residual") in found(model)

    def test_additions_across_resolutions_are_left_out(self):
        """HRNet's fusion, arXiv 1908.07919, Fig. 3."""

        class Fusion(nn.Module):
            def __init__(self):
                super().__init__()
                self.high = nn.Sequential(conv(), nn.ReLU(), conv(), nn.ReLU(), conv())
                self.low = nn.Sequential(conv(stride=2), nn.ReLU(), *(conv() for _ in range(4)))
                self.up = nn.Sequential(conv(kernel_size=1), nn.Upsample(scale_factor=2))

            def forward(self, x):
                return self.high(x) + self.up(self.low(x))

        model = network(Fusion(), Block(RESIDUAL["f + x"]))
        assert found(model) == [("2.bn", "residual")]
        assert "different resolutions" in left_out(model)

    def test_the_levels_of_a_context_are_no_blocks(self):
        """FocalNet's: levels are summed inside a module that goes on with other layers (arXiv 2203.11926)."""

        class Context(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second, self.last = conv(), conv(), conv(kernel_size=1)

            def forward(self, x):
                y = F.gelu(self.first(x))
                return self.last(y + F.gelu(self.second(y)))

        class Outer(nn.Module):
            def __init__(self):
                super().__init__()
                self.context = Context()

            def forward(self, x):
                return x + self.context(x)

        assert found(network(Outer())) == [("1.context", "residual")]


class TestSeparable:
    def test_the_expansion_of_an_inverted_block_is_no_end(self):
        """MobileNetV4's universal inverted bottleneck, arXiv 2404.10518, Fig. 4."""

        class Inverted(nn.Module):
            def __init__(self):
                super().__init__()
                self.start, self.expand = normed(groups=8), nn.Sequential(normed(8, 1, out=32), nn.ReLU())
                self.middle, self.project = nn.Sequential(normed(32, groups=32), nn.ReLU()), normed(32, 1, out=8)

            def forward(self, x):
                return self.project(self.middle(self.expand(self.start(x))))

        assert found(network(Inverted())) == [("1.project", "depthwise-separable")]

    def test_convolutions_of_several_sizes(self):
        """MixNet's: each part of the channels has a kernel of its own, arXiv 1907.09595, Fig. 2."""

        class Mixed(nn.Module):
            def __init__(self):
                super().__init__()
                self.parts = nn.ModuleList([conv(4, 3, 4), conv(4, 5, 4)])
                self.project = conv(8, 1)

            def forward(self, x):
                y = torch.cat([part(one) for part, one in zip(self.parts, x.split(4, 1), strict=True)], 1)
                return self.project(F.relu(y))

        assert found(network(Mixed(), Mixed())) == [
            ("1.project", "depthwise-separable"),
            ("2.project", "depthwise-separable"),
        ]

    def test_blocks_of_concatenating_blocks(self):
        """VoVNet with depthwise convolutions, arXiv 1911.06667: the stem's block does not stand for those."""

        class Separable(nn.Sequential):
            def __init__(self):
                super().__init__(conv(groups=8), conv(kernel_size=1), nn.BatchNorm2d(8), nn.ReLU())

        class Aggregation(nn.Module):
            def __init__(self):
                super().__init__()
                self.layers, self.mix = nn.ModuleList([Separable(), Separable()]), conv(24, 1, out=8)

            def forward(self, x):
                maps = [x]
                for layer in self.layers:
                    maps.append(layer(maps[-1]))
                return self.mix(torch.cat(maps, 1))

        stem = (Separable(), conv(), Separable())
        aggregations = [("4", "concatenation"), ("5", "concatenation")]
        alone, whole = network(*stem), network(*stem[:2], nn.ReLU(), Aggregation(), Aggregation())
        assert found(alone) == [("1.3", "depthwise-separable"), ("3.3", "depthwise-separable")]
        assert found(whole) == [("1.3", "depthwise-separable"), *aggregations]

        class Appending(nn.Sequential):
            """timm's spelling: a sequence with a forward of its own concatenates."""

            def forward(self, x):
                maps = [x]
                for layer in self:
                    maps.append(layer(maps[-1]))
                return torch.cat(maps, 1)

        spelled = [nn.Sequential(Appending(Separable(), Separable()), conv(24, 1, out=8)) for _ in range(2)]
        found_there = found(network(*stem[:2], nn.ReLU(), *spelled))
        assert [kind for _, kind in found_there] == ["depthwise-separable", "concatenation", "concatenation"]
        # One concatenation among many separable blocks is not what they are parts of.
        many = network(*(Separable() for _ in range(5)), Aggregation())
        assert found(many) == [(f"{place}.3", "depthwise-separable") for place in range(1, 6)]

    def test_a_map_of_weights_is_no_end(self):
        """Global context, arXiv 1904.11492: a convolution to one channel makes the weights of the positions."""

        class Context(nn.Module):
            def __init__(self):
                super().__init__()
                self.depthwise, self.weigh, self.project = (
                    conv(groups=8),
                    conv(kernel_size=1, out=1),
                    conv(kernel_size=1),
                )

            def forward(self, x):
                x = self.depthwise(x)
                weights = self.weigh(x).flatten(2).softmax(-1)
                context = (x.flatten(2) * weights).sum(-1)[:, :, None, None]
                return self.project(x * context.sigmoid())

        model = network(Context(), Context())
        assert found(model) == [("1.project", "depthwise-separable"), ("2.project", "depthwise-separable")]
        assert "its output has one channel (a mask or an attention map)" in left_out(model)

    def test_a_norm_with_the_channels_at_the_end(self):
        class LayerNorm(nn.LayerNorm):
            def forward(self, x):
                return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

        block = nn.Sequential(conv(groups=8), LayerNorm(8), nn.ReLU(), conv(kernel_size=1), LayerNorm(8), nn.ReLU())
        assert found(network(block, conv())) == [("1.5", "depthwise-separable")]


class TestExamples:
    class Two(nn.Module):
        """Adds what is made of two images; the second has another size and goes through a nested dict."""

        def __init__(self):
            super().__init__()
            self.one, self.two, self.block = conv(3, out=8), conv(1, out=8), Block(RESIDUAL["f + x"])

        def forward(self, image, extra):
            return self.block(self.one(image)) * self.two(extra["mask"]).mean((2, 3), keepdim=True)

    @pytest.mark.parametrize("as_keywords", [False, True])
    def test_several_inputs(self, as_keywords):
        image, extra = torch.zeros(2, 3, 16, 16), {"mask": torch.zeros(2, 1, 4, 4)}
        example = {"image": image, "extra": extra} if as_keywords else (image, extra)
        assert found(self.Two(), example) == [("block.bn", "residual")]

    def test_a_tensor(self):
        assert found(network(Block(RESIDUAL["f + x"])), torch.zeros(2, 3, 16, 16)) == [("1.bn", "residual")]

    def test_a_network_of_one_input_size(self):
        class Fixed(nn.Module):
            def __init__(self):
                super().__init__()
                self.place = nn.Parameter(torch.zeros(1, 8, 16, 16))

            def forward(self, x):
                return x + self.place

        assert found(network(Fixed(), Block(RESIDUAL["f + x"]))) == [("2.bn", "residual")]

    def test_what_forward_assigns_is_not_kept(self):
        class Remembers(nn.Module):
            def __init__(self):
                super().__init__()
                self.last = None

            def forward(self, x):
                self.last = x
                return x

        model = network(Remembers(), Block(RESIDUAL["f + x"])).train()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        assert found(model) == [("2.bn", "residual")]
        assert model[1].last is None
        assert model.training
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
