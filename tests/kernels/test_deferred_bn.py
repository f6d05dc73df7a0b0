"""Maps that wait for their BatchNorm: normalised once, by the reader behind it or for anybody else."""

import copy
import threading
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from selab.attention.insert import insert_se
from selab.attention.se import GatedJoin, SqueezeExcitation
from selab.fusion.fuse import fuse
from selab.kernels import cpu
from selab.kernels.deferred_bn import (
    DeferredNorm,
    DeferredTensor,
    consume,
    defer,
    materialize,
    pending_norm,
    supported,
)
from selab.kernels.residual import ADD_RELU, FusedActivation
from selab.kernels.swap import swap
from selab.models.build import build
from selab.models.catalog import find

pytestmark = pytest.mark.skipif(bool(cpu.native_reason()), reason=cpu.native_reason() or "it is there")
SIZE = (2, 3, 10, 9)


class Join(nn.Module):
    formula = ADD_RELU

    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, branch, shortcut):
        return self.relu(branch + shortcut)


class Network(nn.Module):
    """A BatchNorm before a ReLU, one before a block in its join, one before a join."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.branch = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
        self.gated = GatedJoin(Join(), SqueezeExcitation(8, 2), "branch")
        self.last, self.last_norm, self.join = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), Join()

    def forward(self, x):
        x = self.relu(self.norm(self.conv(x)))
        x = self.gated(self.branch(x), x)
        return self.join(self.last_norm(self.last(x)), x)


def lively(model):
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model.eval()


def pair():
    """A network, and its copy fused, which has decided already."""
    model = lively(Network())
    fused = copy.deepcopy(model)
    assert fuse(fused, input_nchw=SIZE).norms == 3
    with torch.no_grad():
        fused(torch.randn(SIZE))
        assert all("_cached_call" in one.__dict__ for one in (fused.norm, fused.relu, fused.gated.se, fused.join))
    return model, fused


def assert_same(model, fused, call=lambda network, x: network(x), context=torch.no_grad):
    for _ in range(3):
        x = torch.randn(SIZE)
        with context():
            found, expected = call(fused, x.clone()), call(model, x.clone())
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def deferred(relu=None):
    norm = lively(nn.BatchNorm2d(8))
    defer(norm, (relu or nn.Identity(),))
    return norm


def normalised(norm, x):
    return nn.functional.batch_norm(
        x.double(),
        *(one.double() for one in (norm.running_mean, norm.running_var, norm.weight, norm.bias)),
        eps=norm.eps,
    )


class TestWaiting:
    def test_a_map_is_handed_on_as_it_came_and_taken_once(self):
        norm, x = deferred(), torch.randn(2, 8, 3, 3)
        with torch.no_grad():
            for _ in range(2):
                kept = x.clone()
                assert norm(x) is x
                assert type(x) is DeferredTensor
                assert pending_norm(x) is norm
                facts = consume(x)
                assert facts.mean is norm.running_mean
                assert (consume(x), pending_norm(x), type(x)) == (None, None, torch.Tensor)
                assert torch.equal(x, kept)

    def test_one_that_is_settled_has_memory_of_its_own(self):
        norm, x = deferred(), torch.randn(2, 8, 3, 3)
        kept = x.clone()
        with torch.no_grad():
            found = materialize(norm(x))
            torch.testing.assert_close(found.double(), normalised(norm, kept), rtol=1e-5, atol=1e-5)
            assert torch.equal(x, kept)
            assert materialize(found) is found

    @pytest.mark.parametrize(
        "read",
        [
            torch.clone,
            lambda x: x * 1,
            lambda x: x.numpy().copy(),
            lambda x: torch.stack([x, x])[1],
            lambda x: torch.jit.script(nn.Identity())(x) + 0,
            lambda x: copy.deepcopy(x),
            lambda x: nn.functional.dropout(x, training=False),
            lambda x: torch.ops.aten.add(x, 0),
        ],
    )
    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
    def test_whoever_does_not_know_finds_it_normalised(self, read, context):
        norm, x = deferred(), torch.randn(2, 8, 3, 3)
        expected = normalised(norm, x)
        with context():
            norm(x.clone())
            handed = norm(x.clone())
        assert type(handed) is DeferredTensor
        for one in (read(handed), handed):
            torch.testing.assert_close(torch.as_tensor(one).double(), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("changed", [lambda mean: mean.double(), lambda mean: mean[:4]], ids=["dtype", "channels"])
    def test_statistics_of_another_kind_are_torch_s_to_refuse(self, changed):
        norm, relu = deferred(), nn.ReLU()
        swap(relu, FusedActivation)
        norm.consumers, relu.can_overwrite = (relu,), True
        with torch.no_grad():
            relu(norm(torch.randn(2, 8, 3, 3)))
            handed = norm(torch.randn(2, 8, 3, 3))
            norm._buffers["running_mean"] = changed(norm.running_mean)
            with pytest.raises(RuntimeError):
                relu(handed)

    def test_statistics_that_are_not_dense_are_not_read_natively(self):
        norm, x = deferred(), torch.randn(2, 8, 3, 3)
        norm.running_mean = torch.randn(16)[::2]
        expected = normalised(norm, x)
        with torch.no_grad():
            assert type(norm(x)) is torch.Tensor
            norm.running_mean = norm.running_mean.clone()
            handed = norm(x)
            norm._buffers["running_mean"] = torch.stack([norm.running_mean, norm.running_var], 1)[:, 0]
            found = supported(handed)
        assert pending_norm(found) is None
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)

    def test_what_comes_in_waiting_is_settled_first(self):
        one, two, x = deferred(), deferred(), torch.randn(2, 8, 3, 3)
        expected = normalised(two, normalised(one, x))
        with torch.no_grad():
            torch.testing.assert_close(materialize(two(one(x))).double(), expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(
        "how",
        ["training", "gradients", "hook", "hook behind", "autocast", "double", "sparse", "subclass", "parametrised"],
    )
    def test_nothing_waits_where_it_is_somebody_else_s_business(self, how):
        relu = nn.ReLU()
        norm, x = deferred(relu), torch.randn(2, 8, 4, 4)
        with torch.no_grad():
            assert type(norm(x.clone())) is DeferredTensor
        if how == "training":
            norm.train()
        elif how.startswith("hook"):
            (relu if how == "hook behind" else norm).register_forward_hook(lambda *_: None)
        elif how == "double":
            norm, x = norm.double(), x.double()
        elif how == "sparse":
            x = x[:, :, ::2]
        elif how == "subclass":
            x = nn.Parameter(x)
        elif how == "parametrised":
            parametrize.register_parametrization(norm, "weight", nn.Identity())
        with nullcontext() if how == "gradients" else torch.no_grad(), torch.autocast("cpu", enabled=how == "autocast"):
            out = norm(x)
        assert type(out) is torch.Tensor
        assert out is not x

    def test_a_symbolic_trace_has_it(self):
        model = nn.Sequential(deferred(), nn.ReLU())
        x = torch.randn(2, 8, 3, 3)
        with torch.no_grad():
            found = torch.fx.symbolic_trace(model)(x)
        torch.testing.assert_close(found.double(), normalised(model[0], x).relu(), rtol=1e-5, atol=1e-5)


def replaced(path, kind):
    def change(model):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, kind())

    return change


def patched(model):
    model.relu.forward = torch.nn.functional.gelu


def inserted(model):
    insert_se(model, "norm", reduction=2, init="identity", input_nchw=SIZE)


def trained(model):
    model.train()
    model(torch.linspace(-1, 1, 540).reshape(SIZE))
    model.eval()


def without_statistics(model):
    model.norm.running_mean = model.norm.running_var = None


def with_a_plain_attribute(model):
    mean = model.norm.running_mean + 1
    del model.norm.running_mean
    model.norm.running_mean = mean


class Difference(nn.Module):
    def forward(self, branch, shortcut):
        return branch - shortcut


CHANGES = {
    "another activation": replaced("relu", nn.SiLU),
    "another forward pass": patched,
    "no block": replaced("gated.se", nn.Identity),
    "a block more": inserted,
    "another join": replaced("join", Difference),
    "trained on": trained,
    "eps": lambda model: setattr(model.norm, "eps", 0.5),
    "weight": lambda model: model.norm.weight.data.mul_(3),
    "weight's data": lambda model: setattr(model.norm.weight, "data", torch.linspace(0, 2, 8)),
    "statistics": lambda model: setattr(model.norm, "running_mean", torch.linspace(0, 2, 8)),
    "no statistics": without_statistics,
    "a plain attribute": with_a_plain_attribute,
    "loaded": lambda model: model.load_state_dict({key: value * 2 for key, value in model.state_dict().items()}),
    "parametrised": lambda model: parametrize.register_parametrization(model.norm, "weight", nn.Softplus()),
    "double": lambda model: (model.double(), model.float()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_network_that_is_changed_after_it_decided_computes_what_it_then_says(change):
    model, fused = pair()
    change(model)
    change(fused)
    assert_same(model, fused)


def outputs(path, keep):
    """A hook that comes late, and reads what a module returns or keeps it."""

    def call(model, x):
        seen = []
        with model.get_submodule(path).register_forward_hook(
            lambda _module, _args, out: seen.append(out if keep else out.mean())
        ):
            return model(x), seen

    return call


def inputs(path):
    def call(model, x):
        seen = []
        with model.get_submodule(path).register_forward_pre_hook(lambda _module, args: seen.append(args[0].mean())):
            return model(x), seen

    return call


PARTS = ["conv", "norm", "relu", "branch", "branch.0", "branch.1", "gated", "gated.se", "last", "last_norm", "join"]


@pytest.mark.parametrize("path", PARTS)
def test_a_hook_that_comes_late_reads_what_there_would_be_without_fuse(path):
    model, fused = pair()
    assert_same(model, fused, outputs(path, keep=False))
    assert_same(model, fused, inputs(path))


@pytest.mark.parametrize("path", ["conv", "branch.0", "last"])
def test_a_hook_that_keeps_what_a_convolution_returns_keeps_that(path):
    assert_same(*pair(), outputs(path, keep=True))


def test_hooks_on_the_join_around_a_join_are_seen():
    _, fused = pair()
    seen = []
    fused.gated.inner.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        fused(torch.randn(SIZE))
    assert seen


def under_autocast(model, x):
    def within(module):
        forward = module.forward
        module.forward = torch.autocast("cpu", torch.bfloat16)(forward)
        return module, forward

    readers = [within(module) for module in (model.relu, model.gated, model.join)]
    out = model(x)
    for module, _ in readers:
        del module.forward
    return out


def with_other_statistics(model, x):
    other = {"norm.running_mean": torch.linspace(0, 1, 8), "norm.weight": torch.linspace(1, 3, 8)}
    return torch.func.functional_call(model, other, (x,))


def in_threads(model, x):
    found = [None] * 4

    def work(index):
        with torch.no_grad():
            for _ in range(20):
                found[index] = model(x)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return found


CALLS = {
    "parts": lambda model, x: [nn.Sequential(model.conv, model.norm)(x), model.branch(model.conv(x))],
    "autocast": under_autocast,
    "other statistics": with_other_statistics,
    "channels last": lambda model, x: model(x.contiguous(memory_format=torch.channels_last)),
    "no image": lambda model, x: model(x[:0]),
    "one position": lambda model, x: model(x[:, :, :1, :1]),
    "not dense": lambda model, x: model.relu(model.norm(model.conv(x)[:, :, ::2])),
    "threads": in_threads,
    "vmap": lambda model, x: torch.func.vmap(model)(x[:, None]),
    "jvp": lambda model, x: torch.func.jvp(model, (x,), (x,)),
    "trace": lambda model, x: torch.jit.trace(model, x)(x),
    "make_fx": lambda model, x: torch.fx.experimental.proxy_tensor.make_fx(model)(x)(x),
    "export": lambda model, x: torch.export.export(model, (x,)).module()(x),
    "deepcopy": lambda model, x: copy.deepcopy(model)(x),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace.*:DeprecationWarning")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_however_it_is_called_it_computes_the_same(call):
    assert_same(*pair(), call)


def test_gradients_with_respect_to_the_input_are_the_same():
    gradient = torch.func.grad(lambda x, model: model(x).sum())
    assert_same(*pair(), lambda model, x: gradient(x, model), context=torch.enable_grad)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("images", [1, 5])
def test_threads_of_torch_change_nothing(threads, images):
    model, fused = pair()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            maps = torch.randn(images, 3, 61, 67).contiguous(memory_format=memory_format)
            assert_same(model, fused, lambda network, _, maps=maps: network(maps))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("path", ["", "norm", "relu", "gated", "gated.se", "join"])
def test_a_compiled_part_gets_normalised_maps(path):
    torch.compiler.reset()
    model, fused = pair()
    fused.get_submodule(path).compile(backend="aot_eager")
    assert_same(model, fused)


def test_a_file_of_the_network_is_of_it_as_fused(tmp_path):
    model, fused = pair()
    torch.save(fused, tmp_path / "network.pt")
    loaded = torch.load(tmp_path / "network.pt", weights_only=False)
    assert isinstance(loaded.norm, DeferredNorm)
    assert loaded.norm.consumers[0] is loaded.relu
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert_same(model, loaded)


class Mixed(Network):
    """Maps go from where no gradients are recorded to where they are, and back."""

    def forward(self, x):
        with torch.inference_mode():
            y = self.norm(self.conv(x))
        with torch.enable_grad():
            x = torch.relu(y) * 1
        with torch.no_grad():
            z = self.branch(x)
        with torch.enable_grad():
            return self.gated(z, x)


def test_a_map_from_where_no_gradients_are_recorded_has_none():
    model = lively(Mixed())
    fused = copy.deepcopy(model)
    fuse(fused, input_nchw=SIZE)
    assert_same(model, fused, context=torch.enable_grad)
    fused(torch.randn(SIZE)).sum().backward()
    assert fused.branch[1].weight.grad is None
    assert fused.gated.se.fc1.weight.grad is not None


# --------------------------------------------------------------------------------- a BatchNorm with its own activation


class BatchNormAct2d(nn.BatchNorm2d):
    """What stands in timm under this name, as far as it matters here."""

    def __init__(self, channels, act, drop=nn.Identity):
        super().__init__(channels)
        self.drop, self.act = drop(), act()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


BatchNormAct2d.__module__ = "timm.layers.norm_act"


def with_activation(act, **options):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), BatchNormAct2d(8, act, **options), SqueezeExcitation(8, 2), nn.Conv2d(8, 4, 1)
    return lively(nn.Sequential(*layers, BatchNormAct2d(4, act, **options)).eval())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("act", "in_the_block"), [(nn.ReLU, True), (nn.Hardswish, True), (nn.Identity, True), (nn.SiLU, False)]
)
def test_an_activation_is_one_pass_with_its_norm_and_part_of_the_block_if_it_is_cheap(act, in_the_block, memory_format):
    model = with_activation(act)
    fused = copy.deepcopy(model)
    fusion = fuse(fused, input_nchw=(1, 3, 9, 9))
    assert fusion.norms == 2
    assert [one.normalising for one in fusion.blocks] == [in_the_block]
    assert list(fused.state_dict()) == list(model.state_dict())
    example = torch.randn(2, 3, 9, 9).contiguous(memory_format=memory_format)
    with torch.inference_mode():
        for _ in range(3):
            torch.testing.assert_close(fused(example), model(example))
    assert ("_cached_call" in fused[4].__dict__) == (not cpu.native_reason())


def test_an_unknown_activation_and_a_dropout_stay_as_they_are():
    for model in (with_activation(nn.Tanh), with_activation(nn.ReLU, drop=nn.Dropout)):
        assert fuse(model, input_nchw=(1, 3, 9, 9)).norms == 0
        assert type(model[1]) is BatchNormAct2d


def another_activation(norm):
    norm.act = nn.Hardswish()


def a_hook_that_doubles(norm):
    norm.act.register_forward_hook(lambda _module, _args, out: 2 * out)


@pytest.mark.parametrize("change", [another_activation, a_hook_that_doubles])
@pytest.mark.parametrize("index", [1, 4])
def test_an_activation_that_is_changed_after_the_norm_decided_is_the_one_that_runs(index, change):
    model = with_activation(nn.ReLU)
    fused = copy.deepcopy(model)
    fuse(fused, input_nchw=(1, 3, 9, 9))
    example = torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        before = fused(example)
        change(model[index])
        change(fused[index])
        torch.testing.assert_close(fused(example), model(example))
        assert not torch.allclose(fused(example), before)


@pytest.mark.parametrize(("name", "left"), [("se_mobilenet", 0), ("se_resnet18", 3)])
def test_no_batchnorm_before_a_block_or_a_join_runs_alone(name, left):
    """Of ResNet-18 three are left: those of the shortcuts that change the resolution."""
    model = build(find(name)).model.eval()
    x = torch.randn(1, 3, 32, 32)
    fuse(model, input_nchw=tuple(x.shape))
    with torch.inference_mode():
        for _ in range(3):
            model(x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as seen:
            model(x)
    assert sum(event.name == "aten::native_batch_norm" for event in seen.events()) == left
