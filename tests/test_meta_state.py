"""Counting, and every other pass on fake tensors, leaves a network exactly as it was."""

import functools
import queue
import random
import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import selab
from selab.attention.auto_sites import trace_ends
from selab.attention.user_code import imported
from selab.bench.memory import memory
from selab.cost.count import count
from selab.cost.crosscheck import compare
from selab.errors import ModelError
from selab.fusion.fuse import runtimes
from selab.meta import passages
from selab.meta.real import real_copy
from selab.records.types import Workload

GRIDS: dict[int, Tensor] = {}
CALLS = 0


@functools.cache
def grid(size: int) -> Tensor:
    return torch.arange(size, dtype=torch.float32)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)


class CachesGrid(Base):
    def __init__(self) -> None:
        super().__init__()
        self.grid: Any = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.grid is None or self.grid.shape[-1] != y.shape[-1]:
            self.grid = torch.arange(y.shape[-1], device=y.device).to(y.dtype)
        return y + self.grid


class MakesLayer(Base):
    def __init__(self) -> None:
        super().__init__()
        self.head: Any = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.head is None:
            torch.manual_seed(3)
            self.head = nn.Conv2d(y.shape[1], 2, 1).to(y.device)
            self.add_module("late", nn.Identity())
        out: Tensor = self.head(y)
        return out


class MakesParameter(Base):
    """Makes a layer whose weight has known values, and moves it: a tensor with weak references cannot be swapped."""

    def __init__(self) -> None:
        super().__init__()
        self.head: Any = None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        if self.head is None:
            self.head = nn.BatchNorm2d(y.shape[1]).to(torch.float64).to(y.dtype)
        out: Tensor = self.head(y)
        return out


class CachesInContainers(Base):
    shared: ClassVar[dict[int, Tensor]] = {}
    count = 0

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = [[], {}]
        self.cache_of_products: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        global CALLS
        CALLS += 1
        type(self).count += 1
        y: Tensor = self.conv(x)
        size = y.shape[-1]
        self.seen[0].append(y)
        self.seen[1][size] = y.shape
        self.cache_of_products["bias"] = self.conv.weight.sum()
        for cache in (GRIDS, self.shared):
            if size not in cache:
                cache[size] = torch.linspace(0, 1, size)
        return y + GRIDS[size] + self.shared[size] + grid(size)


class Buffers(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("late", None, persistent=False)
        self.register_buffer("ema", torch.zeros(4))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.plain = torch.zeros(2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        if self.late is None:
            self.late = torch.ones(y.shape[-1], device=y.device)
        self.ema = 0.9 * self.ema + 0.1 * y.detach().mean((0, 2, 3))
        self.calls += 1
        self.plain.add_(1)
        self.conv.weight.data.mul_(1.5)
        return y + self.late - self.ema[:, None, None]


class Switches(Base):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm2d(4).eval(), nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        self.norm.train()
        self.conv.weight.requires_grad_(False)
        random.random()
        np.random.rand()
        torch.manual_seed(1)
        torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        out: Tensor = self.drop(self.norm(self.conv(x)))
        return out


class Uncopyable(Base):
    """Holds what `copy.deepcopy` refuses: a lock, a generator, a tensor that is not a leaf."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.steps = (i for i in range(3))
        self.product = self.conv.weight.sum() * 2
        self.generator = torch.Generator().manual_seed(4)
        self.numbers = np.arange(3)

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            self.numbers[0] += 1
            noise = torch.rand(1, generator=self.generator)
            self.product = self.product + 1
            out: Tensor = self.conv(x) * noise + self.product.detach() + float(self.numbers[0])
            return out


class OwnCopy(Base):
    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def __deepcopy__(self, memo: Any) -> "OwnCopy":
        raise RuntimeError("never copied")

    def forward(self, x: Tensor) -> Tensor:
        self.kept.append(x)
        out: Tensor = self.conv(x)
        return out


def with_hooks() -> nn.Module:
    net, seen = Base(), []
    net.seen = seen  # type: ignore[assignment]
    net.conv.register_forward_hook(lambda _m, _a, out: seen.append(out))
    net.forward = lambda x: net.conv(x)  # type: ignore[method-assign]
    return net


def tied() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
    net[1].weight = net[0].weight
    net[1].view = net[0].weight.detach()[:1]
    return net


def pruned() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    prune.l1_unstructured(net[0], "weight", 0.5)
    return net


def traced_graph() -> nn.Module:
    return fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))


ZOO: dict[str, Callable[[], nn.Module]] = {
    **{
        kind.__name__: kind
        for kind in (CachesGrid, MakesLayer, MakesParameter, CachesInContainers, Buffers, Switches, Uncopyable, OwnCopy)
    },
    "hooks and a forward of its own": with_hooks,
    "tied": tied,
    "pruned": pruned,
    "weight_norm": lambda: nn.Sequential(weight_norm(nn.Conv2d(3, 4, 3))),
    "spectral_norm": lambda: nn.Sequential(spectral_norm(nn.Conv2d(3, 4, 3))),
    "parametrized": lambda: nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(3, 4, 3))),
    "a graph": traced_graph,
    "statistics": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=None), nn.Dropout()),
}


def state_of(value: Any, seen: dict[int, int]) -> Any:
    """Describe a value with everything below it; tensors by address, version, flags and values."""
    if id(value) in seen:
        return ("again", seen[id(value)])
    if isinstance(value, (bool, int, float, str, type(None), torch.dtype)):
        return value
    seen[id(value)] = len(seen)
    if isinstance(value, Tensor):
        given = (type(value).__name__, value.data_ptr(), value._version, value.requires_grad, value.stride())
        return (*given, value.is_leaf, value.detach().clone().numpy().tobytes())
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, torch.Generator):
        return value.get_state().numpy().tobytes()
    if isinstance(value, dict):
        return [(str(key), state_of(one, seen)) for key, one in value.items()]
    if isinstance(value, (list, tuple, set)):
        return [state_of(one, seen) for one in value]
    if callable(value) and getattr(value, "__closure__", None):
        return [state_of(cell.cell_contents, seen) for cell in value.__closure__]
    if isinstance(value, nn.Module):
        return (type(value).__name__, id(value), state_of(vars(value), seen))
    return (type(value).__name__, id(value))


def everything(net: nn.Module) -> Any:
    return [
        state_of(net, {}),
        state_of([GRIDS, CALLS, CachesInContainers.shared, CachesInContainers.count], {}),
        torch.get_rng_state().numpy().tobytes(),
        random.getstate(),
        np.random.get_state()[1].tobytes(),
        (torch.get_default_dtype(), torch.is_grad_enabled(), torch.backends.cudnn.benchmark),
        (torch.backends.mkldnn.is_available(), torch.backends.mha.get_fastpath_enabled()),
        [len(hooks) for hooks in (torch.nn.modules.module._global_forward_hooks,)],
    ]


def outputs(net: nn.Module) -> bytes:
    return output(net).numpy().tobytes()


def output(net: nn.Module) -> Tensor:
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        try:
            made = net(torch.linspace(-1, 1, 108).reshape(1, 3, 6, 6))
        finally:
            torch.set_default_dtype(before)
    assert type(made) is Tensor
    return made.detach()


PASSES: dict[str, Callable[[nn.Module], Any]] = {
    "count": lambda net: count(net, (2, 3, 6, 6)),
    "counters": lambda net: compare(net, (2, 3, 6, 6)),
    "counters on real tensors": lambda net: compare(net, (2, 3, 6, 6), on="cpu"),
    "count in train mode": lambda net: count(net, (2, 3, 6, 6), training=True),
    "passages": lambda net: passages(net, [], (2, 3, 6, 6)),
    "block ends": lambda net: trace_ends(net, (2, 3, 6, 6)),
    "dry run": lambda net: selab.insert_se(net, first_convolution(net), **SMALL, dry_run=True),
    "check": lambda net: selab.check_inserted(net, input_nchw=(2, 3, 6, 6)),
    "fuse": lambda net: selab.fuse(net, input_nchw=(2, 3, 6, 6)),
    "fuse, not in place": lambda net: selab.fuse(net, input_nchw=(2, 3, 6, 6), in_place=False),
    "runtimes": lambda net: runtimes(net, (2, 3, 6, 6)),
    "measure": lambda net: selab.measure(net, baseline=net, input=(1, 3, 6, 6), budget=0.01),
    "measure training": lambda net: selab.measure(
        net, baseline=net, input=[(1, 3, 6, 6)], phase="forward_backward", budget=0.01
    ),
}
WORKLOAD = Workload(
    batch=1, input_chw=(3, 6, 6), device="cpu", dtype="fp32", memory_format="contiguous", mode="auto", threads=1
)
SMALL: dict[str, Any] = {"input_nchw": (2, 3, 6, 6), "reduction": 2}


def first_convolution(net: nn.Module) -> str:
    return next(path for path, module in net.named_modules() if isinstance(module, nn.Conv2d))


@pytest.fixture(autouse=True)
def _global_switches() -> Any:
    benchmark = torch.backends.cudnn.benchmark
    yield
    torch.backends.cudnn.benchmark = benchmark
    GRIDS.clear()
    CachesInContainers.shared.clear()
    grid.cache_clear()


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("run", PASSES)
@pytest.mark.parametrize("name", ZOO)
def test_a_pass_changes_nothing(name: str, run: str) -> None:
    torch.manual_seed(5)
    net = ZOO[name]()
    torch.manual_seed(5)
    twin = ZOO[name]()
    before = everything(net)
    # It switches gradients off in its forward, so there is no backward to measure.
    no_backward = name == "Switches" and run == "measure training"
    with pytest.raises(ModelError, match="does not require grad") if no_backward else nullcontext():
        PASSES[run](net)
    assert everything(net) == before
    assert outputs(net) == outputs(twin)


@pytest.mark.parametrize("name", ["Buffers", "CachesInContainers", "Uncopyable", "hooks and a forward of its own"])
def test_measuring_memory_changes_nothing(name: str) -> None:
    net = ZOO[name]()
    before = everything(net)
    assert memory(net, WORKLOAD, phases=("forward",)).error == ""
    assert everything(net) == before


def tensors_and_hooks(net: nn.Module, left_out: set[int]) -> Any:
    """Describe the tensors of a network in order, and the hooks of all its modules, without those of some modules."""
    kept = [module for module in net.modules() if id(module) not in left_out]
    held = [one for module in kept for one in (*module._parameters.values(), *module._buffers.values())]
    hooks = [vars(module)[name] for module in kept for name in ("_forward_hooks", "_forward_pre_hooks")]
    seen: dict[int, int] = {}
    return [state_of(one, seen) for one in held], [hook for one in hooks for hook in one.values()]


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("fused", ["no", "fused", "not in place", "blocks left"])
@pytest.mark.parametrize("name", ZOO)
def test_insertion_fusion_and_removal_change_the_modules_alone(name: str, fused: str) -> None:
    torch.manual_seed(5)
    net = ZOO[name]()
    torch.manual_seed(5)
    twin = ZOO[name]()
    before, plain = everything(net), tensors_and_hooks(net, set())
    # The weights of the block are drawn.
    with torch.random.fork_rng():
        sites = selab.insert_se(net, first_convolution(net), **SMALL, init="identity")
    assert len(sites) == 1
    if fused != "no":
        selab.fuse(net, input_nchw=(2, 3, 6, 6), in_place=fused != "not in place", blocks=fused != "blocks left")
    assert everything(net)[1:] == before[1:]
    blocks = [module for module in net.modules() if isinstance(module, selab.SqueezeExcitation)]
    added = {id(module) for block in blocks for module in block.modules()}
    assert len(blocks) == 1
    assert tensors_and_hooks(net, added) == plain
    if fused == "no":
        assert selab.remove_se(net) == 1
        assert everything(net) == before
        assert outputs(net) == outputs(twin)
        return
    # A block that starts as the identity changes no bit; the fused one may round otherwise.
    torch.testing.assert_close(output(net), output(twin))


def test_a_pass_that_fails_changes_nothing() -> None:
    class Fails(Buffers):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise KeyError("no luck")

    net = Fails()
    before = everything(net)
    with pytest.raises(Exception, match=r"KeyError: 'no luck'$"):
        count(net, (2, 3, 6, 6))
    assert everything(net) == before


def test_a_count_on_real_tensors_changes_nothing() -> None:
    class Steered(Buffers):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return F.relu(y) if y.sum().item() > 1e9 else y[y.isfinite()]

    net = Steered()
    before = everything(net)
    with pytest.raises(Exception, match=r'values of a tensor.*on="cpu"'):
        count(net, (2, 3, 6, 6))
    cost = count(net, (2, 3, 6, 6), on="cpu")
    assert cost.macs.conv_linear == 2 * 36 * 4 * 27
    assert everything(net) == before


class ScaledByGrid(Base):
    """Multiplies by a vector of ones that something outside of the network keeps."""

    def __init__(self, vector: Callable[[int], Tensor]) -> None:
        super().__init__()
        self.vector = vector

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x) * self.vector(x.shape[-1])
        return out


def _cached_vector() -> Callable[[int], Tensor]:
    @functools.lru_cache
    def vector(size: int) -> Tensor:
        return torch.ones(size)

    return vector


def _vector_of_closure() -> Callable[[int], Tensor]:
    kept: dict[int, Tensor] = {}
    last = None

    def vector(size: int) -> Tensor:
        nonlocal last
        last = kept[size] if size in kept else torch.ones(size) if last is None else last
        return kept.setdefault(size, last)

    return vector


def _vector_of_default(size: int, _kept: dict[int, Tensor] = {}) -> Tensor:  # noqa: B006
    return _kept.setdefault(size, torch.ones(size)) if size not in _kept else _kept[size]


def _vector_of_keyword(size: int, *, _kept: list[Tensor] = []) -> Tensor:  # noqa: B006
    if not _kept:
        _kept.append(torch.ones(size))
    return _kept[0]


class _Store:
    def __init__(self) -> None:
        self.deep: dict[str, dict[int, Tensor]] = {"grids": {}}
        self.last: Any = None

    def vector(self, size: int) -> Tensor:
        self.last = torch.ones(size) if self.last is None else self.last
        return self.deep["grids"].setdefault(size, self.last)


def _vector_of_thread(kept: Any, size: int) -> Tensor:
    kept.ones = kept.ones if hasattr(kept, "ones") else torch.ones(size)
    return kept.ones  # type: ignore[no-any-return]


def _vector_of_attribute(size: int) -> Tensor:
    kept: Any = _vector_of_attribute
    if not hasattr(kept, "ones"):
        kept.ones = torch.ones(size)
    return kept.ones  # type: ignore[no-any-return]


@pytest.mark.parametrize("attribute", [False, True], ids=["in a method's closure", "an attribute"])
@pytest.mark.parametrize(
    "make",
    [
        _cached_vector,
        _vector_of_closure,
        lambda: _vector_of_default,
        lambda: _vector_of_keyword,
        lambda: _vector_of_attribute,
        lambda: _Store().vector,
        lambda: functools.partial(_vector_of_thread, threading.local()),
        lambda: functools.partial(_cached_vector()),
        lambda: functools.wraps(_vector_of_default)(lambda size: _cached_vector()(size)),
    ],
    ids=[
        "cached",
        "closure",
        "default",
        "keyword default",
        "function attribute",
        "object",
        "thread",
        "partial",
        "wrapped",
    ],
)
def test_no_cache_outside_of_the_network_keeps_a_fake_tensor(make: Any, attribute: bool) -> None:
    vector = make()

    class InClosure(Base):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.conv(x) * vector(x.shape[-1])
            return out

    net = ScaledByGrid(vector) if attribute else InClosure()
    x = torch.randn(1, 3, 6, 6)
    count(net, (1, 3, 6, 6))
    passages(net, ["conv"], (1, 3, 6, 6))
    out = net(x)
    assert type(out) is Tensor
    assert torch.equal(out, net.conv(x))
    passages(net, ["conv"], (1, 3, 6, 6))
    assert torch.equal(net(x), net.conv(x))


CALLED: Any = None


def _call_global(x: Tensor) -> Tensor:
    out: Tensor = CALLED.conv(x)
    return out


@pytest.mark.parametrize(
    "way", ["closure", "default", "keyword", "partial", "bound", "global", "cache", "hook", "weak"]
)
def test_a_function_that_holds_the_network_runs_its_copy(way: str) -> None:
    global CALLED
    inner = Base()
    net = nn.Sequential(inner)
    CALLED, weak = inner, weakref.ref(inner)
    functions: dict[str, Any] = {
        "closure": lambda x: inner.conv(x),
        "default": lambda x, block=inner: block.conv(x),
        "keyword": eval("lambda x, *, block=b: block.conv(x)", {"b": inner, "__name__": __name__}),
        "partial": functools.partial(lambda block, x: block.conv(x), inner),
        "bound": (lambda block, x: block.conv(x)).__get__(inner),
        "global": _call_global,
        "cache": functools.lru_cache(lambda x, block=inner: block.conv(x)),
        "weak": lambda x: weak().conv(x),
    }
    if way == "hook":
        net = nn.Sequential(inner, nn.Identity())
        inner.forward = lambda x: x  # type: ignore[method-assign]
        net[1].register_forward_hook(lambda _m, args, _out, block=inner: block.conv(args[0]))
    else:
        inner.forward = functions[way]  # type: ignore[method-assign]
    seen = passages(net, ["0.conv"], (1, 3, 6, 6))
    assert seen["0.conv"].calls == 1
    assert seen["0.conv"].output_shape == (1, 4, 6, 6)
    assert type(inner.conv.weight) is nn.Parameter
    # 6 * 6 positions, 4 filters of 3 * 3 * 3.
    assert count(net, (1, 3, 6, 6)).macs.all == 36 * 4 * 27


KEPT: "queue.SimpleQueue[Tensor]" = queue.SimpleQueue()


class Queues(Base):
    def forward(self, x: Tensor) -> Tensor:
        KEPT.put(torch.ones(x.shape[-1]))
        out: Tensor = self.conv(x)
        return out


def test_a_fake_tensor_that_outlives_its_pass_cannot_be_computed_with() -> None:
    passages(Queues(), ["conv"], (1, 3, 6, 6))
    kept = KEPT.get_nowait()
    with pytest.raises(RuntimeError, match="clear that cache"):
        kept + torch.ones(6)
    with pytest.raises(RuntimeError, match="clear that cache"):
        torch.ones(2, 6) * kept


OF_A_USER = """
import random, threading
import torch
from torch import nn

GRIDS = {}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.lock, self.calls, self.seen = threading.Lock(), 0, []
        self.conv.register_forward_hook(lambda _m, _a, out, seen=self.seen: seen.append(out.shape))

    def forward(self, x):
        self.calls += 1
        random.random()
        torch.manual_seed(1)
        with self.lock:
            y = self.conv(x)
            return y + GRIDS.setdefault(y.shape[-1], torch.ones(y.shape[-1]))


NET = Net()
"""


def test_a_profile_changes_nothing_of_the_module_that_a_file_holds(tmp_path: Path) -> None:
    file = tmp_path / "of_a_user.py"
    file.write_text(OF_A_USER)
    with imported(f"{file}:NET") as found, imported(f"{file}:GRIDS") as grids:
        assert isinstance(found, nn.Module)
        before = everything(found)
        record = selab.profile(
            f"{file}:NET+reduction=2,sites=conv",
            baseline=f"{file}:NET",
            input_chw=(3, 6, 6),
            phases=["forward", "backward"],
            budget=0.01,
            threads=1,
        )
        assert record.cost.se.blocks == 1
        assert record.record.memory.error == ""
        assert everything(found) == before
        assert grids == {}


@pytest.mark.parametrize("compiled", [False, True])
def test_a_copy_with_memory_of_its_own_runs_as_the_network_does(compiled: bool) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), torch.jit.script(nn.ReLU())).eval()
    net.view = net[0].weight.detach()[1:]
    net.register_forward_hook(lambda _m, _a, out: out + net[0].bias.sum())
    written: Any = torch.compile(net, backend="eager") if compiled else net
    made: Any = real_copy(written)
    assert type(made) is type(written)
    x = torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        assert torch.equal(made(x), net(x))
    inner = made._orig_mod if compiled else made
    with torch.no_grad():
        inner[0].weight += 1
        inner[0].bias += 1
        # The hook adds the biases of the copy, each of the four one more.
        torch.testing.assert_close(made(x), inner[2](inner[1](inner[0](x))) + net[0].bias.sum() + 4)
    # Tied views stay tied, and the network has other memory.
    assert torch.equal(inner.view, inner[0].weight[1:])
    assert torch.equal(inner.view, net.view + 1)
    assert isinstance(inner[2], torch.jit.ScriptModule)
    assert inner[2] is not net[2]
