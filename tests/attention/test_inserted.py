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


class Residual(nn.Module):
    """relu(bn(conv(x)) + x), with the children that selab takes for those of a residual block."""

    class Add(nn.Module):
        def forward(self, branch, shortcut):
            return (branch + shortcut).relu()

    after_3x3 = "0"

    def __init__(self, branch=None):
        super().__init__()
        self.branch = branch or nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.shortcut, self.join = nn.Identity(), self.Add()

    def forward(self, x):
        return self.join(self.branch(x), self.shortcut(x))


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return self.conv(x)


def residual(branch=None):
    return nn.Sequential(nn.Conv2d(3, 8, 3), Residual(branch), Residual()).eval()


class TestSitesOfResidualBlocks:
    """A block is known under the path that `insert_se` returned."""

    def check(self, model, inserted, expected):
        sites = [one.path for one in inserted]
        assert sites == expected
        assert check_inserted(model, input_nchw=CHW, inserted=inserted) == tuple(expected)
        kept = copy.deepcopy(model)
        assert check_inserted(kept, input_nchw=CHW, inserted=inserted) == tuple(expected)
        assert check_inserted(nn.Sequential(kept), input_nchw=CHW) == tuple(f"0.{site}" for site in expected)
        for index, site in reversed(list(enumerate(sites))):
            assert remove_se(model, site) == 1
            gone = ", ".join(sites[index:]).replace(".", r"\.")
            with pytest.raises(InsertionError, match=f"^{gone}: has no attention block any more"):
                check_inserted(model, input_nchw=CHW, inserted=inserted)
        assert not blocks(model)

    @pytest.mark.parametrize("branch", [None, Branch])
    @pytest.mark.parametrize(
        ("sites", "placement"),
        [
            (["1.branch", "2.branch"], "standard"),
            (["1.branch", "2.branch"], "pre"),
            (["1", "2.branch"], "standard"),
            (["1", "2"], "standard"),
            (["1", "2"], "pre"),
            (["1", "2"], "post"),
            (["1", "2"], "identity"),
            (["1.join", "2.shortcut"], "standard"),
        ],
    )
    def test_each_placement_and_child(self, sites, placement, branch):
        model = residual(branch and branch())
        inserted = insert_se(model, sites, placement=placement, reduction=2, input_nchw=CHW)
        self.check(model, inserted, sites)

    @pytest.mark.parametrize(("branch", "after"), [(None, "0"), (Branch, "conv")])
    def test_inside_the_branch(self, branch, after):
        model = residual(branch and branch())
        model[1].after_3x3 = after
        self.check(model, insert_se(model, "1", placement="3x3", reduction=2, input_nchw=CHW), ["1"])
        inserted = insert_se(model, f"1.branch.{after}", reduction=2, input_nchw=CHW)
        self.check(model, inserted, [f"1.branch.{after}"])

    @pytest.mark.parametrize("name", ["resnet18", "shufflenet"])
    def test_automatic_sites_of_the_catalog(self, name):
        model = build(catalog.find(name)).model.eval()
        shape = (1, 3, 64, 64)
        inserted = insert_se(model, "auto", reduction=4, input_nchw=shape)
        sites = tuple(one.path for one in inserted)
        assert check_inserted(model, input_nchw=shape, inserted=inserted) == sites
        fuse(model, input_nchw=shape)
        assert check_inserted(model, input_nchw=shape, inserted=inserted) == sites
        assert remove_se(model, [sites[0]]) == 1
        assert remove_se(model) == len(sites) - 1

    def test_a_graph_of_fx(self):
        for sites in (["1", "2"], ["1.branch", "2.branch"]):
            model = residual()
            inserted = insert_se(model, sites, reduction=2, input_nchw=CHW)
            graph = torch.fx.symbolic_trace(model)
            assert check_inserted(graph, input_nchw=CHW, inserted=inserted) == tuple(sites)

    def test_a_branch_that_was_moved(self):
        model = residual()
        insert_se(model, "1", placement="pre", reduction=2, input_nchw=CHW)
        model[1] = model[1].branch
        assert check_inserted(model, input_nchw=CHW) == ("1",)
        assert remove_se(model, "1") == 1


class Wrapper(nn.Module):
    """A network with what prepares its input."""

    def __init__(self, net):
        super().__init__()
        self.prepare, self.net = nn.Identity(), net

    def forward(self, x):
        return self.net(self.prepare(x))


class TestInsideWrappers:
    @pytest.mark.parametrize(
        ("wrap", "prefix"),
        [
            (nn.DataParallel, "module"),
            (torch.optim.swa_utils.AveragedModel, "module"),
            (Wrapper, "net"),
            (lambda net: nn.DataParallel(Wrapper(net)), "module.net"),
        ],
    )
    def test_the_paths_are_those_of_the_network(self, wrap, prefix):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
        inserted = insert_se(model, ["0", "2"], reduction=2, input_nchw=CHW)
        wrapped = wrap(model)
        found = (f"{prefix}.0", f"{prefix}.2")
        for given in (inserted, found, ["?"], "2"):
            assert check_inserted(wrapped, input_nchw=CHW, inserted=given) == found
        assert remove_se(wrapped, inserted[1].path) == 1
        message = f"^{prefix}.2: has no attention block any more"
        with pytest.raises(InsertionError, match=message.replace(".", r"\.")):
            check_inserted(wrapped, input_nchw=CHW, inserted=inserted)
        with pytest.raises(InsertionError, match="inserted '7': no module has that name"):
            check_inserted(wrapped, input_nchw=CHW, inserted=["7"])
        assert remove_se(wrapped, f"{prefix}.0") == 1

    def test_the_network_s_own_names_come_first(self):
        model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())).eval()
        insert_se(model, ["0", "0.0"], reduction=2, input_nchw=CHW)
        assert remove_se(model, "0") == 1
        with pytest.raises(InsertionError, match=r"^0: has no attention block any more"):
            check_inserted(model, input_nchw=CHW, inserted="0")
        assert check_inserted(model, input_nchw=CHW, inserted="0.0") == ("0.0",)

    def test_another_layer_beside_it_makes_no_wrapper(self):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
        inserted = insert_se(model, "0", reduction=2, input_nchw=CHW)
        other = nn.ModuleDict({"net": model, "head": nn.Linear(8, 2)})
        other.forward = lambda x: other["head"](model(x).mean((2, 3)))
        with pytest.raises(InsertionError, match=r"inserted '0': no module has that name; known: .*net\.0"):
            check_inserted(other, input_nchw=CHW, inserted=[one.path for one in inserted])
