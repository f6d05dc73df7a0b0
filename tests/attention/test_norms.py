"""`check_inserted` finds a fold across a block however the BatchNorm was taken away, and no other replacement."""

import types
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from selab.attention.insert import insert_se
from selab.attention.inserted import check_inserted
from selab.attention.norms import _absolute, _relative
from selab.errors import InsertionError
from selab.fusion.fuse import fuse

CHW = (1, 3, 12, 12)
GONE = r"se: the BatchNorm behind this SE block, .*, is gone"


def network(block="se"):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1)).eval()
    nn.init.uniform_(model[1].running_var, 0.5, 2)
    keys = {"reduction": 2} if block in ("se", "cbam", "coordinate", "scse") else {}
    insert_se(model, "0", input_nchw=CHW, block=block, **keys)
    return model


def fold(model):
    norm = model[1]
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    model[0].weight.data = (model[0].weight * scale[:, None, None, None]).detach()


def sites(model):
    return check_inserted(model, input_nchw=CHW)


class Frozen(nn.Module):
    """A BatchNorm as a scale and a shift per channel."""

    def __init__(self, norm):
        super().__init__()
        scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()
        self.register_buffer("factor", scale[:, None, None])
        self.register_buffer("offset", (norm.bias - norm.running_mean * scale).detach()[:, None, None])

    def forward(self, x):
        return x * self.factor + self.offset


class Parts(nn.Module):
    """The statistics as parameters, used by functions."""

    def __init__(self, norm):
        super().__init__()
        self.mean, self.var = nn.Parameter(norm.running_mean), nn.Parameter(norm.running_var)

    def forward(self, x):
        return F.batch_norm(x, self.mean, self.var)


class Leftover(nn.Module):
    """Returns its input, or a copy, and still holds the statistics."""

    def __init__(self, norm, way):
        super().__init__()
        self.norm, self.way = norm, way

    def forward(self, x):
        return self.way(x)


class Eager(nn.BatchNorm2d):
    """A BatchNorm of one's own class."""

    def forward(self, x):
        return super().forward(x)


class Skipped(nn.BatchNorm2d):
    def forward(self, x):
        return x


def instance_forward(way):
    def change(model):
        model.get_submodule("1").forward = way
        return model

    return change


def replaced(way):
    def change(model):
        model[1] = way(model[1])
        return model

    return change


def reclassed(kind):
    def change(model):
        model[1].__class__ = kind
        return model

    return change


def traced(change=lambda model: model, after=lambda graph: graph):
    return lambda model: after(torch.fx.symbolic_trace(change(model)))


def set_identity(graph):
    graph.set_submodule("1", nn.Identity())
    return graph


def erased(graph, delete=True):
    for node in list(graph.graph.nodes):
        if node.target == "1":
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.recompile()
    if delete:
        graph.delete_all_unused_submodules()
    return graph


FOLDS = {
    "forward = identity": instance_forward(lambda x: x),
    "forward of Identity": instance_forward(nn.Identity().forward),
    "forward = clone": instance_forward(torch.clone),
    "forward = relu": instance_forward(F.relu),
    "forward = method": lambda model: instance_forward(types.MethodType(lambda _self, x: x, model[1]))(model),
    "class = Identity": reclassed(nn.Identity),
    "class = Skipped": reclassed(Skipped),
    "leftover": replaced(lambda norm: Leftover(norm, lambda x: x)),
    "leftover, copied": replaced(lambda norm: Leftover(norm, lambda x: x * 1)),
    "its activation": replaced(lambda _: nn.ReLU()),
    "PReLU": replaced(lambda _: nn.PReLU(8)),
    "traced, then replaced": traced(after=set_identity),
    "replaced, then traced": traced(replaced(lambda _: nn.Identity())),
    "traced, call erased": traced(after=erased),
    "traced, call erased, module kept": traced(after=partial(erased, delete=False)),
    "traced, in a larger network": lambda model: nn.Sequential(traced(after=set_identity)(model), nn.ReLU()),
    "traced, forward": traced(after=lambda graph: instance_forward(lambda x: x)(graph)),
}
KEPT = {
    "frozen": replaced(Frozen),
    "parts": replaced(Parts),
    "own class": reclassed(Eager),
    "frozen, in a sequence": replaced(lambda norm: nn.Sequential(Frozen(norm), nn.ReLU())),
    "frozen, elsewhere": lambda model: nn.Sequential(nn.Identity(), model[0], Frozen(model[1]), *model[2:]),
    "layer norm": replaced(lambda _: nn.GroupNorm(1, 8)),
    "instance norm": replaced(lambda _: nn.InstanceNorm2d(8)),
    "wrapped forward": lambda model: instance_forward(partial(nn.BatchNorm2d.forward, model[1]))(model),
    "hooked forward": lambda model: instance_forward(model[1].forward)(model),
    "gated": lambda model: insert_se(model, "1", input_nchw=CHW, reduction=2) and model,
    "gated frozen": lambda model: insert_se(replaced(Frozen)(model), "1", input_nchw=CHW, reduction=2) and model,
    "fused": lambda model: fuse(model, input_nchw=CHW) and model,
    "traced": traced(),
    "traced, gated": lambda model: insert_se(model, "1", input_nchw=CHW, reduction=2) and traced()(model),
    "traced, frozen": traced(replaced(nn.Sequential), after=lambda graph: graph),
    "traced, in a larger network": lambda model: nn.Sequential(traced()(model), nn.ReLU()),
    "renamed, traced": lambda model: torch.fx.symbolic_trace(nn.Sequential(nn.Identity(), *model)),
    "traced, renamed": lambda model: torch.fx.symbolic_trace(nn.Sequential(nn.ReLU(), nn.Sequential(model))),
}


class TestFolds:
    @pytest.mark.parametrize("way", FOLDS)
    def test_found(self, way):
        model = network()
        assert sites(model) == ("0",)
        fold(model)
        with pytest.raises(InsertionError, match=GONE):
            sites(FOLDS[way](model))

    @pytest.mark.parametrize("way", KEPT)
    def test_what_still_normalises_is_no_fault(self, way):
        model = KEPT[way](network())
        forwards = [module.forward for module in model.modules()]
        classes = [type(module) for module in model.modules()]
        assert any(site.endswith(("0", "1")) for site in sites(model))
        assert [type(module) for module in model.modules()] == classes
        assert [module.forward for module in model.modules()] == forwards

    def test_a_frozen_norm_computes_the_same(self):
        model, x = network(), torch.randn(2, 3, 12, 12)
        expected = model(x)
        torch.testing.assert_close(replaced(Frozen)(model)(x), expected)

    @pytest.mark.parametrize("block", ["eca", "cbam", "coordinate", "scse", "sse", "ese"])
    def test_other_blocks_in_a_graph(self, block):
        graph = torch.fx.symbolic_trace(network(block))
        assert sites(graph) == ("0",)
        with pytest.raises(InsertionError, match=GONE):
            sites(set_identity(graph))
        renamed = torch.fx.symbolic_trace(nn.Sequential(nn.Identity(), *network(block)))
        assert sites(renamed) == ("1",)

    def test_a_norm_that_is_merged_with_layers_beside_it(self):
        """The identity branch of RepVGG, arXiv 2101.03697: it merges with the convolutions beside it."""

        class Branches(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.norm, self.merged = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), None

            def forward(self, x):
                return self.conv(x) + self.norm(x) if self.merged is None else self.merged(x)

        model = nn.Sequential(nn.Conv2d(3, 8, 3), Branches(), nn.ReLU()).eval()
        inserted = insert_se(model, "0", input_nchw=CHW, reduction=2)
        model[1].merged = nn.Conv2d(8, 8, 3, padding=1)
        del model[1].conv, model[1].norm
        assert check_inserted(model, input_nchw=CHW, inserted=inserted) == ("0",)

    def test_on_real_tensors(self):
        for change, is_fault in ((FOLDS["forward = clone"], True), (KEPT["frozen"], False)):
            model = change(network())
            if is_fault:
                with pytest.raises(InsertionError, match=GONE):
                    check_inserted(model, input_nchw=CHW, on="cpu")
            else:
                assert check_inserted(model, input_nchw=CHW, on="cpu") == ("0",)


@pytest.mark.parametrize(("path", "start"), [("1", "0.se"), ("a.b.c", "a.d.se"), ("a.bn", "a.conv.x.se"), ("x", "y")])
def test_relative_paths(path, start):
    assert _absolute(_relative(path, start), start) == path
