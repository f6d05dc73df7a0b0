"""`check_inserted`: every block runs once, and what happened where one does not."""

import copy

import pytest
import torch
from plain_networks import Foreign
from torch import nn

from selab.attention.gated_site import GatedMap
from selab.attention.insert import insert_se, remove_se
from selab.attention.inserted import check_inserted
from selab.attention.se import SqueezeExcitation
from selab.errors import InsertionError, SelabError
from selab.fusion.fuse import fuse
from selab.models import catalog
from selab.models.build import build

CHW = (1, 3, 32, 32)


def blocks(model):
    return [module for module in model.modules() if isinstance(module, SqueezeExcitation)]


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
        model = build(catalog.find("resnet18")).model.eval()
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


class Layers(nn.Module):
    """Convolution, BatchNorm and activation, twice; `between` stands before the second BatchNorm."""

    def __init__(self, between=None):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.between, self.bn2 = nn.Conv2d(8, 8, 3), between or nn.Identity(), nn.BatchNorm2d(8)
        self.act = nn.ReLU()

    def forward(self, x):
        x = self.act(self.bn1(self.conv1(x)))
        x = self.between(self.conv2(x))
        return self.act(x if self.bn2 is None else self.bn2(x))


def layers(sites=("conv1", "conv2"), **options):
    torch.manual_seed(0)
    model = Layers(**options).eval()
    for norm in (model.bn1, model.bn2):
        nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.uniform_(norm.bias, 0.5, 2)
    insert_se(model, list(sites), input_nchw=CHW, reduction=2)
    return model


def fold(model, conv, bn, how):
    """Fold a BatchNorm into a convolution as people write it, by the values of its weight."""
    conv, norm = getattr(model, conv), getattr(model, bn)
    with torch.no_grad():
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        weight = conv.weight * scale[:, None, None, None]
        shift = norm.bias - norm.running_mean * scale
        if how == "copy_":
            conv.weight.copy_(weight)
        elif how == "data":
            conv.weight.data = weight
        elif how == "mul_":
            conv.weight.mul_(scale[:, None, None, None])
        elif how == "load_state_dict":
            conv.load_state_dict({**conv.state_dict(), "weight": weight})
        if conv.bias is not None:
            conv.bias.data = conv.bias * scale + shift


class TestNormsThatAreGone:
    @pytest.mark.parametrize("how", ["copy_", "data", "mul_", "load_state_dict"])
    @pytest.mark.parametrize("gone", [nn.Identity(), None, nn.Sequential()])
    def test_folded_into_the_gated_convolution(self, how, gone, image):
        model, twin = layers(), layers()
        fold(model, "conv2", "bn2", how)
        model.bn2 = gone
        with torch.no_grad():
            assert not torch.allclose(model(image), twin(image), atol=0.01)
        message = "conv2.se: the BatchNorm behind this SE block, bn2, is gone; if it was folded into conv2, the outputs"
        for inserted in ((), ["conv2"]):
            with pytest.raises(InsertionError, match=message) as raised:
                check_inserted(model, input_nchw=CHW, inserted=inserted)
        assert "\n" not in str(raised.value)

    def test_also_in_a_copy_and_in_a_larger_network(self):
        model = layers()
        model.bn1 = nn.Identity()
        for one, site in ((copy.deepcopy(model), "conv1"), (nn.Sequential(nn.Identity(), model), "1.conv1")):
            with pytest.raises(InsertionError, match=f"{site}.se: the BatchNorm behind"):
                check_inserted(one, input_nchw=CHW)

    def test_deleted_from_a_sequence(self):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
        insert_se(model, "0", input_nchw=CHW, reduction=2)
        del model[1]
        with pytest.raises(InsertionError, match=r"0.se: the BatchNorm behind this SE block, 1, is gone"):
            check_inserted(model, input_nchw=CHW)

    def test_behind_a_sequence(self):
        model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3)), nn.BatchNorm2d(8)).eval()
        insert_se(model, "0", input_nchw=CHW, reduction=2)
        model[1] = nn.Identity()
        with pytest.raises(InsertionError, match=r"0.se: the BatchNorm behind this SE block, 1, is gone"):
            check_inserted(model, input_nchw=CHW)

    @pytest.mark.parametrize(
        "change",
        [
            lambda model: nn.SyncBatchNorm.convert_sync_batchnorm(model),
            lambda model: copy.deepcopy(model),
            lambda model: nn.Sequential(model),
            lambda model: nn.Sequential(*model.children(), nn.ReLU()),
            lambda model: torch.fx.symbolic_trace(model),
            lambda model: fuse(model, input_nchw=CHW) and model,
            lambda model: setattr(model, "bn2", nn.GroupNorm(2, 8)) or model,
            lambda model: setattr(model, "bn2", nn.Sequential(model.bn2, nn.ReLU())) or model,
            lambda model: insert_se(model, "bn2", input_nchw=CHW, reduction=2) and model,
            lambda model: remove_se(model, ["conv1"]) and model,
        ],
    )
    def test_what_keeps_a_normalisation_is_no_fault(self, change):
        sites = check_inserted(layers(), input_nchw=CHW)
        assert sites == ("conv1", "conv2")
        found = check_inserted(change(layers()), input_nchw=CHW)
        assert "conv2" in " ".join(found) or found == ("0", "2")

    @pytest.mark.parametrize("between", [nn.ReLU(), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 1)])
    def test_a_norm_that_does_not_read_the_block_may_go(self, between):
        model = layers(["conv2"], between=between)
        model.bn2 = nn.Identity()
        assert check_inserted(model, input_nchw=CHW) == ("conv2",)

    def test_inserting_again_after_the_norm_was_removed(self):
        model = layers()
        model.bn2 = nn.Identity()
        assert remove_se(model, ["conv2"]) == 1
        insert_se(model, "conv2", input_nchw=CHW, reduction=2)
        assert check_inserted(model, input_nchw=CHW) == ("conv1", "conv2")
