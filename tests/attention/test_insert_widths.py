"""Which dimension holds the channels of a site, and how wide the squeeze is there."""

import pytest
import torch
from plain_networks import Foreign
from torch import nn

from selab.attention.config import SEConfig
from selab.attention.insert import insert_se, remove_se
from selab.attention.insertions import insertion_remarks
from selab.attention.se import SqueezeExcitation
from selab.errors import InsertionError, SelabError

CHW = (1, 3, 32, 32)


def blocks(model):
    return [module for module in model.modules() if isinstance(module, SqueezeExcitation)]


class ChannelsLast(nn.Module):
    """As a block of ConvNeXt: a depthwise convolution, layers over the last dimension, and back."""

    def __init__(self, *, fixed=False):
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 4, 4)
        self.norm, self.mlp = nn.LayerNorm(24), nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24))
        self.last, self.first = nn.Identity(), nn.Identity()
        self.head = nn.Linear(24 * 64 if fixed else 24, 5)
        self.fixed = fixed

    def forward(self, x):
        x = self.stem(x)
        y = self.last(self.mlp(self.norm(x.permute(0, 2, 3, 1))))
        x = self.first(x + y.permute(0, 3, 1, 2))
        return self.head(x.flatten(1) if self.fixed else x.mean((2, 3)))


class TestChannelDimension:
    @pytest.mark.parametrize("fixed", [False, True])
    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize("site", ["stem", "norm", "mlp", "mlp.2", "last", "first"])
    def test_the_channels_are_gated(self, site, memory_format, fixed, image):
        model = ChannelsLast(fixed=fixed).eval().to(memory_format=memory_format)
        (one,) = insert_se(model, site, reduction=4, input_nchw=CHW)
        assert (one.channels, one.height, one.width) == (24, 8, 8)
        (block,) = blocks(model)
        nn.init.zeros_(block.fc2.weight)
        with torch.no_grad():
            block.fc2.bias.copy_(torch.linspace(-3, 3, 24))
            seen = []
            handle = model.get_submodule(site)
            inner = handle.inner if site != "stem" or hasattr(handle, "inner") else handle
            inner.register_forward_hook(lambda _module, _args, out: seen.append(out))
            handle.register_forward_hook(lambda _module, _args, out: seen.append(out))
            model(image)
        factor = torch.linspace(-3, 3, 24).sigmoid()
        before, after = seen
        shape = (-1, 1, 1) if site in ("stem", "first") else (-1,)
        torch.testing.assert_close(after, before * factor.view(shape))
        assert remove_se(model) == 1

    def test_another_size_still_runs(self):
        model = ChannelsLast().eval()
        insert_se(model, "mlp", reduction=4, input_nchw=CHW)
        assert model(torch.zeros(1, 3, 64, 48)).shape == (1, 5)

    def test_the_input_side(self, image):
        model = ChannelsLast().eval()
        expected = model(image)
        (one,) = insert_se(model, "mlp", placement="pre", reduction=4, input_nchw=CHW, init="identity")
        assert one.channels == 24
        assert torch.equal(model(image), expected)

    def test_neither_is_refused(self):
        class Windows(nn.Module):
            def __init__(self):
                super().__init__()
                self.stem, self.mix = nn.Conv2d(3, 8, 3, padding=1), nn.Identity()

            def forward(self, x):
                y = self.stem(x).flatten(2)
                return self.mix((y.transpose(1, 2) @ y)[:, :, None])

        with pytest.raises(InsertionError, match="its second dimension does not hold channels"):
            insert_se(Windows(), "mix", input_nchw=(1, 3, 4, 4))

    def test_tokens_are_refused(self):
        class Tokens(nn.Module):
            def __init__(self):
                super().__init__()
                self.stem, self.norm = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8)

            def forward(self, x):
                return self.norm(self.stem(x).flatten(2).transpose(1, 2))

        with pytest.raises(
            InsertionError, match=r"norm: .*\(1, 64, 8\); SE needs .* tokens \(N, L, C\) have no height"
        ):
            insert_se(Tokens(), "norm", input_nchw=CHW)


class TestSmallSites:
    """The sites have 16, 32 and 64 channels."""

    def test_min_channels(self, foreign):
        done = insert_se(foreign, ["stem", "layers.*"], reduction=4, min_channels=32, input_nchw=CHW)
        assert [one.path for one in done] == ["layers.0", "layers.1"]
        assert done.skipped == ("stem (16 channels, fewer than min_channels 32)",)
        assert str(done).endswith("left out 1 site: stem (16 channels, fewer than min_channels 32)")
        assert insertion_remarks(done)[0].startswith("left out 1 site: stem")
        with pytest.raises(InsertionError, match=r"no site is left: stem \(16 channels, fewer than min_channels 17\)"):
            insert_se(Foreign(), "stem", min_channels=17, input_nchw=CHW)

    def test_a_site_of_a_pattern_that_is_too_small_for_the_reduction(self, foreign):
        done = insert_se(foreign, "layers.*", reduction=64, input_nchw=CHW)
        assert [one.path for one in done] == ["layers.1"]
        assert done.skipped == ("layers.0 (32 channels, fewer than reduction 64)",)
        remove_se(foreign)
        with pytest.raises(InsertionError, match=r"layers\.0: reduction 64 is larger than the 32 channels"):
            insert_se(foreign, ["layers.0", "layers.1"], reduction=64, input_nchw=CHW)
        with pytest.raises(InsertionError, match=r"no site is left: layers\.0"):
            insert_se(foreign, "layers.*", reduction=65, input_nchw=CHW)

    @pytest.mark.parametrize("block", ["coordinate", "sk"])
    def test_a_reduction_beyond_the_channels_leaves_the_least_width(self, foreign, block):
        done = insert_se(foreign, ["stem", "layers.*"], block=block, reduction=65, input_nchw=CHW)
        assert (len(done), done.skipped) == (3, ())

    @pytest.mark.parametrize(
        ("options", "widths"),
        [
            ({"latent_channels": 12}, [12, 12, 12]),
            ({"latent_channels": 0.125}, [2, 4, 8]),
            ({"latent_channels": 0.3}, [4, 9, 19]),
            ({"latent_channels": 0.25, "divisor": 8}, [8, 8, 16]),
        ],
    )
    def test_latent_channels(self, foreign, options, widths):
        done = insert_se(foreign, ["stem", "layers.*"], input_nchw=CHW, **options)
        assert [one.squeeze_channels for one in done] == widths

    def test_latent_channels_or_reduction(self, foreign):
        with pytest.raises(SelabError, match="latent_channels: sets the squeeze width as reduction does; give one"):
            insert_se(foreign, "stem", reduction=4, latent_channels=4, input_nchw=CHW)
        with pytest.raises(SelabError, match="latent_channels: -1; must be above 0"):
            insert_se(foreign, "stem", latent_channels=-1, input_nchw=CHW)
        with pytest.raises(SelabError, match="min_channels: 0; must be at least 1"):
            insert_se(foreign, "stem", min_channels=0, input_nchw=CHW)
        config = SEConfig(sites="stem", bias=True, reduction=2)
        (one,) = insert_se(foreign, config, latent_channels=0.5, input_nchw=CHW, dry_run=True)
        assert one.squeeze_channels == 8
