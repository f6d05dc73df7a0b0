"""Sums that re-parameterisation merges: the site is behind the sum, none on one side of it."""

import pytest
import torch
import torch.nn.functional as F
from site_networks import NCHW, conv, found, left_out, network, normed
from torch import nn

from selab.attention.insert import insert_se
from selab.attention.inserted import check_inserted


class RepBlock(nn.Module):
    """RepVGG's: relu(bn(conv3(x)) + bn(conv1(x)) + bn(x)), arXiv 2101.03697, Fig. 2."""

    def __init__(self, identity=True, channels=8, groups=1, pointwise=False):
        super().__init__()
        self.large = normed(channels, 1 if pointwise else 3, groups)
        self.small = normed(channels, 1, groups)
        self.identity = nn.BatchNorm2d(channels) if identity else None
        self.act = nn.ReLU()

    def forward(self, x):
        y = self.large(x) + self.small(x)
        if self.identity is not None:
            y = y + self.identity(x)
        return self.act(y)


class Residual(nn.Module):
    """An ordinary block, x + bn(conv(x))."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = conv(), nn.BatchNorm2d(8)

    def forward(self, x):
        return x + self.bn(self.conv(x))


class TestMergedSums:
    @pytest.mark.parametrize("identity", [True, False])
    def test_the_site_is_after_the_sum(self, identity):
        model = network(RepBlock(identity), RepBlock(identity))
        assert found(model) == [("1", "parallel"), ("2", "parallel")]

    def test_a_block_there_survives_the_merge(self):
        """Merged by hand: the sum of the branches' outputs is what one convolution will give."""
        torch.manual_seed(0)
        model, x = network(RepBlock()).eval(), torch.randn(2, 3, 16, 16)
        insert_se(model, "auto", reduction=2, input_nchw=NCHW)
        expected = model(x)
        block = next(module for module in model.modules() if isinstance(module, RepBlock))
        y = model[0](x)
        with torch.no_grad():
            total = block.large(y) + block.small(y) + block.identity(y)

        class Merged(nn.Module):
            def forward(self, _):
                return total

        class Nothing(nn.Module):
            def forward(self, y):
                return torch.zeros_like(y)

        block.large, block.small, block.identity = Merged(), Nothing(), None
        torch.testing.assert_close(model(x), expected)

    def test_an_identity_that_is_not_normalised(self):
        class Plain(RepBlock):
            def forward(self, x):
                return self.act(self.large(x) + self.small(x) + x)

        assert found(network(Plain(identity=False))) == [("1", "parallel")]

    def test_any_number_of_branches_in_a_list(self):
        class Many(nn.Module):
            def __init__(self):
                super().__init__()
                self.branches = nn.ModuleList([normed(), normed(), normed(kernel_size=1)])

            def forward(self, x):
                return F.relu(sum(branch(x) for branch in self.branches))

        assert found(network(Many())) == [("1", "parallel")]

    def test_a_depthwise_and_a_pointwise_one_are_one_block(self):
        """MobileOne's, arXiv 2206.04040, Fig. 3."""
        pair = nn.Sequential(RepBlock(groups=8), RepBlock(pointwise=True))
        assert found(network(pair, RepBlock())) == [("1.1", "depthwise-separable"), ("2", "parallel")]

    def test_none_inside_a_residual_branch(self):
        class Outer(nn.Module):
            def __init__(self):
                super().__init__()
                self.rep, self.last = RepBlock(), conv()

            def forward(self, x):
                return x + self.last(self.rep(x))

        assert found(network(Outer())) == [("1.last", "residual")]

    def test_the_stem_is_no_block(self):
        model = nn.Sequential(RepBlock(channels=3), conv(3, out=8), RepBlock())
        assert found(model) == [("2", "parallel")]
        assert "the network's input (a stem)" in left_out(model)

    def test_a_sum_that_no_module_returns_is_left_out(self):
        class Root(nn.Module):
            def __init__(self):
                super().__init__()
                self.stem, self.large, self.small = conv(3, out=8), normed(), normed(kernel_size=1)

            def forward(self, x):
                y = self.stem(x)
                return (self.large(y) + self.small(y)).mean((2, 3))

        assert found(Root()) == []
        assert "re-parameterisation merges them" in left_out(Root())

    @pytest.mark.parametrize(
        ("layer", "text"), [(normed, "with a shortcut (a residual addition): re-param"), (conv, "")]
    )
    def test_a_shortcut_that_is_added_to_a_sum_is_named(self, layer, text):
        """sum(w * b(x)) and x + y in one forward: two lines, or one that names both."""

        class Root(nn.Module):
            def __init__(self):
                super().__init__()
                self.stem, self.branches = conv(3, out=8), nn.ModuleList([layer(), layer(), layer()])
                self.weights = nn.Parameter(torch.ones(3))

            def forward(self, x):
                x = self.stem(x)
                y = sum(w * b(x) for w, b in zip(self.weights, self.branches, strict=True))
                return (x + y).mean((2, 3))

        reasons = left_out(Root())
        assert text in reasons
        if not text:
            assert "neither is the branch" in reasons
            assert "no single module to attach to at the end of its branch" in reasons

    def test_a_sum_without_a_shortcut_names_none(self):
        class Root(nn.Module):
            def __init__(self):
                super().__init__()
                self.stem, self.one, self.two = conv(3, out=8), normed(), normed()

            def forward(self, x):
                x = self.stem(x)
                return (self.one(x) + self.two(x)).mean((2, 3))

        assert "the sum of parallel convolutions in the network: re-parameterisation" in left_out(Root())

    def test_a_module_that_merges_itself(self):
        """With an identity beside one convolution, a method says whether they are merged."""

        class Mixer(nn.Module):
            def __init__(self):
                super().__init__()
                self.mixer = normed(groups=8)

            def forward(self, x):
                return x + self.mixer(x)

        class Merging(Mixer):
            def reparameterize(self):
                raise NotImplementedError

        assert found(network(Mixer(), conv())) == [("1.mixer", "residual")]
        assert found(network(Merging(), conv())) == [("1", "parallel")]

    @pytest.mark.parametrize("method", ["fuse", "reparameterize", "switch_to_deploy"])
    def test_a_module_that_merges_what_its_child_adds(self, method):
        """Whatever is inside goes with the merge, so the site is the merging module and not the one that adds."""

        class Sum(nn.Module):
            def __init__(self):
                super().__init__()
                self.inside = normed(groups=8)

            def forward(self, x):
                return x + self.inside(x)

        class Merging(nn.Sequential):
            pass

        def merge(self):
            merged = nn.utils.fuse_conv_bn_eval(*self[0].inside)
            with torch.no_grad():
                merged.weight[:, 0, 1, 1] += 1
            return merged

        setattr(Merging, method, merge)
        torch.manual_seed(0)
        model, x = network(Merging(Sum()), Residual()).eval(), torch.randn(2, 3, 16, 16)
        nn.init.uniform_(model[1][0].inside[1].running_var, 0.5, 2)
        assert found(model) == [("1", "parallel"), ("2.bn", "residual")]
        inserted = insert_se(model, "auto", reduction=2, input_nchw=NCHW)
        expected = model(x)
        model[1].inner = getattr(model[1].inner, method)()
        assert check_inserted(model, input_nchw=NCHW, inserted=inserted) == ("1", "2.bn")
        assert isinstance(model[1].inner, nn.Conv2d)
        torch.testing.assert_close(model(x), expected)

    def test_a_module_that_merges_and_keeps_an_se_block(self):
        """MobileOne's, with SE: the name is taken there, and what follows the sum is not merged."""

        class Gate(nn.Sequential):
            def forward(self, x):
                return x * super().forward(x).sigmoid()

        class Merging(RepBlock):
            def __init__(self):
                super().__init__()
                self.se = Gate(nn.AdaptiveAvgPool2d(1), conv(kernel_size=1))

            def forward(self, x):
                return self.act(self.se(self.large(x) + self.small(x) + self.identity(x)))

            def reparameterize(self):
                raise NotImplementedError

        assert found(network(Merging())) == [("1.act", "parallel")]

    def test_no_site_inside_a_module_that_merges(self):
        """A sum whose result goes through another layer of the merging module, as RepViT's BatchNorm."""

        class Merging(nn.Module):
            def __init__(self):
                super().__init__()
                self.large, self.small, self.bn = normed(groups=8), normed(kernel_size=1, groups=8), nn.BatchNorm2d(8)

            def forward(self, x):
                return self.bn(self.large(x) + self.small(x) + x)

            def fuse(self):
                raise NotImplementedError

        class Inlined(Merging):
            def forward(self, x):
                return F.relu(super().forward(x)).mean((2, 3))

        assert found(network(Merging())) == [("1", "parallel")]
        assert found(nn.Sequential(conv(3, out=8), Inlined())) == []
        assert "re-parameterisation merges them" in left_out(nn.Sequential(conv(3, out=8), Inlined()))

    def test_a_branch_with_an_activation_is_a_residual_one(self):
        class Projected(nn.Module):
            def __init__(self):
                super().__init__()
                self.branch = nn.Sequential(normed(), nn.ReLU(), normed())
                self.shortcut = normed(kernel_size=1)

            def forward(self, x):
                return self.branch(x) + self.shortcut(x)

        assert found(network(Projected())) == [("1.branch", "residual")]
