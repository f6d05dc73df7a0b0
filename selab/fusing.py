"""Makes a network's SE blocks cheap, in place, with their weights and the checkpoint's keys kept.

What is done, wherever it applies:

* `SqueezeExcitation` takes its fastest implementation (`impl="auto"`);
* a ReLU right before a block in an `nn.Sequential` becomes part of the block, which then reads the map once less;
* a residual join, relu(branch + shortcut), is one pass, with a block in it or without;
* SE modules of torchvision and timm compute as ours do, under their own class, parameters and keys;
* in inference, a block's output takes its input's place where a trace proves that nobody reads the input again.
"""

import copy
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from selab.errors import SelabError
from selab.kernels import cpu
from selab.kernels.choice import Impl, choose, hooked, records_gradients, repeat, run, unusual
from selab.kernels.cpu import Formula
from selab.probe import first_line, meta_twin, passages
from selab.se import ADD_RELU, GatedJoin, SqueezeExcitation, formula_of

# Where a library defines its block → the names of its reduction, activation, expansion and gate.
_FOREIGN = {
    ("timm.layers.squeeze_excite", "SEModule"): ("fc1", "act", "fc2", "gate"),
    ("timm.models._efficientnet_blocks", "SqueezeExcite"): ("conv_reduce", "act1", "conv_expand", "gate"),
    ("torchvision.ops.misc", "SqueezeExcitation"): ("fc1", "activation", "fc2", "scale_activation"),
}
_ACTIVATIONS = {"ReLU": "relu", "SiLU": "silu", "Swish": "silu"}
_GATES = {"Sigmoid": "sigmoid", "Hardsigmoid": "hardsigmoid", "HardSigmoid": "hardsigmoid"}


@dataclass(frozen=True, kw_only=True)
class FusedBlock:
    """One block as it will run.

    Attributes:
        kind: its class's name.
        joined: whether scale, addition and ReLU are one pass.
        absorbed: whether the ReLU before it is part of it.
        in_place: whether its output takes its input's place in inference.
        reason: why it stays as it was; empty if it does not.
    """

    path: str
    kind: str
    joined: bool = False
    absorbed: bool = False
    in_place: bool = False
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Fusion:
    """What `fuse` did.

    Attributes:
        blocks: in the order of the network.
        joins: residual joins without a block that are one pass now.
        in_place_reason: why no output takes its input's place; empty if that could be looked into.
    """

    blocks: tuple[FusedBlock, ...]
    joins: int
    in_place_reason: str = ""


def fuse(model: nn.Module, *, input_nchw: tuple[int, ...] = (1, 3, 224, 224)) -> Fusion:
    """Makes the SE blocks of a network cheap, in place: the same mathematics, parameters and checkpoint keys.

    Args:
        model: with blocks of selab, torchvision (`torchvision.ops.SqueezeExcitation`) or timm (`SEModule`,
            `SqueezeExcite`), or with none.
        input_nchw: (N, C, H, W) of an example input, to see on the meta device which maps are read once only. Where a
            hook of yours keeps a block's input, keep a copy: it is overwritten in inference.

    Returns:
        What was done, and what was not and why.
    """
    absorbed = _absorb(model)
    joins = _join(model)
    changed = [_fused(path, module, absorbed) for path, module in _blocks(model)]
    reason = ""
    try:
        owning = _read_once(model, input_nchw)
    except (SelabError, RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError, LookupError) as error:
        owning, reason = set(), f"no pass over an input of shape {input_nchw} on the meta device: {first_line(error)}"
    for path in owning:
        module = model.get_submodule(path)
        owner: Any = module.se if isinstance(module, GatedJoin) else module
        owner.owns_input = True
    gated = {f"{path}.se" for path, module in model.named_modules() if isinstance(module, GatedJoin)}
    blocks = (
        replace(one, in_place=not one.reason and bool(getattr(model.get_submodule(one.path), "owns_input", False)))
        for one in changed
    )
    return Fusion(
        blocks=tuple(replace(one, joined=one.path in gated and not one.reason) for one in blocks),
        joins=joins,
        in_place_reason=reason,
    )


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """How one block of a network would run.

    Attributes:
        map_nchw: the shape of its input.
        impl: the implementation that is taken.
        reason: why not a faster one; empty if there is none.
    """

    block: FusedBlock
    map_nchw: tuple[int, ...]
    impl: Impl
    reason: str


def runtimes(
    model: nn.Module,
    input_nchw: tuple[int, ...],
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> tuple[Runtime, ...]:
    """Which implementation each block would take after `fuse`, for maps of this kind.

    Args:
        model: left as it is.
        input_nchw: of the network, (N, C, H, W).
        device: where it would run.
        dtype: of the maps.
        memory_format: of the maps.

    Raises:
        ModelError: the network fails on this input.
    """
    twin = copy.deepcopy(model)
    blocks = fuse(twin, input_nchw=input_nchw).blocks
    seen = passages(twin, [one.path for one in blocks], input_nchw)
    found = []
    for one in blocks:
        module: Any = twin.get_submodule(one.path)
        shape = seen[one.path].input_shape or (1, 1, 1, 1)
        x = torch.empty(shape, device=device, dtype=dtype).contiguous(memory_format=memory_format)
        impl: Impl = "reference"
        reason = one.reason
        if not reason:
            impl, reason = module.runtime(x)
        found.append(Runtime(block=one, map_nchw=shape, impl=impl, reason=reason))
    return tuple(found)


class FastJoin(nn.Module):
    """relu(branch + shortcut) in one pass; anything but plain float maps goes through the join that it stands for.

    Shapes: two times (N, C, H, W) to (N, C, H, W).
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.owns_input = False

    def forward(self, branch: Tensor, shortcut: Tensor) -> Tensor:
        """(N, C, H, W) twice → (N, C, H, W)."""
        inner: Any = self._modules["inner"]
        observed = torch.compiler.is_compiling() or hooked(inner, *inner.children()) or formula_of(inner) != ADD_RELU
        if observed or unusual(branch):
            out: Tensor = inner(branch, shortcut)
            return out
        if branch.is_cuda:
            return _join_on_gpu(inner, branch, shortcut)
        if records_gradients(branch, shortcut):
            joined: Tensor = cpu.AddReLU.apply(branch, shortcut)  # type: ignore[no-untyped-call]
            return joined
        return cpu.add_relu(branch, shortcut, in_place=self.owns_input)


def _join_on_gpu(inner: nn.Module, branch: Tensor, shortcut: Tensor) -> Tensor:
    # Loading it registers the operator, and only those load it who use it.
    from selab.kernels import operators

    refused = operators.refuses_join(branch, shortcut)
    out: Tensor = inner(branch, shortcut) if refused else torch.ops.selab.add_relu(branch, shortcut)
    return out


def _absorb(model: nn.Module) -> set[nn.Module]:
    """Moves in-place ReLUs into the blocks right behind them; gives these blocks."""
    found: set[nn.Module] = set()
    for parent in model.modules():
        if not isinstance(parent, nn.Sequential) or type(parent).forward is not nn.Sequential.forward:
            continue
        children = list(parent._modules.items())
        for (name, before), (_, block) in pairwise(children):
            if not isinstance(block, SqueezeExcitation) or block.kinds[0] != "avg" or block.kinds[2] not in cpu.GATES:
                continue
            # One that writes over its input has shown that nobody else needs it.
            if type(before) is nn.ReLU and before.inplace and not hooked(before, block):
                if name.isdecimal():
                    # A place in a row, which others may be counted from.
                    parent._modules[name] = nn.Identity()
                else:
                    del parent._modules[name]
                block.relu_in = block.owns_input = True
                found.add(block)
    return found


def _join(model: nn.Module) -> int:
    joins = 0
    for parent in list(model.modules()):
        if isinstance(parent, (GatedJoin, FastJoin)):
            continue
        for name, child in list(parent.named_children()):
            if formula_of(child) == ADD_RELU:
                parent._modules[name] = FastJoin(child).train(child.training)
                joins += 1
    return joins


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in model.named_modules():
        if isinstance(module, SqueezeExcitation) or _kind_of(module) is not None:
            yield path, module


def _kind_of(module: nn.Module) -> type[nn.Module] | None:
    """The library's class of a block, also of one that is fused already; a subclass may compute anything."""
    kind = type(module)
    kind = next((base for base, fast in _FAST.items() if kind is fast), kind)
    return kind if (kind.__module__, kind.__name__) in _FOREIGN else None


def foreign_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Path → SE block of torchvision or timm, of a class that is known here; whether it can be fast says `fuse`."""
    return {path: module for path, module in model.named_modules() if _kind_of(module) is not None}


def foreign_squeeze_channels(block: nn.Module) -> int | None:
    """The width between the two layers of one of `foreign_blocks`; None where the first is no convolution."""
    kind = _kind_of(block)
    first = None if kind is None else block._modules.get(_FOREIGN[kind.__module__, kind.__name__][0])
    return first.out_channels if isinstance(first, nn.Conv2d) else None


def _fused(path: str, module: nn.Module, absorbed: set[nn.Module]) -> FusedBlock:
    kind = type(module).__name__
    if isinstance(module, SqueezeExcitation):
        module.impl = "auto"
        reason = module.refuses()
        return FusedBlock(path=path, kind=kind, absorbed=module in absorbed, reason=reason)
    base = _kind_of(module)
    assert base is not None
    formula = _formula_of(module, base)
    if isinstance(formula, str):
        return FusedBlock(path=path, kind=kind, reason=formula)
    fast: Any = module
    fast.__class__ = _fast_class(base)
    fast.owns_input = False
    return FusedBlock(path=path, kind=kind)


# ----------------------------------------------------------------------------------------------------- others' blocks


def _formula_of(module: nn.Module, base: type[nn.Module]) -> Formula | str:
    """What a library's block computes, or why it is none of ours."""
    names = _FOREIGN[base.__module__, base.__name__]
    fc1, act, fc2, gate = (module._modules.get(name) for name in names)
    for name, layer in ((names[0], fc1), (names[2], fc2)):
        if type(layer) is not nn.Conv2d or layer.kernel_size != (1, 1) or layer.groups != 1 or layer.stride != (1, 1):
            return f"its {name} is no 1x1 convolution"
    activation, gating = _ACTIVATIONS.get(type(act).__name__), _GATES.get(type(gate).__name__)
    if activation is None:
        return f"its activation is {type(act).__name__}; there are fast blocks with ReLU and SiLU"
    if gating is None:
        return f"its gate is {type(gate).__name__}; there are fast blocks with Sigmoid and Hardsigmoid"
    if type(module._modules.get("bn", nn.Identity())) is not nn.Identity or getattr(module, "add_maxpool", False):
        return "it has a normalisation or a maximum of its own"
    assert isinstance(fc1, nn.Conv2d)
    assert isinstance(fc2, nn.Conv2d)
    return Formula(fc1.weight.flatten(1), fc1.bias, fc2.weight.flatten(1), fc2.bias, activation, gating)


class _Fast:
    """Stands before a library's class: `isinstance`, parameters and keys stay what they were, forward is faster."""

    library: ClassVar[type[nn.Module]]
    owns_input: bool

    def forward(self: Any, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, H, W)."""
        # As in `SqueezeExcitation.forward`.
        decided = self.__dict__.get("_decided")
        if decided is not None and not torch.compiler.is_compiling():
            repeated: Tensor | None = decided(x, None)
            if repeated is not None:
                return repeated
        impl, formula = _foreign_choice(self, self.library, x)
        if formula is None:
            out: Tensor = self.library.forward(self, x)
            return out
        if impl == "native" and not torch.is_grad_enabled():
            fc1, _, fc2, _ = (self._modules[name] for name in _FOREIGN[self.library.__module__, self.library.__name__])
            decision = repeat(x, None, formula, (fc1, fc2), (self,), owns_input=self.owns_input)
            self.__dict__["_decided"] = decision
        return run(impl, x, None, formula, owns_input=self.owns_input)

    def runtime(self: Any, x: Tensor) -> tuple[Impl, str]:
        """As `SqueezeExcitation.runtime`."""
        formula = _formula_of(self, self.library)
        return ("reference", formula) if isinstance(formula, str) else choose("auto", x, None, formula)

    def __setattr__(self: Any, name: str, value: Any) -> None:
        """As `SqueezeExcitation.__setattr__`."""
        self.__dict__.pop("_decided", None)
        self.library.__setattr__(self, name, value)

    def __getstate__(self) -> dict[str, Any]:
        """As `SqueezeExcitation.__getstate__`."""
        return {name: value for name, value in self.__dict__.items() if name != "_decided"}


_FAST: dict[type[nn.Module], type[nn.Module]] = {}


def _fast_class(base: type[nn.Module]) -> type[nn.Module]:
    if base not in _FAST:
        body = {"library": base, "__module__": base.__module__, "__doc__": base.__doc__}
        _FAST[base] = type(base.__name__, (_Fast, base), body)
    return _FAST[base]


def _foreign_choice(module: nn.Module, base: type[nn.Module], x: Tensor) -> tuple[Impl, Formula | None]:
    if not torch.compiler.is_compiling() and hooked(*module.children()):
        return "reference", None
    formula = _formula_of(module, base)
    if isinstance(formula, str):
        return "reference", None
    impl, _ = choose("auto", x, None, formula)
    return (impl, formula) if impl != "reference" else ("reference", None)


# ------------------------------------------------------------------------------------------------------ read once only


class _Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches storages: which of the blocks' inputs are read after the block has run."""

    def __init__(self, taken: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.again: set[str] = set()
        self._taken = taken
        self._watched: dict[int, str] = {}
        # A storage that is gone leaves its address to another one.
        self._alive: list[Any] = []

    def watch(self, path: str, x: Tensor) -> None:
        """From now on a read of x's memory counts."""
        storage = x.untyped_storage()
        self._alive.append(storage)
        if storage._cdata in self._taken or storage._cdata in self._watched:
            self.again.add(path)
        self._watched[storage._cdata] = path

    def look(self, values: object) -> None:
        """Notes the watched memory among these."""
        for leaf in tree_leaves(values):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata in self._watched:
                self.again.add(self._watched[leaf.untyped_storage()._cdata])

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.look((args, kwargs))
        out = func(*args, **(kwargs or {}))
        self._alive.extend(leaf.untyped_storage() for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        return out


def _read_once(model: nn.Module, input_nchw: tuple[int, ...]) -> set[str]:
    """Paths of blocks and joins whose (first) input nobody reads after them, in inference."""
    twin = meta_twin(model).eval()
    example = torch.empty(input_nchw, device="meta", dtype=next((p.dtype for p in twin.parameters()), torch.float32))
    kept = (*twin.parameters(), *twin.buffers(), example)
    reads = _Reads({tensor.untyped_storage()._cdata for tensor in kept})
    inside = {f"{path}.se" for path, module in twin.named_modules() if isinstance(module, GatedJoin)}
    seen: set[str] = set()
    with ExitStack() as stack:
        for path, module in twin.named_modules():
            if path not in inside and (isinstance(module, GatedJoin) or hasattr(module, "owns_input")):

                def after(_module: nn.Module, args: tuple[Any, ...], _out: object, path: str = path) -> None:
                    seen.add(path)
                    reads.watch(path, args[0])

                stack.callback(module.register_forward_hook(after).remove)
        with torch.no_grad(), reads:
            out = twin(example)
        reads.look(out)
    return {path for path in seen - reads.again if _gates_branch(twin.get_submodule(path))}


def _gates_branch(module: nn.Module) -> bool:
    """Whether the first input is the one whose place may be taken."""
    return not isinstance(module, GatedJoin) or module.edge == "branch"
