"""Fused networks on every path: what arguments, sizes, hooks, views and lists keep is what it was without `fuse`."""

import copy
import re
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from selab.attention.se import GatedJoin, SqueezeExcitation
from selab.fusion.fuse import fuse
from selab.kernels.residual import ADD_RELU

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")

CHANNELS = 4


class Join(nn.Module):
    formula = ADD_RELU

    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, branch, shortcut):
        return self.relu(branch + shortcut)


class BatchNormAct2d(nn.BatchNorm2d):
    """What stands in timm under this name, as far as it matters here."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


BatchNormAct2d.__module__ = "timm.layers.norm_act"


class SEModule(nn.Module):
    """As above, with timm's layers."""

    def __init__(self):
        super().__init__()
        self.fc1, self.bn, self.act = nn.Conv2d(CHANNELS, 2, 1), nn.Identity(), nn.ReLU(inplace=True)
        self.fc2, self.gate = nn.Conv2d(2, CHANNELS, 1), nn.Sigmoid()

    def forward(self, x):
        return x * self.gate(self.fc2(self.act(self.fc1(x.mean((2, 3), keepdim=True)))))


SEModule.__module__ = "timm.layers.squeeze_excite"


def conv():
    return nn.Conv2d(CHANNELS, CHANNELS, 1)


class Inverted(nn.Module):
    """As torchvision and timm write them."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.act1 = conv(), nn.BatchNorm2d(CHANNELS), nn.ReLU(inplace=True)
        self.conv2, self.bn2, self.drop, self.se = conv(), nn.BatchNorm2d(CHANNELS), nn.Identity(), SEModule()
        self.down = None

    def forward(self, x):
        shortcut = x
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.drop(x)
        x = self.act1(x)
        x = self.bn2(self.conv2(x))
        if self.se is not None:
            x = self.se(x)
        if self.down is not None:
            shortcut = self.down(shortcut)
        return x + shortcut


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.se = nn.BatchNorm2d(CHANNELS), SqueezeExcitation(CHANNELS, 2)

    def forward(self, x):
        return self.se(self.inner(x))


def norm():
    return nn.BatchNorm2d(CHANNELS)


def block():
    return SqueezeExcitation(CHANNELS, 2)


def relu_():
    return nn.ReLU(inplace=True)


PARTS = {
    "conv": conv,
    "norm": norm,
    "act": nn.ReLU,
    "act_": relu_,
    "silu": nn.SiLU,
    "same": nn.Identity,
    "norm_act": lambda: BatchNormAct2d(CHANNELS),
    "se": block,
    "se2": SEModule,
    "join": Join,
    "gated": lambda: GatedJoin(Join(), block(), "branch"),
    "gated2": lambda: GatedJoin(Join(), block(), "shortcut"),
    "branch": lambda: nn.Sequential(conv(), norm(), relu_(), conv(), norm()),
    "mobile": lambda: nn.Sequential(conv(), norm(), relu_(), block()),
    "plain": lambda: nn.Sequential(conv(), relu_(), block(), conv()),
    "nested": lambda: nn.Sequential(nn.Sequential(conv(), norm()), nn.Sequential(nn.ReLU(), SEModule()), nn.Identity()),
    "inverted": Inverted,
    "wrapped": Wrapped,
}
# What fuse changes stands more often.
ONE = ["conv", "conv", "conv", "norm", "norm", "act", "act_", "silu", "same", "norm_act", "se", "se", "se2", "se2"]
ONE += ["branch", "mobile", "plain", "nested", "inverted", "wrapped"]
TWO = ["join", "gated", "gated2"]
NAMES = ["a", "b"]


def calls(depth):
    """Expressions that give a feature map."""
    name = st.sampled_from(NAMES)
    if depth == 0:
        return name
    inner = calls(depth - 1)
    one = st.builds(lambda layer, arg: f"self.{layer}({arg})", st.sampled_from(ONE), inner)
    two = st.builds(lambda layer, left, right: f"self.{layer}({left}, {right})", st.sampled_from(TWO), inner, name)
    return st.one_of(one, one, two)


def lines():
    name = st.sampled_from(NAMES)
    assigned = st.builds(lambda into, value: f"{into} = {value}", name, st.integers(1, 3).flatmap(calls))
    kept = st.builds(
        lambda form, one, other: form.format(one, other),
        st.sampled_from(
            [
                "kept.append({0})",
                "kept.append({0}.flatten(1))",
                "kept.append({0}.detach())",
                "self.kept = {0}",
                "named['{1}'] = {0}",
                "{1} = {0}",
                "{1} = {0}.view({0}.shape)",
                "{1} = {0} + {1}",
                "{1} = [{0}][0]",
                "for layer in self.mobile:\n    {1} = layer({1})\n    kept.append({1})",
                "for layer in self.branch:\n    {1} = layer({1})",
                "with torch.no_grad():\n    {1} = self.se(self.norm({0}))",
                "{1} = self.branch[:2]({0})",
                "whole = self.mobile\n{1} = whole[2:](whole[:2]({0}))",
                "{1} = list(map(self.se, [{0}, {1}]))[0]",
                "{1} = self.se2.__call__({0})",
                "{1} = self.se.forward({0})",
                "{1} = self.se(x={0})",
                "{1} = (lambda value: self.norm(value))({0})",
            ]
        ),
        name,
        name,
    )
    condition = st.sampled_from(["flag", "not flag", "x.shape[-1] > 5", "self.mode", "len(kept) > 1"])
    under = st.builds(lambda test, line: f"if {test}:\n" + indented(line), condition, st.one_of(kept, kept, assigned))
    return st.lists(st.one_of(assigned, assigned, under, under, kept), min_size=1, max_size=7)


def indented(text):
    return "\n".join(f"    {line}" for line in text.splitlines())


def network(body, returned):
    """A network whose forward has these lines; every layer in them is one of its own."""
    text = "\n".join(["kept, named = [], {}", "a = self.stem(x)", "b = self.stem(x)", *body])
    text += f"\nreturn {returned}, kept, named"
    layers = []

    def numbered(found):
        layers.append(found[1])
        return f"self.{found[1]}{len(layers)}{found[2]}"

    text = re.sub(rf"self\.({'|'.join(sorted(PARTS, key=len, reverse=True))})([(.,:\[\n])", numbered, text)
    space = {"torch": torch}
    exec(f"def forward(self, x, flag=False):\n{indented(text)}", space)

    class Net(nn.Module):
        forward = space["forward"]

    torch.manual_seed(0)
    made = Net()
    made.mode, made.kept = False, None
    made.stem = nn.Conv2d(3, CHANNELS, 1)
    for index, kind in enumerate(layers, 1):
        made.add_module(f"{kind}{index}", PARTS[kind]())
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    return made.eval()


def keeping(model, which, of_input):
    """Hooks that keep what a module gets or returns."""
    # A fused join holds the former one, so paths within it differ.
    paths = [
        path
        for path, _ in model.named_modules()
        if path and ("." not in path or not path.startswith(("join", "gated")))
    ]
    kept, module = [], model.get_submodule(paths[which % len(paths)])
    if of_input:
        module.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    else:
        module.register_forward_hook(lambda _, _args, out: kept.append(out))
    return kept


def assert_equal(found, expected):
    for one, other in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        if isinstance(other, torch.Tensor):
            assert type(one) is torch.Tensor
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.detach().abs().max() + 1))


def called(model, x, flag, hooked, context):
    """What a call returns and keeps, or the error that plain PyTorch raises."""
    hooked.clear()
    model.kept = None
    with context():
        returned = model(x, flag)
    return returned, model.kept, list(hooked)


SETTINGS = {
    "deadline": None,
    "database": None,
    "derandomize": True,
    "suppress_health_check": list(hypothesis.HealthCheck),
}
CONTEXTS = [torch.no_grad, torch.inference_mode, nullcontext, torch.no_grad]
RETURNED = ["a", "(b, a)", "(b, a) if flag else b", "(a, b) if self.mode else a"]


@hypothesis.settings(max_examples=100, phases=[hypothesis.Phase.generate], **SETTINGS)
@hypothesis.given(
    body=lines(),
    returned=st.sampled_from(RETURNED),
    hook=st.one_of(st.none(), st.tuples(st.integers(0, 99), st.booleans(), st.booleans())),
    in_place=st.sampled_from([True, True, True, False]),
)
def test_whatever_path_is_taken_every_map_is_that_of_the_unfused_network(body, returned, hook, in_place):
    plain = network(body, returned)
    fused = copy.deepcopy(plain)
    hooked, also = [], []
    if hook is not None and hook[2]:
        hooked, also = (keeping(one, *hook[:2]) for one in (plain, fused))
    fuse(fused, input_nchw=(1, 3, 4, 4), in_place=in_place)
    for round_ in range(2):
        if round_ and hook is not None and not hook[2]:
            hooked, also = (keeping(one, *hook[:2]) for one in (plain, fused))
        for mode in (False, True):
            plain.mode = fused.mode = mode
            for size, flag, context in zip((4, 6, 4, 6), (False, True, True, False), CONTEXTS, strict=True):
                x = torch.randn(2, 3, size, size)
                expected = called(plain, x.clone(), flag, hooked, context)
                assert_equal(called(fused, x, flag, also, context), expected)
                assert torch.equal(x, x.clone())


def gradients(model, x):
    returned, kept, named = model(x)
    maps = [one for one in tree_leaves((returned, kept, named)) if isinstance(one, torch.Tensor) and one.requires_grad]
    total = sum(one.square().mean() for one in maps)
    return torch.autograd.grad(total, [x, *model.parameters()], allow_unused=True)


@hypothesis.settings(max_examples=30, phases=[hypothesis.Phase.generate], **SETTINGS)
@hypothesis.given(body=lines(), returned=st.sampled_from(RETURNED[:2]), train=st.booleans())
def test_gradients_are_those_of_the_unfused_network(body, returned, train):
    plain = network(body, returned)
    fused = copy.deepcopy(plain)
    fuse(fused, input_nchw=(1, 3, 4, 4))
    plain, fused = plain.double().train(train), fused.double().train(train)
    for _ in range(2):
        x = torch.randn(3, 3, 4, 4, dtype=torch.float64, requires_grad=True)
        try:
            expected = gradients(plain, x)
        except RuntimeError:
            # An in-place ReLU overwrote what a backward pass needs.
            return
        for found, one in zip(gradients(fused, x), expected, strict=True):
            assert (found is None) == (one is None)
            if one is not None:
                torch.testing.assert_close(found, one, rtol=1e-6, atol=1e-7 * float(one.abs().max() + 1))
