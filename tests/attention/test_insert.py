"""Blocks at each placement: their numbers, checkpoints, removal, and what is refused."""

import copy
from functools import cache

import pytest
import torch
from catalog_networks import built
from plain_networks import Foreign
from torch import nn

from selab.attention.config import SEConfig
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

    @pytest.mark.xdist_group("catalog")
    def test_every_catalog_pair(self):
        for variant in catalog.installed().values():
            baseline = catalog.baseline_of(variant)
            if baseline is not None:
                keys, base = (set(built(one.name).model.state_dict()) for one in (variant, baseline))
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
