import copy
from functools import cache

import pytest
import torch
from torch import nn

from selab.attention.config import SEConfig
from selab.attention.gated_site import GatedMap
from selab.attention.insert import insert_se, remove_se
from selab.attention.inserted import check_inserted
from selab.attention.insertions import insertion_remarks
from selab.attention.se import SqueezeExcitation
from selab.errors import InsertionError, ModelError, SelabError
from selab.meta import meta_twin
from selab.models import catalog
from selab.models.build import build

CHW = (1, 3, 32, 32)
PLACEMENTS = ["standard", "pre", "post", "identity", "3x3"]


def blocks(model):
    return [module for module in model.modules() if isinstance(module, SqueezeExcitation)]


@cache
def _resnet50(seed):
    return build(catalog.find("resnet50"), seed=seed).model.eval()


def residual_net(seed=0):
    return copy.deepcopy(_resnet50(seed))


class Foreign(nn.Module):
    """A network that knows nothing of sites: a leaf, a bare Sequential, a block of its own."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.layers = nn.Sequential(
            nn.Sequential(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
            nn.Sequential(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
        )
        self.act = nn.ReLU()
        self.unused = nn.Conv2d(3, 16, 1)
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        x = self.act(self.layers(self.act(self.stem(x))))
        return self.head(x.mean((2, 3)))


@pytest.fixture
def foreign():
    torch.manual_seed(1)
    return Foreign().eval()


@pytest.fixture
def image():
    torch.manual_seed(2)
    return torch.randn(2, 3, 32, 32)


class TestNumbers:
    @pytest.mark.parametrize("placement", PLACEMENTS)
    def test_a_gate_of_one_gives_the_baseline(self, placement, image):
        model = residual_net()
        with torch.no_grad():
            expected = model(image)
            insert_se(model, "residual", placement=placement, input_nchw=CHW, init="identity")
            assert torch.equal(model(image), expected)
            assert len(blocks(model)) == 16

    @pytest.mark.parametrize("placement", PLACEMENTS)
    def test_each_placement_gates_the_tensor_it_names(self, placement, image):
        """The gate forced to one half: the block's output is what its formula says."""
        model = residual_net()
        block = model.get_submodule("stage2.1")
        branch, shortcut, join = block.branch, block.shortcut, block.join
        x = torch.randn(2, 256, 8, 8)
        to_relu2, after = list(branch)[:6], list(branch)[6:]
        with torch.no_grad():
            expected = {
                "standard": lambda: join(branch(x) / 2, shortcut(x)),
                "pre": lambda: join(branch(x / 2), shortcut(x)),
                "post": lambda: join(branch(x), shortcut(x)) / 2,
                "identity": lambda: join(branch(x), shortcut(x) / 2),
                "3x3": lambda: join(nn.Sequential(*after)(nn.Sequential(*to_relu2)(x) / 2), shortcut(x)),
            }[placement]()
            insert_se(model, "residual", placement=placement, input_nchw=CHW)
            for se in blocks(model):
                nn.init.zeros_(se.fc2.weight)  # sigmoid(0) = 1/2
            torch.testing.assert_close(block(x), expected)

    @pytest.mark.parametrize("sites", ["stem", "layers.*", ["stem", "layers.0.1", "layers.1"]])
    @pytest.mark.parametrize("placement", ["standard", "pre", "post"])
    def test_patterns_on_any_module(self, foreign, image, sites, placement):
        if placement == "pre":
            sites = "layers.*"
        with torch.no_grad():
            expected = foreign(image)
            done = insert_se(foreign, sites, placement=placement, reduction=4, input_nchw=CHW, init="identity")
            assert torch.equal(foreign(image), expected)
            for se in blocks(foreign):
                nn.init.constant_(se.fc2.bias, 3.0)
            assert not torch.equal(foreign(image), expected)
        assert len(done) == len(blocks(foreign))

    def test_block_input_sets_the_squeeze_width(self):
        model = residual_net()
        done = insert_se(model, "residual", squeeze_from="block_input", input_nchw=CHW)
        assert [done[0].channels, done[0].squeeze_channels] == [256, 64 // 16]
        assert [done[3].channels, done[3].squeeze_channels] == [512, 256 // 16]


class TestDryRun:
    def test_lists_everything_and_changes_nothing(self):
        model = residual_net()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        facts = SEConfig(sites="residual", bias=True)
        plan = insert_se(model, facts, input_nchw=CHW, dry_run=True)
        assert not blocks(model)
        assert dict.fromkeys(before, True) == {k: torch.equal(v, before[k]) for k, v in model.state_dict().items()}
        assert [item.path for item in plan[:4]] == ["stage2.0", "stage2.1", "stage2.2", "stage3.0"]
        assert sum(item.params for item in plan) == sum(
            n * (2 * c * c // 16 + c + c // 16) for n, c in [(3, 256), (4, 512), (6, 1024), (3, 2048)]
        )
        # At 32x32 the first stage sees 8x8 maps: squeeze and scale of 256 maps, two layers, ReLU and gate.
        assert plan[0].macs == 2 * 256 * 8 * 8 + 2 * 256 * 16 + 16 + 256
        assert insert_se(model, facts, input_nchw=CHW) == plan

    def test_dry_run_flag(self, foreign):
        assert len(insert_se(foreign, "layers.*", reduction=4, input_nchw=CHW, dry_run=True)) == 2
        assert not blocks(foreign)


class TestUndo:
    @pytest.mark.parametrize("placement", PLACEMENTS)
    def test_remove_gives_back_the_baseline(self, placement, image):
        model = residual_net()
        structure, keys = repr(model), list(model.state_dict())
        with torch.no_grad():
            expected = model(image)
            insert_se(model, "residual", placement=placement, input_nchw=CHW)
            copied = copy.deepcopy(model)
            for one in (model, copied):
                assert remove_se(one) == 16
                assert repr(one) == structure
                assert list(one.state_dict()) == keys
                assert torch.equal(one(image), expected)

    def test_remove_from_any_module(self, foreign, image):
        structure = repr(foreign)
        insert_se(foreign, ["stem", "layers.*"], reduction=4, input_nchw=CHW)
        insert_se(foreign, ["layers.1.1"], placement="pre", reduction=4, input_nchw=CHW)
        assert remove_se(foreign) == 4
        assert repr(foreign) == structure
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in foreign.modules())

    def test_a_network_s_own_blocks_stay(self, foreign):
        foreign.layers.append(SqueezeExcitation(64, 4))
        insert_se(foreign, "stem", reduction=4, input_nchw=CHW)
        assert remove_se(foreign) == 1
        assert len(blocks(foreign)) == 1


class TestCheckpoints:
    @pytest.mark.parametrize("placement", PLACEMENTS)
    def test_baseline_checkpoint_loads_under_unchanged_keys(self, placement):
        baseline, model = residual_net(1), residual_net(2)
        insert_se(model, "residual", placement=placement, input_nchw=CHW)
        result = model.load_state_dict(baseline.state_dict(), strict=False)
        assert not result.unexpected_keys
        assert len(result.missing_keys) == 16 * 4
        assert all(".se.fc" in key for key in result.missing_keys)

    def test_foreign_keys(self, foreign):
        before = set(foreign.state_dict())
        insert_se(foreign, ["stem", "layers.*"], reduction=4, input_nchw=CHW)
        new = set(foreign.state_dict()) - before
        assert before <= set(foreign.state_dict())
        assert all(".se." in key for key in new)
        assert len(new) == 3 * 4

    def test_every_catalog_pair(self):
        for variant in catalog.installed().values():
            baseline = catalog.baseline_of(variant)
            if baseline is not None:
                keys = set(build(variant, device="meta").model.state_dict())
                base = set(build(baseline, device="meta").model.state_dict())
                assert base <= keys, variant.name
                assert all(".se." in key for key in keys - base), variant.name

    def test_round_trip(self, image):
        first, second = residual_net(1), residual_net(2)
        for model in (first, second):
            insert_se(model, "residual", input_nchw=CHW)
        second.load_state_dict(first.state_dict())
        with torch.no_grad():
            assert torch.equal(first(image), second(image))


class TestRefusals:
    @pytest.mark.parametrize(
        ("sites", "options", "message"),
        [
            ([], {}, "no site found"),
            ("layers.*.convolution", {}, r"'layers.\*.convolution' matches no module of Foreign"),
            (["stem", "stme"], {}, "'stme' matches no module of Foreign; did you mean stem"),
            ("head", {}, r"head: its output is a tensor of shape \(1, 10\); SE needs"),
            ("act", {}, r"act: runs 2 times \(a shared module\)"),
            ("unused", {}, "unused: does not run"),
            ("stem", {"reduction": 17}, "stem: reduction 17 is larger than the 16 channels"),
            ("stem", {"placement": "identity"}, "stem: placement 'identity' needs a residual block"),
            ("stem", {"placement": "3x3"}, "stem: placement '3x3' needs a residual block"),
        ],
    )
    def test_message_names_the_module(self, foreign, sites, options, message):
        structure = repr(foreign)
        with pytest.raises(InsertionError, match=message):
            insert_se(foreign, sites, input_nchw=CHW, **options)
        assert repr(foreign) == structure

    def test_inside_another_block(self, foreign):
        insert_se(foreign, "stem", reduction=4, input_nchw=CHW)
        with pytest.raises(InsertionError, match=r"stem\.se\.fc1: is inside another SE block"):
            insert_se(foreign, "stem.se.fc1", reduction=4, input_nchw=CHW)
        with pytest.raises(InsertionError, match="stem: already holds an SE block"):
            insert_se(foreign, "stem", reduction=4, input_nchw=CHW)

    def test_twice_in_a_residual_network(self):
        model = residual_net()
        insert_se(model, "residual", input_nchw=CHW)
        with pytest.raises(InsertionError, match=r"stage2\.0: already holds an SE block"):
            insert_se(model, "residual", placement="post", input_nchw=CHW)

    def test_module_under_two_names(self, foreign):
        foreign.twin = foreign.layers[0]
        with pytest.raises(InsertionError, match=r"layers\.0: is shared with twin"):
            insert_se(foreign, "layers.0", reduction=4, input_nchw=CHW)

    def test_output_that_is_no_tensor(self):
        model = nn.Sequential(nn.LSTM(8, 8), nn.Identity())
        with pytest.raises(InsertionError, match="0: its output is tuple"):
            insert_se(model, "0", input_nchw=(2, 3, 8))

    def test_wrong_input_says_so(self, foreign):
        with pytest.raises(ModelError, match="give the shape that the network expects"):
            insert_se(foreign, "stem", input_nchw=(1, 4, 32, 32))

    def test_a_block_that_never_runs_is_refused(self, foreign):
        foreign.forgotten = SqueezeExcitation(16, 4)
        with pytest.raises(InsertionError, match="forgotten: this SE block ran 0 times"):
            check_inserted(foreign, input_nchw=CHW)
        with pytest.raises(InsertionError, match="forgotten"):
            insert_se(foreign, "stem", reduction=4, input_nchw=CHW)
        assert len(blocks(foreign)) == 1, "the insertion is undone"

    def test_a_failure_leaves_earlier_blocks(self, foreign):
        insert_se(foreign, "stem", reduction=4, input_nchw=CHW)
        structure = repr(foreign)
        with pytest.raises(AttributeError):
            insert_se(foreign, "layers.*", reduction=4, input_nchw=CHW, optimizer="adam")
        assert repr(foreign) == structure

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"placement": "befor"}, "placement: invalid enum value 'befor'; allowed: standard, pre, post"),
            ({"squeeze_from": "blok"}, "squeeze_from: invalid enum value 'blok'; allowed: site, block_input"),
            ({"gate": "sigmiod"}, "gate: invalid enum value 'sigmiod'; allowed: sigmoid"),
            ({"reduction": 2.5}, "reduction: expected int, got float"),
            ({"reduction": 0}, "reduction: 0; must be at least 1"),
            ({"init": "idd"}, "init: invalid enum value 'idd'; allowed: he, identity"),
        ],
    )
    def test_nonsense_is_refused_in_a_dry_run_as_well(self, foreign, options, message):
        for dry_run in (True, False):
            with pytest.raises(SelabError, match=message):
                insert_se(foreign, "stem", input_nchw=CHW, dry_run=dry_run, **({"reduction": 4} | options))

    def test_an_input_given_by_keyword_cannot_be_gated(self):
        class ByKeyword(Foreign):
            def forward(self, x):
                return self.head(self.layers(self.stem(input=x)).mean((2, 3)))

        foreign = ByKeyword()
        with pytest.raises(InsertionError, match="stem: its input is not given by position"):
            insert_se(foreign, "stem", placement="pre", reduction=2, input_nchw=CHW)


class TestSurvival:
    @pytest.fixture(params=["residual", "hook"])
    def pair(self, request, foreign):
        """A network with SE by each of the two mechanisms, and an input."""
        if request.param == "residual":
            model = build(catalog.find("se_resnet18"), input_chw=(3, 32, 32)).model.eval()
        else:
            model = foreign
            insert_se(model, ["stem", "layers.*"], reduction=4, input_nchw=CHW)
        return model, torch.randn(2, 3, 32, 32)

    def test_deepcopy_is_independent(self, pair):
        model, x = pair
        with torch.no_grad():
            expected = model(x)
            copied = copy.deepcopy(model)
            for se in blocks(model):
                nn.init.constant_(se.fc2.weight, 5.0)
            assert torch.equal(copied(x), expected)
            assert not torch.equal(model(x), expected)

    def test_export(self, pair):
        model, x = pair
        exported = torch.export.export(model, (x,)).module()
        with torch.no_grad():
            torch.testing.assert_close(exported(x), model(x))

    @pytest.mark.slow
    def test_compile(self, pair):
        model, x = pair
        with torch.no_grad():
            torch.testing.assert_close(torch.compile(model)(x), model(x), rtol=1e-4, atol=1e-4)

    def test_channels_last(self, pair):
        model, x = pair
        with torch.no_grad():
            expected = model(x)
            model = model.to(memory_format=torch.channels_last)
            got = model(x.contiguous(memory_format=torch.channels_last))
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)

    def test_bf16_autocast(self, pair):
        model, x = pair
        with torch.no_grad():
            expected = model(x)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                got = model(x)
            assert got.dtype == torch.bfloat16
            assert (got.float() - expected).norm() / expected.norm() < 0.05

    def test_optimizer_gets_the_new_parameters(self, foreign, image):
        optimizer = torch.optim.SGD(foreign.parameters(), lr=0.1, momentum=0.9)
        insert_se(foreign, "layers.*", reduction=4, input_nchw=CHW, optimizer=optimizer)
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert known == {id(p) for p in foreign.parameters()}
        before = [se.fc2.weight.clone() for se in blocks(foreign)]
        foreign(image).square().sum().backward()
        optimizer.step()
        assert all(not torch.equal(se.fc2.weight, old) for se, old in zip(blocks(foreign), before, strict=True))

    def test_type_device_and_mode_follow_the_network(self):
        model = Foreign().double().train()
        insert_se(model, "stem", reduction=4, input_nchw=CHW)
        (se,) = blocks(model)
        assert se.fc1.weight.dtype == torch.float64
        assert se.training
        twin = meta_twin(Foreign())
        insert_se(twin, "stem", reduction=4, input_nchw=CHW)
        assert blocks(twin)[0].fc1.weight.is_meta


class TestRemovingSome:
    def test_by_site_by_path_and_by_pattern(self, foreign, image):
        baseline = foreign(image)
        insert_se(foreign, ["stem", "layers.*"], reduction=4, input_nchw=CHW)
        insert_se(foreign, ["layers.1.1"], placement="pre", reduction=4, input_nchw=CHW)
        assert remove_se(foreign, "layers.0") == 1
        assert remove_se(foreign, ["stem.se"]) == 1
        assert len(blocks(foreign)) == 2
        assert remove_se(foreign, "layers.**") == 2
        torch.testing.assert_close(foreign(image), baseline, rtol=0, atol=0)

    @pytest.mark.parametrize("placement", PLACEMENTS)
    def test_the_site_of_a_residual_block(self, placement):
        model = residual_net()
        inserted = insert_se(model, "residual", placement=placement, input_nchw=CHW)
        assert remove_se(model, inserted[3].path) == 1
        assert remove_se(model, [one.path for one in inserted[4:6]]) == 2
        assert len(blocks(model)) == len(inserted) - 3

    def test_what_is_not_there_is_refused_and_nothing_removed(self, foreign):
        insert_se(foreign, ["stem", "layers.*"], reduction=4, input_nchw=CHW)
        with pytest.raises(InsertionError, match=r"'layer.0' matches no inserted block; did you mean layers.0"):
            remove_se(foreign, ["stem", "layer.0"])
        assert len(blocks(foreign)) == 3
        remove_se(foreign)
        with pytest.raises(InsertionError, match="matches no inserted block; the network has none"):
            remove_se(foreign, "stem")


def test_a_configuration_can_be_changed_by_keys(foreign):
    config = SEConfig(sites="stem", bias=False, reduction=8)
    assert insert_se(foreign, config, reduction=4, input_nchw=CHW, dry_run=True)[0].squeeze_channels == 4
    with pytest.raises(SelabError, match="SE: reduktion: unknown key; allowed"):
        insert_se(foreign, config, reduktion=4, input_nchw=CHW)
    assert insert_se(foreign, ["layers.0"], block="eca", stages=(), input_nchw=CHW, dry_run=True)[0].block == "eca"


def test_narrow_bottlenecks_are_remarked_upon(foreign):
    inserted = insert_se(foreign, ["stem", "layers.*"], reduction=16, input_nchw=CHW)
    widths = ((16, 1, 32), (32, 2, 16), (64, 4, 8))
    params = sum(2 * c * hidden + c + hidden for c, hidden, _ in widths)
    macs = sum(2 * c * hidden + c + hidden + 2 * c * side**2 for c, hidden, side in widths)
    assert str(inserted) == f"3 SE blocks inserted: +{params:,} parameters, +{macs:,} MACs per image"
    (remark,) = insertion_remarks(inserted)
    assert remark.startswith("squeeze width below 8 at 3 of the sites: stem (16 → 1), layers.0 (32 → 2)")
    remove_se(foreign)
    assert not insertion_remarks(insert_se(foreign, ["stem"], reduction=2, input_nchw=CHW))
    assert not insertion_remarks(insert_se(foreign, ["layers.0"], block="eca", input_nchw=CHW))


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


class TestOtherInputs:
    @pytest.mark.parametrize("form", ["positional", "keywords", "nested"])
    def test_two_inputs(self, form):
        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.rgb, self.depth = nn.Conv2d(3, 8, 3), nn.Conv2d(1, 8, 3)
                self.bn = nn.BatchNorm2d(8)

            def forward(self, rgb, depth):
                if isinstance(rgb, dict):
                    rgb = rgb["image"][0]
                return self.bn(self.rgb(rgb) + self.depth(depth))

        rgb, depth = torch.randn(2, 3, 6, 6), torch.randn(2, 1, 6, 6)
        inputs = {
            "positional": (rgb, depth),
            "keywords": {"rgb": rgb, "depth": depth},
            "nested": ({"image": [rgb]}, depth),
        }[form]
        model = Two().eval()
        expected = model(**inputs) if form == "keywords" else model(*inputs)
        (one,) = insert_se(model, "bn", inputs=inputs, reduction=2, init="identity")
        assert (one.channels, one.height) == (8, 4)
        assert torch.equal(model(**inputs) if form == "keywords" else model(*inputs), expected)
        assert check_inserted(model, inputs=inputs, inserted=["bn"]) == ("bn",)
        remove_se(model)
        assert len(insert_se(model, "bn", input_nchw=inputs, reduction=2)) == 1

    def test_networks_that_cannot_be_changed(self, foreign):
        scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()))
        with pytest.raises(ModelError, match="a TorchScript network cannot be exchanged"):
            insert_se(scripted, "0", input_nchw=CHW)
        with pytest.raises(ModelError, match="a TorchScript network cannot be exchanged"):
            remove_se(scripted)
        lazy = nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU())
        with pytest.raises(ModelError, match=r"0: a lazy LazyConv2d that has no parameters yet; run the network once"):
            insert_se(lazy, "0", input_nchw=CHW)
        lazy(torch.zeros(1, 3, 8, 8))
        assert len(insert_se(lazy, "0", input_nchw=CHW, reduction=2)) == 1


class TestCheckInserted:
    def check(self, model, message, **options):
        with pytest.raises(InsertionError, match=message):
            check_inserted(model, input_nchw=CHW, **options)

    def test_returns_the_sites(self, foreign):
        insert_se(foreign, ["stem", "layers.*"], reduction=4, input_nchw=CHW)
        assert check_inserted(foreign, input_nchw=CHW) == ("stem", "layers.0", "layers.1")
        own = nn.Sequential(nn.Conv2d(3, 8, 3), SqueezeExcitation(8, 2))
        assert check_inserted(own, input_nchw=CHW) == ("1",)
        assert check_inserted(Foreign(), input_nchw=CHW) == ()

    def test_a_block_that_is_gone(self, foreign):
        inserted = insert_se(foreign, ["stem", "layers.*"], reduction=4, input_nchw=CHW)
        foreign.stem = foreign.stem.inner
        assert check_inserted(foreign, input_nchw=CHW) == ("layers.0", "layers.1")
        self.check(foreign, "stem: has no attention block any more", inserted=inserted)

    def test_a_block_that_is_moved_to_a_new_module(self, foreign):
        insert_se(foreign, "stem", reduction=4, input_nchw=CHW)
        made = nn.Conv2d(3, 16, 3, padding=1)
        made.add_module("se", foreign.stem.se)
        foreign.stem = made
        self.check(foreign, r"stem\.se: this SE block ran 0 times .*: Conv2d does not call it")

    def test_a_bypassed_place(self, foreign):
        insert_se(foreign, "stem", reduction=4, input_nchw=CHW)
        inner = foreign.stem.inner
        foreign.forward = lambda x: foreign.head(foreign.layers(inner(x)).mean((2, 3)))
        with pytest.raises(InsertionError, match=r"stem\.se: this SE block ran 0 times"):
            check_inserted(foreign, input_nchw=CHW)

    def test_another_forward(self, foreign):
        class Other(GatedMap):
            def forward(self, x):
                return self.inner(x)

        insert_se(foreign, "stem", reduction=4, input_nchw=CHW)
        foreign.stem.__class__ = Other
        self.check(foreign, r"stem\.se: this SE block ran 0 times .*: another forward was set on stem")

    def test_a_site_that_runs_twice(self, foreign):
        class Twice(nn.Module):
            def __init__(self, inner):
                super().__init__()
                self.inner = inner

            def forward(self, x):
                return self.inner(x) + self.inner(x)

        insert_se(foreign, "stem", reduction=4, input_nchw=CHW)
        foreign.stem = Twice(foreign.stem)
        self.check(foreign, r"stem\.inner\.se: this SE block ran 2 times .* shared or runs in a loop")

    def test_a_graph_of_fx(self, foreign):
        insert_se(foreign, "stem", reduction=4, input_nchw=CHW)
        graph = torch.fx.symbolic_trace(foreign)
        assert check_inserted(graph, input_nchw=CHW) == ("stem",)
        for node in list(graph.graph.nodes):
            if node.target == "stem.se.fc2":
                node.replace_all_uses_with(node.args[0])
                graph.graph.erase_node(node)
        graph.recompile()
        with pytest.raises(SelabError):
            check_inserted(graph, input_nchw=CHW)

    def test_a_network_that_looks_at_classes(self, image):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.layers = nn.ModuleList([nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)])
                self.extra = nn.Identity()

            def forward(self, x):
                for layer in self.layers:
                    x = layer(x) if isinstance(layer, nn.Conv2d) else self.extra(layer(x))
                return x

        model = Net()
        text = repr(model)
        with pytest.raises(InsertionError, match=r"extra: runs 1 times .* with the blocks, and 0 times without"):
            insert_se(model, "layers.1", reduction=2, input_nchw=CHW)
        assert repr(model) == text

    def test_a_deleted_block(self, foreign):
        text = repr(foreign)
        insert_se(foreign, ["stem", "layers.*"], reduction=4, input_nchw=CHW)
        del foreign.stem.se
        self.check(foreign, r"stem: its attention block was deleted.*remove_se\(network\) restores")
        with pytest.raises(InsertionError, match="stem: its attention block was deleted"):
            insert_se(foreign, "act", reduction=4, input_nchw=CHW)
        assert remove_se(foreign) == 2
        assert repr(foreign) == text

    def test_a_deleted_module_or_block_of_a_join(self, foreign):
        insert_se(foreign, "stem", reduction=4, input_nchw=CHW)
        del foreign.stem.inner
        self.check(foreign, r"stem: its own module, `\.inner`, was deleted")
        with pytest.raises(InsertionError, match=r"stem: its own module"):
            remove_se(foreign)
        model = residual_net()
        text = repr(model)
        insert_se(model, "residual", input_nchw=CHW)
        path = next(path for path, module in model.named_modules() if path.endswith(".join.se")).removesuffix(".se")
        del model.get_submodule(path).se
        self.check(model, rf"{path}: its attention block was deleted")
        remove_se(model)
        assert repr(model) == text

    def test_paths_and_patterns(self, foreign):
        insert_se(foreign, ["stem", "layers.*"], reduction=4, input_nchw=CHW)
        for inserted in ("layers.0", "layers.*", ["stem", "**"], iter(["stem"])):
            assert len(check_inserted(foreign, input_nchw=CHW, inserted=inserted)) == 3
        self.check(foreign, "inserted 'stme': no module has that name; did you mean stem", inserted="stme")
        self.check(foreign, "^head: has no attention block", inserted="head")
        for inserted in (3, [3], None):
            self.check(foreign, "check_inserted: inserted: .*expected the path of a module", inserted=inserted)

    def test_a_site_that_was_deleted(self):
        class Foldable(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

            def forward(self, x):
                return self.bn(self.conv(x)) if hasattr(self, "bn") else self.conv(x)

        model = Foldable()
        inserted = insert_se(model, "bn", reduction=2, input_nchw=CHW)
        del model.bn
        self.check(model, "^bn: has no attention block any more", inserted=inserted)

    def test_a_layer_appended_to_a_site(self, image):
        """A number counts the children; the block was one of them."""

        def stages():
            torch.manual_seed(0)
            return nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), nn.Sequential(nn.Conv2d(8, 8, 3)))

        def more():
            torch.manual_seed(1)
            return [nn.Conv2d(8, 8, 1), nn.ReLU()]

        model, expected = stages(), stages()
        inserted = insert_se(model, ["0", "1"], reduction=2, input_nchw=CHW)
        for layer, same in zip(more(), more(), strict=True):
            model[0].append(layer)
            expected[0].append(same)
        self.check(model, r"0\.se: this SE block gates the output of 0, but 4 \(ReLU\) was added", inserted=inserted)
        assert remove_se(model, "0") == 1
        assert check_inserted(model, input_nchw=CHW) == ("1",)
        remove_se(model)
        assert list(model.state_dict()) == list(expected.state_dict())
        assert repr(model) == repr(expected)
        assert torch.equal(model(image), expected(image))

    def test_a_gated_input_of_a_sequence_may_stay_first(self):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(nn.Conv2d(8, 8, 3)))
        insert_se(model, "1", placement="pre", reduction=2, input_nchw=CHW)
        model[1].append(nn.ReLU())
        assert check_inserted(model, input_nchw=CHW) == ("1",)
        remove_se(model)
        assert list(model[1]._modules) == ["0", "1"]


class TestWhatIsGiven:
    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (None, "expected a torch.nn.Module, got NoneType"),
            ("resnet18", "got str; selab.build"),
            (nn.Conv2d, "got the class Conv2d; give an instance"),
            (nn.functional.relu, "got function"),
            (3, "got int"),
        ],
    )
    def test_no_network(self, given, message):
        for name, call in (
            ("insert_se", lambda: insert_se(given, "0")),
            ("remove_se", lambda: remove_se(given)),
            ("check_inserted", lambda: check_inserted(given)),
        ):
            with pytest.raises(ModelError, match=f"^{name}: .*{message}"):
                call()

    def test_a_compiled_network(self):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        exported = torch.export.export(model, (torch.zeros(1, 3, 8, 8),))
        for call in (lambda one: insert_se(one, "0"), remove_se, check_inserted):
            with pytest.raises(ModelError, match="modules of a TorchScript network cannot be exchanged or checked"):
                call(torch.jit.script(model))
            with pytest.raises(ModelError, match="got ExportedProgram; give the network that was exported"):
                call(exported)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"input_nchw": None}, "input_nchw None: expected a shape"),
            ({"input_nchw": "abcd"}, "input_nchw 'abcd': expected a shape"),
            ({"input_nchw": (1.5, 3, 8, 8)}, r"input_nchw \(1\.5, 3, 8, 8\): expected a shape"),
            ({"inputs": 5}, "inputs 5: expected a shape"),
            ({"inputs": "x"}, "inputs 'x': expected a shape"),
        ],
    )
    def test_no_example(self, foreign, options, message):
        with pytest.raises(ModelError, match=f"insert_se: {message}"):
            insert_se(foreign, "stem", **options)
        with pytest.raises(ModelError, match=f"check_inserted: {message}"):
            check_inserted(foreign, **options)

    @pytest.mark.parametrize("given", [5, [5], [None, "stem"]])
    def test_no_paths(self, foreign, given):
        with pytest.raises(InsertionError, match=r"insert_se: sites: .*: expected the path of a module or a pattern"):
            insert_se(foreign, given, input_nchw=CHW)
        with pytest.raises(InsertionError, match=r"remove_se: paths: .*: expected the path of a module or a pattern"):
            remove_se(foreign, given)
        with pytest.raises(InsertionError, match="insert_se: sites: None"):
            insert_se(foreign, None, input_nchw=CHW)


class TestFusedNetworks:
    def test_removal_from_a_fused_network_gives_the_baseline(self, image):
        from selab.fusion.fuse import fuse

        def stage(*modules):
            return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), *modules)

        for modules in ((), (nn.ReLU(),), (nn.ReLU(inplace=False),)):
            model = nn.Sequential(stage(*modules), nn.Conv2d(8, 4, 1)).eval()
            text = repr(model)
            with torch.no_grad():
                expected = model(image)
                insert_se(model, "0", input_nchw=CHW, reduction=2)
                gated = model(image)
                fuse(model, input_nchw=CHW)
                torch.testing.assert_close(model(image), gated)
                assert remove_se(model) == 1
                assert torch.equal(model(image), expected)
                assert repr(model) == text
                insert_se(model, "0", input_nchw=CHW, reduction=2)
                fuse(model, input_nchw=CHW)
                assert remove_se(model) == 1
                assert torch.equal(model(image), expected)
