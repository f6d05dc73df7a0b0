"""`selab.fuse`: what it changes computes the same, under the same keys, and says what it did."""

import copy
import subprocess
import sys

import pytest
import torch
from plain_networks import ReluJoin
from torch import nn
from torch.utils._pytree import tree_leaves

import selab
from selab.attention.insert import insert_se
from selab.attention.se import GatedJoin, SqueezeExcitation
from selab.errors import ModelError
from selab.fusion.fuse import FusedBlock, FusedJoin, Fusion, fuse, runtimes
from selab.kernels import cpu
from selab.kernels.deferred_bn import DeferredNorm
from selab.models import catalog
from selab.models.build import build

SMALL = (1, 3, 64, 64)


def built(name, size=64):
    return build(catalog.find(name), input_chw=(3, size, size)).model


def brought_to_life(model):
    """Random statistics, so that every layer does something in inference."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return model


def assert_same(model, fused, example):
    with torch.inference_mode():
        expected, found = model(example.clone()), fused(example)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(("model", "what"), [(3, "int"), ("resnet18", "str"), (nn.ReLU, "type")])
def test_what_is_no_network_is_told_in_one_line(model, what):
    with pytest.raises(ModelError, match=rf"^selab\.fuse: expected a torch\.nn\.Module, got {what}$"):
        fuse(model)


@pytest.mark.parametrize(
    "name", ["se_mobilenet", "se_resnet18", "se_resnet50", "se_shufflenet", "se_small_cnn", "resnet18"]
)
def test_fused_networks_compute_the_same_under_the_same_keys(name):
    size = 32 if name == "se_small_cnn" else 64
    model = brought_to_life(built(name, size).eval())
    fused = copy.deepcopy(model)
    fusion = fuse(fused, input_nchw=(1, 3, size, size))
    assert list(fused.state_dict()) == list(model.state_dict())
    assert not fusion.in_place_reason
    assert not [one for one in fusion.blocks if one.reason]
    for memory_format in (torch.contiguous_format, torch.channels_last):
        example = torch.randn(2, 3, size, size).contiguous(memory_format=memory_format)
        kept = example.clone()
        assert_same(model, fused, example)
        assert torch.equal(example, kept)


@pytest.mark.parametrize("name", ["se_mobilenet", "se_resnet18", "resnet18"])
def test_fused_networks_have_the_same_gradients(name):
    # In double precision: over maps of two by two positions batch normalisation multiplies every rounding.
    model = built(name).double().train()
    fused = copy.deepcopy(model)
    fuse(fused, input_nchw=SMALL)
    example = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    for each in (model, fused):
        torch.manual_seed(0)
        each(example).square().sum().backward()
    for (key, one), (_, two) in zip(model.named_parameters(), fused.named_parameters(), strict=True):
        torch.testing.assert_close(two.grad, one.grad, rtol=0, atol=1e-6 * float(one.grad.abs().max()), msg=key)


def test_what_was_done_is_told():
    mobile = fuse(built("se_mobilenet"), input_nchw=SMALL)
    assert len(mobile.blocks) == 13
    assert all(one.absorbed and one.in_place and not one.joined for one in mobile.blocks)
    residual = fuse(built("se_resnet18"), input_nchw=SMALL)
    assert len(residual.blocks) == 8
    assert all(one.joined and one.in_place and not one.absorbed for one in residual.blocks)
    plain = fuse(built("resnet18"), input_nchw=SMALL)
    assert (plain.joins, plain.blocks) == (8, ())


def test_blocks_without_a_fast_way_stay_and_say_why():
    model = build(catalog.find("resnet18+squeeze=max"), input_chw=(3, 64, 64)).model.eval()
    fused = copy.deepcopy(model)
    assert {one.reason for one in fuse(fused, input_nchw=SMALL).blocks} == {"unsupported squeeze: max"}
    assert_same(model, fused, torch.randn(SMALL))


def test_fusing_again_changes_nothing():
    model = built("se_mobilenet").eval()
    fuse(model, input_nchw=SMALL)
    twin = copy.deepcopy(model)
    fuse(twin, input_nchw=SMALL)
    assert_same(model, twin, torch.randn(SMALL))
    joined = built("resnet18")
    fuse(joined, input_nchw=SMALL)
    assert fuse(joined, input_nchw=SMALL).joins == 0


class ReadAgain(nn.Module):
    """The block's input is needed after it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.se = SqueezeExcitation(8, 2)

    def forward(self, x):
        x = self.conv(x)
        return self.se(x) + x


class Returned(ReadAgain):
    def forward(self, x):
        x = self.conv(x)
        return self.se(x), x


class OfTheInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.se = SqueezeExcitation(3, 1)

    def forward(self, x):
        return self.se(x)


class ThroughAView(ReadAgain):
    def forward(self, x):
        x = self.conv(x)
        seen = x.flatten(1)
        return self.se(x).flatten(1) * seen


class Kept(ReadAgain):
    def forward(self, x):
        self.kept = self.conv(x)
        return self.se(self.kept)


@pytest.mark.parametrize("kind", [ReadAgain, Returned, OfTheInput, ThroughAView, Kept])
def test_an_input_that_is_needed_again_is_left_alone(kind):
    model = kind().eval()
    fused = copy.deepcopy(model)
    fusion = fuse(fused, input_nchw=(1, 3, 9, 9))
    assert [one.in_place for one in fusion.blocks] == [False]
    example = torch.randn(2, 3, 9, 9)
    with torch.inference_mode():
        for found, expected in zip(
            tree_leaves(fused(example.clone())),
            tree_leaves(model(example.clone())),
            strict=True,
        ):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("placement", ["pre", "post", "identity", "3x3"])
def test_other_placements_compute_the_same(placement):
    model = brought_to_life(built("resnet18"))
    insert_se(model, "residual", placement=placement, input_nchw=SMALL)
    for module in model.modules():
        if isinstance(module, SqueezeExcitation):
            module.impl = "reference"
    fused = copy.deepcopy(model.eval())
    fuse(fused, input_nchw=SMALL)
    assert_same(model, fused, torch.randn(SMALL))


def test_without_a_pass_on_the_meta_device_nothing_is_overwritten_and_the_reason_is_told():
    model = built("se_resnet18").eval()
    fused = copy.deepcopy(model)
    fusion = fuse(fused, input_nchw=(1, 5, 64, 64))
    assert fusion.in_place_reason.startswith(
        "the network fails on fake tensors with an input of shape (1, 5, 64, 64): "
    )
    assert not any(one.in_place for one in fusion.blocks)
    assert_same(model, fused, torch.randn(SMALL))


def test_a_hook_on_a_join_still_sees_it():
    model = built("resnet18").eval()
    fuse(model, input_nchw=SMALL)
    join = next(module for module in model.modules() if isinstance(module, FusedJoin))
    seen = []
    join.inner.register_forward_hook(lambda *_: seen.append(1))
    model(torch.randn(SMALL))
    assert seen


def test_a_join_and_its_block_are_one_pass_unless_somebody_looks():
    model = built("se_resnet18").eval()
    fuse(model, input_nchw=SMALL)
    join = next(module for module in model.modules() if isinstance(module, GatedJoin))
    if cpu.native_reason():
        pytest.skip(cpu.native_reason())
    seen = []
    handle = join.se.register_forward_hook(lambda *_: seen.append(1))
    model(torch.randn(SMALL))
    assert seen
    handle.remove()
    seen.clear()
    model(torch.randn(SMALL))
    assert not seen


def test_fuse_is_there_without_torch_being_loaded_for_those_who_do_not_use_it():
    code = "import sys, selab; assert 'torch' not in sys.modules; selab.fuse; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'melt'"):
        _ = selab.melt


def test_how_each_block_would_run_is_known_without_running_it():
    model = built("se_resnet18")
    before = copy.deepcopy(model.state_dict())
    found = runtimes(model, SMALL)
    assert [one.map_nchw for one in found][::2] == [(1, 64, 16, 16), (1, 128, 8, 8), (1, 256, 4, 4), (1, 512, 2, 2)]
    assert {one.impl for one in found} == {"torch" if cpu.native_reason() else "native"}
    halves = runtimes(model, SMALL, dtype=torch.bfloat16)
    assert {(one.impl, one.reason) for one in halves} == {("reference", "unsupported dtype on a CPU: bfloat16")}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(isinstance(module, FusedJoin) for module in model.modules())


class Plain(nn.Module):
    """What a trace has to see through; each of the following puts these parts together otherwise."""

    expected = (("norm", "relu"),)

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU()
        self.more, self.other, self.se = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), SqueezeExcitation(8, 2)
        self.join = Join()

    def forward(self, x):
        return self.relu(self.norm(self.conv(x)))


class Join(nn.Module):
    formula = "relu(branch + shortcut)"

    def forward(self, branch, shortcut):
        return torch.relu(branch + shortcut)


class OutputReadTwice(Plain):
    expected = ()

    def forward(self, x):
        x = self.norm(self.conv(x))
        return self.relu(x) + x


class InputReadAgain(Plain):
    """Pre-activation."""

    expected = (("other", "se"),)

    def forward(self, x):
        x = self.conv(x)
        return self.se(self.other(self.more(self.relu(self.norm(x))))) + x


class InputViewedBefore(Plain):
    expected = ()

    def forward(self, x):
        x = self.conv(x)
        seen = x.flatten(1)
        return self.relu(self.norm(x)).flatten(1) + seen


class CalledTwice(Plain):
    expected = ()

    def forward(self, x):
        x = self.relu(self.norm(self.conv(x)))
        return self.se(self.norm(self.more(x)))


class SharedRelu(Plain):
    expected = (("other", "se"),)

    def forward(self, x):
        x = self.relu(self.norm(self.conv(x)))
        return self.relu(self.se(self.other(self.more(x))))


class AfterAnother(Plain):
    """A BatchNorm's output that a BatchNorm reads."""

    expected = ()

    def forward(self, x):
        return self.relu(self.other(self.norm(self.conv(x))))


class NormReturned(Plain):
    expected = ()

    def forward(self, x):
        x = self.norm(self.conv(x))
        return self.relu(x), x


class InputReturned(Plain):
    expected = ()

    def forward(self, x):
        x = self.conv(x)
        return self.relu(self.norm(x)), x


class OfTheNetworksInput(Plain):
    expected = ()

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.relu(self.norm(x))


class JoinedWithItself(Plain):
    expected = ()

    def forward(self, x):
        x = self.norm(self.conv(x))
        return self.join(x, x)


class ReadByAFunction(Plain):
    expected = ()

    def forward(self, x):
        return torch.relu(self.norm(self.conv(x)))


class NormKept(Plain):
    """Kept in an attribute, for whoever asks after the pass."""

    expected = (("other", "se"),)

    def forward(self, x):
        x = self.norm(self.conv(x))
        self.kept = x
        return self.se(self.other(self.more(self.relu(x))))


class AsAShortcut(Plain):
    expected = (("norm", "join"),)

    def forward(self, x):
        x = self.conv(x)
        return self.join(self.norm(self.more(x)), self.other(x))


class WithoutStatistics(Plain):
    expected = ()

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(8, track_running_stats=False)


class WithoutWeights(Plain):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(8, affine=False)


class OfAnotherClass(Plain):
    expected = ()

    def __init__(self):
        super().__init__()

        class Mine(nn.BatchNorm2d):
            pass

        self.norm = Mine(8)


class Hooked(Plain):
    expected = ()

    def __init__(self):
        super().__init__()
        self.conv.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize("kind", [Plain, *Plain.__subclasses__()])
def test_a_batchnorm_is_left_to_the_one_who_reads_it_alone(kind):
    model = brought_to_life(kind().eval())
    fused = copy.deepcopy(model)
    fusion = fuse(fused, input_nchw=(1, 3, 9, 8))
    named = {module: path for path, module in fused.named_modules()}
    found = tuple(
        (path, named[module.consumers[0]]) for module, path in named.items() if isinstance(module, DeferredNorm)
    )
    assert found == kind.expected
    assert fusion.norms == len(found)
    assert [one.normalising for one in fusion.blocks] == [("other", "se") in found]
    for _ in range(3):
        example = torch.randn(2, 3, 9, 8)
        with torch.inference_mode():
            ours, theirs = fused(example.clone()), model(example.clone())
            for one, two in zip(tree_leaves(ours), tree_leaves(theirs), strict=True):
                torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
            if kind is NormKept:
                torch.testing.assert_close(fused.kept, model.kept)


def test_fusing_again_takes_back_what_holds_no_longer():
    model = brought_to_life(Plain().eval())
    fused = copy.deepcopy(model)
    assert fuse(fused, input_nchw=(1, 3, 9, 8)).norms == 1
    assert_same(model, fused, torch.randn(2, 3, 9, 8))
    model.__class__ = fused.__class__ = OutputReadTwice
    assert fuse(fused, input_nchw=(1, 3, 9, 8)).norms == 0
    assert type(fused.norm) is nn.BatchNorm2d
    assert_same(model, fused, torch.randn(2, 3, 9, 8))


@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize("name", ["se_mobilenet", "se_resnet18", "resnet18"])
def test_without_blocks_what_stands_around_them_is_cheap_alone(name, blocks):
    # In MobileNet every second convolution stands before a block; a ResNet-18 has two BatchNorms in each of its eight
    # blocks and one before them, and three in shortcuts, which are added.
    inner = {"se_mobilenet": 13, "se_resnet18": 8, "resnet18": 0}[name]
    norms = {"se_mobilenet": 27, "se_resnet18": 17, "resnet18": 17}[name]
    model = brought_to_life(built(name).eval())
    fused = copy.deepcopy(model)
    fusion = fuse(fused, input_nchw=SMALL, blocks=blocks)
    assert fusion.norms == (norms if blocks or name == "se_mobilenet" else norms - inner)
    assert len(fusion.blocks) == inner * blocks
    assert all(one.normalising for one in fusion.blocks)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        assert_same(model, fused, torch.randn(2, 3, 64, 64).contiguous(memory_format=memory_format))


@pytest.mark.parametrize("edge", ["branch", "shortcut", "output"])
@pytest.mark.parametrize("blocks", [True, False])
def test_on_each_edge_of_a_join_the_batchnorms_before_it_are_done(edge, blocks):
    class Edge(Plain):
        def __init__(self):
            super().__init__()
            self.join = GatedJoin(Join(), SqueezeExcitation(8, 2), edge)
            self.start = nn.Conv2d(3, 8, 1)

        def forward(self, x):
            return self.join(self.norm(self.conv(x)), self.other(self.start(x)))

    model = brought_to_life(Edge().eval())
    fused = copy.deepcopy(model)
    # A shortcut is read by its block, or by nobody who could normalise it.
    read = {"branch": int(blocks), "shortcut": 1 + int(blocks), "output": 1}[edge]
    assert fuse(fused, input_nchw=(1, 3, 9, 8), blocks=blocks).norms == read
    for _ in range(3):
        assert_same(model, fused, torch.randn(2, 3, 9, 8))


def test_what_was_fused_is_told_and_what_was_not_and_why():
    blocks = (
        FusedBlock(path="0", kind="SE", joined=True, in_place=True),
        FusedBlock(path="1", kind="SE", absorbed=True),
        FusedBlock(path="2", kind="SE", reason="its gate is Tanh"),
    )
    assert str(Fusion(blocks=blocks, joins=2, norms=3, in_place_reason="no pass")) == (
        "fused 2 SE blocks (1 with their join, 1 with the ReLU before them, 1 in place) and 2 residual joins, folded 3 "
        "BatchNorms; left 1 SE block unchanged: its gate is Tanh; no pass"
    )
    assert str(Fusion(blocks=(), joins=0)) == "nothing to fuse"
    mobile = FusedBlock(path="0", kind="SE", in_place=True)
    assert repr(Fusion(blocks=(mobile,) * 13, joins=0, norms=10)) == (
        "fused 13 SE blocks (in place) and folded 10 BatchNorms"
    )
    assert str(Fusion(blocks=(mobile,), joins=1)) == "fused 1 SE block (in place) and 1 residual join"


@pytest.mark.parametrize("shape", ["abc", (1, 3), (1, 3, 0, 8), (1, 3, 8.0, 8), 224])
def test_what_is_no_shape_of_images_is_refused(shape):
    with pytest.raises(ModelError, match=r"selab\.fuse: input_nchw .*: expected four sizes \(N, C, H, W\)"):
        fuse(nn.Sequential(nn.Conv2d(3, 4, 1)), input_nchw=shape)


class Observed(nn.Module):
    """A block behind a convolution, one in a join, and a join alone."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3), SqueezeExcitation(8, 2))
        self.branch = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Sigmoid())
        self.gated = GatedJoin(ReluJoin(), SqueezeExcitation(8, 2), "branch")
        self.last, self.join = nn.Conv2d(8, 8, 1), ReluJoin()

    def forward(self, x):
        x = self.first(x)
        x = self.gated(self.branch(x), x)
        return self.join(self.last(x), x)


@pytest.mark.parametrize("decided", [False, True])
@pytest.mark.parametrize(
    ("path", "of_input"),
    [
        ("first.0", False),
        ("first.1", True),
        ("branch.1", False),
        ("branch", False),
        ("gated", True),
        ("gated.se", True),
        ("last", False),
        ("join", True),
    ],
)
def test_a_map_that_a_hook_keeps_is_not_written_over(path, of_input, decided):
    model = Observed().eval()
    fused = copy.deepcopy(model)
    fuse(fused, input_nchw=(1, 3, 9, 9))
    x = torch.randn(2, 3, 9, 9)
    kept = []
    with torch.no_grad():
        if decided:
            fused(x)
        for network in (model, fused):
            hook = (
                (lambda _, args, _out: kept.append(args[0])) if of_input else (lambda _, _args, out: kept.append(out))
            )
            network.get_submodule(path).register_forward_hook(hook)
            kept.append(network(x))
    expected, found = kept[:2], kept[2:]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
