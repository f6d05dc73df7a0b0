"""Record the operators of a forward pass on fake tensors, with their costs."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from selab.attention.base import Attention
from selab.attention.gated_site import named_sites, sites_own
from selab.attention.se import GatedJoin
from selab.cost.operators.backward import gradients
from selab.cost.rules import FOUND, VIEW, Rule, Work, rule_of
from selab.errors import ModelError, SpecError, nearest
from selab.meta import (
    ON_REAL_TENSORS,
    Example,
    FakePass,
    On,
    as_written,
    blames_input,
    described,
    evaluating,
    make_pass,
    reason_of,
    set_mode,
)
from selab.meta.fake import VALUE_NEEDED
from selab.meta.modes import DispatchMode
from selab.records.types import Frozen

Stage = Literal["", "squeeze", "excitation", "scale"]


class Operation(Frozen, frozen=True, kw_only=True):
    """One operator call of the forward pass with its cost.

    Attributes:
        name: the row in tables.
        operator: the full name, `aten::convolution`.
        path: the module that called it.
        function: the outermost public function that called it; empty without `details`.
        stage: its part of an SE block; empty outside of SE blocks.
        block: the path of that SE block; None outside of SE blocks.
        known: whether there is a rule for it; without one all costs are zero.
        input_numel: elements of its first input.
        output_numel: elements of its first output.
        macs: of convolutions and matrix products.
        other: all other arithmetic, in fused multiply-adds.
        other_flops: the same in floating-point operations.
        bytes: inputs read once, output written once.
        stage_macs: the MACs (`all`) that the SE block adds to the network; fewer than all of the operator's only if it
            also does the network's own addition.
        stage_bytes: the bytes that the SE block adds.
        groups: of a convolution, otherwise 1.
        training: a normalisation that computes its own statistics.
        affine: a normalisation with scale and shift.
        backward_macs: of convolutions and matrix products in its backward pass.
        weight_gradient: whether the second operand of a convolution or a matrix product needs a gradient.
        input_gradient: whether any input needs a gradient.
        backward_other: all other arithmetic of its backward pass, in fused multiply-adds.
        backward_other_flops: the same in floating-point operations.
    """

    name: str
    operator: str
    path: str
    function: str
    stage: Stage
    block: str | None
    known: bool
    input_numel: int
    output_numel: int
    macs: int
    other: int
    other_flops: int
    bytes: int
    stage_macs: int
    stage_bytes: int
    groups: int
    training: bool
    affine: bool
    backward_macs: int = 0
    weight_gradient: bool = False
    input_gradient: bool = False
    backward_other: int = 0
    backward_other_flops: int = 0


@dataclass(frozen=True, kw_only=True)
class ModuleCall:
    """One call of a module: the shapes of its first input and of its output, None if that is not a tensor."""

    path: str
    input_shape: tuple[int, ...] | None
    output_shape: tuple[int, ...] | None


@dataclass(frozen=True, kw_only=True)
class OpTrace:
    """All operators of one forward pass, in order, without views and uninitialised memory.

    Attributes:
        calls: how often each module ran.
        module_calls: empty without `details`.
        se_blocks: paths of the SE blocks.
    """

    operations: tuple[Operation, ...]
    calls: Mapping[str, int]
    module_calls: tuple[ModuleCall, ...]
    se_blocks: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """A module in the network: its path, and the SE block that its operators belong to.

    Attributes:
        gates: its first argument is the block's feature map.
        joins: it also does work of the network itself, such as a residual addition.
    """

    path: str
    block: str | None = None
    gates: bool = False
    joins: bool = False


def _tensors_in(values: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return the distinct tensors among arguments and in lists among them."""
    found: dict[int, Tensor] = {}
    for value in (*values, *kwargs.values()) if kwargs else values:
        if isinstance(value, Tensor):
            found[id(value)] = value
        elif isinstance(value, (list, tuple)):
            for item in value:
                if isinstance(item, Tensor):
                    found[id(item)] = item
    return list(found.values())


def _numel(x: Tensor) -> int:
    """Return the elements in memory; an expanded dimension counts once."""
    count = x.numel()
    if count and not x.is_contiguous():
        for size, stride in zip(x.shape, x.stride(), strict=True):
            if stride == 0:
                count //= size
    return count


class _Tracer(DispatchMode):
    """Intercept every operator of a model, before it runs on fake tensors."""

    def __init__(self, fakes: FakePass, *, dtype: torch.dtype | None, se_blocks: Collection[str], details: bool):
        super().__init__()  # type: ignore[no-untyped-call]
        model, self._mode = fakes.model, fakes.mode
        self.operations: list[Operation] = []
        self.calls: defaultdict[str, int] = defaultdict(int)
        self.module_calls: list[ModuleCall] = []
        self.functions = _Functions() if details else None
        self._itemsize = None if dtype is None else dtype.itemsize
        self.places = _places(model, se_blocks)
        self._stack: list[tuple[nn.Module, _Place]] = [(model, _Place(path=""))]
        # The feature map of each SE block: the shape that its squeeze reads and its scale writes.
        self._maps: dict[str, torch.Size] = {}
        # Operators that ran without gradients, as inside a torch.autograd.Function.
        self._hidden: list[tuple[int, Rule, Sequence[Any], list[Tensor], list[Tensor]]] = []
        # The last operation and its output, whose node in autograd's graph is made after the operator has returned.
        self._last: tuple[int, Tensor] | None = None
        self._nodes: dict[int, Any] = {}
        # The source of the copy that was the last operator.
        self._copied: Tensor | None = None

    # The module hooks.

    def enter(self, module: nn.Module, args: Any) -> None:
        place = self.places.get(id(module))
        if place is None:
            return
        self._stack.append((module, place))
        self.calls[place.path] += 1
        if place.gates and place.block is not None and args and isinstance(args[0], Tensor):
            self._maps[place.block] = args[0].shape

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if id(module) not in self.places:
            return
        # A model that catches an exception leaves the modules below without their hooks being called.
        while self._stack.pop()[0] is not module:
            pass
        if self.functions is not None:
            first = args[0] if args else None
            self.module_calls.append(
                ModuleCall(
                    path=self.places[id(module)].path,
                    input_shape=tuple(first.shape) if isinstance(first, Tensor) else None,
                    output_shape=tuple(output.shape) if isinstance(output, Tensor) else None,
                )
            )

    @property
    def where(self) -> str:
        """Return the module that is running, for messages."""
        module, place = self._stack[-1]
        return f"{place.path} ({type(module).__name__})" if place.path else f"its own forward ({type(module).__name__})"

    # The operators.

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        self._note_node()
        rule = FOUND.get(func) or rule_of(func)
        if rule is None:
            # Without autograd, as in inference mode, composite operators arrive whole.
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        tensors = _tensors_in(args, kwargs)
        index = -1
        result = None if self._mode is None else self._mode.shortcut(func, tensors, args, kwargs)
        if result is None:
            result = func(*args, **kwargs)
        # The first output may be a gradient that is not asked for.
        out = next((x for x in result if x is not None), None) if isinstance(result, (tuple, list)) else result
        if rule is not VIEW and isinstance(out, Tensor):
            self._drop_copy_of_autograd(func, args)
            index = len(self.operations)
            self.operations.append(self._operation(func, rule, args, tensors, out))
            if self.operations[-1].input_gradient or self.operations[-1].backward_macs:
                self._last = (index, out)
        self._copied = args[0] if func._schema.name == "aten::clone" and torch.is_grad_enabled() else None
        if not torch.is_grad_enabled() and func._schema.name != "aten::detach":
            outs = [x for x in (result if isinstance(result, (tuple, list)) else (result,)) if isinstance(x, Tensor)]
            self._hidden.append((index, rule or VIEW, args, tensors, outs))
        return result

    def _drop_copy_of_autograd(self, func: Any, args: Any) -> None:
        """Drop a copy if an in-place operator on its source follows: autograd keeps the copy, inference makes none."""
        if self._copied is not None and func._schema.is_mutable and args[0] is self._copied:
            self.operations.pop()

    def _operation(self, func: Any, rule: Rule | None, args: Any, tensors: list[Tensor], out: Tensor) -> Operation:
        _, place = self._stack[-1]
        function = self.functions.current if self.functions is not None else ""
        if rule is None:
            return _uncounted(func._schema.name, place.path, function, tensors, out)
        work = rule.work(args, out)
        if work is None:
            return _uncounted(func._schema.name, place.path, function, tensors, out)
        moved = self._moved(rule, args, tensors, out)
        stage, stage_macs, stage_bytes = self._stage(place, rule, work, tensors, out, moved)
        return Operation(
            name=rule.name,
            operator=func._schema.name,
            path=place.path,
            function=function,
            stage=stage,
            block=place.block if stage else None,
            known=True,
            input_numel=tensors[0].numel() if tensors else 0,
            output_numel=out.numel(),
            macs=work.macs,
            other=work.other,
            other_flops=work.other_flops,
            bytes=moved,
            stage_macs=stage_macs,
            stage_bytes=stage_bytes,
            groups=args[8] if rule.role == "convolution" else 1,
            training=rule.name == "batch_norm" and rule.statistics is not None and rule.statistics(args),
            affine=rule.affine is not None and args[rule.affine] is not None,
            **(gradients(rule, work, args, tensors, out, _needs_gradient) if torch.is_grad_enabled() else {}),
        )

    def _moved(self, rule: Rule, args: Any, tensors: list[Tensor], out: Tensor) -> int:
        if rule.traffic is not None:
            return sum(min(count, _numel(x)) * self._element_bytes(x) for x, count in rule.traffic(args, out))
        moved = self._bytes(out)
        for x in tensors:
            moved += self._bytes(x)
        return moved

    def _bytes(self, x: Tensor) -> int:
        return _numel(x) * self._element_bytes(x)

    def _element_bytes(self, x: Tensor) -> int:
        return self._itemsize if self._itemsize and x.dtype.is_floating_point else x.dtype.itemsize

    def _stage(
        self, place: _Place, rule: Rule, work: Work, tensors: list[Tensor], out: Tensor, moved: int
    ) -> tuple[Stage, int, int]:
        """Return the operator's part of an SE block, and the MACs and bytes that SE adds to the network by it."""
        if place.block is None:
            return "", 0, 0
        macs = work.macs + work.other
        if rule.role == "reduction":
            shape = self._maps.setdefault(place.block, tensors[0].shape)
            if tensors[0].shape == shape:
                return "squeeze", macs, moved
        shape = self._maps.get(place.block, torch.Size())
        if out.shape != shape:
            return "excitation", macs, moved
        if rule.role != "product":
            return ("", 0, 0) if place.joins else ("excitation", macs, moved)
        maps = [x for x in tensors if x.shape == shape and _numel(x) == x.numel()]
        if rule.name == "addcmul" and len(maps) == 2:
            # addcmul(shortcut, branch, gate) is the network's own addition with a factor more: the addition reads both
            # maps and writes one all the same.
            return "scale", macs - out.numel(), moved - self._bytes(out) - sum(self._bytes(x) for x in maps)
        return "scale", macs, moved

    # Gradients.

    def _note_node(self) -> None:
        """Note the node that autograd made for the last operation."""
        if self._last is not None:
            index, out = self._last
            # Written in place, a view has its node in the graph of the tensor that it shows.
            changed = out._base if out._base is not None and self.operations[index].operator.endswith("_") else out
            self._nodes[index] = changed.grad_fn
            self._last = None

    def follow_gradients(self, outputs: object) -> None:
        """Keep the backward costs of those operations only that a gradient of the outputs reaches.

        Args:
            outputs: of the network; gradients flow from all tensors among them that need one.
        """
        self._note_node()
        tensors = list(_tensors_of(outputs, set()))
        if not tensors:
            # An object of a kind that cannot be looked into: every operation may be part of it.
            self._reveal_hidden(None)
            return
        reached = _reached(x.grad_fn for x in tensors)
        for index, operation in enumerate(self.operations):
            if (operation.input_gradient or operation.backward_macs) and self._nodes.get(index) not in reached:
                self.operations[index] = _replaced(operation, _NO_GRADIENT)
        self._reveal_hidden(reached)

    def _reveal_hidden(self, reached: set[Any] | None) -> None:
        """Find the operators that ran inside a `torch.autograd.Function`, and add their backward costs.

        Such a function runs without gradients and marks its results afterwards. So its operators lie between an input
        that needs a gradient and a result that has one. Under `torch.no_grad` no result has one.
        """

        def flows(x: Tensor) -> bool:
            return x.requires_grad and (reached is None or x.grad_fn is None or x.grad_fn in reached)

        if not any(flows(x) for *_, outs in self._hidden for x in outs):
            return
        carrying: set[int] = set()
        for _, _, _, tensors, outs in self._hidden:
            if any(x.requires_grad or id(x) in carrying for x in tensors):
                carrying.update(id(x) for x in outs if x.is_floating_point())
        reaching: set[int] = set()
        for index, rule, args, tensors, outs in reversed(self._hidden):
            if not any(flows(x) or id(x) in reaching for x in outs):
                continue
            reaching.update(id(x) for x in tensors)
            if index >= 0:
                operation = self.operations[index]
                work = Work(operation.macs, operation.other, operation.other_flops)
                found = gradients(rule, work, args, tensors, outs[0], lambda x: x.requires_grad or id(x) in carrying)
                self.operations[index] = _replaced(operation, found)


_NO_GRADIENT: dict[str, Any] = {
    "backward_macs": 0,
    "weight_gradient": False,
    "input_gradient": False,
    "backward_other": 0,
    "backward_other_flops": 0,
}


def _tensors_of(value: object, seen: set[int]) -> Iterator[Tensor]:
    """Yield the tensors of a network's output, also those that are attributes of an object."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif hasattr(leaf, "__dict__") and id(leaf) not in seen and not isinstance(leaf, (type, nn.Module)):
            seen.add(id(leaf))
            yield from _tensors_of(list(vars(leaf).values()), seen)


def _reached(nodes: Iterable[Any]) -> set[Any]:
    """Return the nodes of autograd's graph that a gradient reaches from some of them."""
    reached: set[Any] = set()
    waiting = [node for node in nodes if node is not None]
    while waiting:
        node = waiting.pop()
        if node not in reached:
            reached.add(node)
            waiting.extend(following for following, _ in node.next_functions if following is not None)
    return reached


class _Functions(TorchFunctionMode):
    """Keep the name of the outermost public function that is running."""

    def __init__(self) -> None:
        super().__init__()
        self.current = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before, name = self.current, getattr(func, "__name__", str(func))
        # fvcore 0.1.5 does not know convolutions with named padding.
        self.current = f"{name}, padding by name" if "conv" in name and _has_text(args, kwargs) else name
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.current = before


def _has_text(args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> bool:
    return any(isinstance(value, str) for value in (*args, *(kwargs or {}).values()))


def _needs_gradient(x: Tensor) -> bool:
    return x.requires_grad


def _replaced(operation: Operation, fields: dict[str, Any]) -> Operation:
    return msgspec.structs.replace(operation, **fields)


def _uncounted(operator: str, path: str, function: str, tensors: list[Tensor], out: Tensor) -> Operation:
    return Operation(
        name=operator.replace("::", "."),
        operator=operator,
        path=path,
        function=function,
        stage="",
        block=None,
        known=False,
        input_numel=tensors[0].numel() if tensors else 0,
        output_numel=out.numel(),
        macs=0,
        other=0,
        other_flops=0,
        bytes=0,
        stage_macs=0,
        stage_bytes=0,
        groups=1,
        training=False,
        affine=False,
    )


def _places(model: nn.Module, se_blocks: Collection[str]) -> dict[int, _Place]:
    # A block has a module of its own around its site, which does no work and has the site's path.
    modules = {path: sites_own(module) for path, module in named_sites(model)}
    for path in se_blocks:
        if path not in modules:
            raise ModelError(f"{type(model).__name__}: has no module {path!r} to count as SE{nearest(path, modules)}")
    places: dict[int, _Place] = {}
    inside: str | None = None
    for path, module in modules.items():
        # named_sites goes depth first, so what follows a block with its prefix is inside of it.
        if inside is None or (inside and not path.startswith(f"{inside}.")):
            inside = path if isinstance(module, Attention) or path in se_blocks else None
        if inside is not None:
            places[id(module)] = _Place(path=path, block=inside, gates=path == inside)
        elif isinstance(module, GatedJoin):
            places[id(module)] = _Place(path=path, block=f"{path}.se", gates=True, joins=True)
        else:
            places[id(module)] = _Place(path=path)
    return places


@contextmanager
def _hooked(tracer: _Tracer) -> Iterator[None]:
    """Hook all modules globally; the model's own hooks are not changed."""
    before = register_module_forward_pre_hook(tracer.enter)
    try:
        after = register_module_forward_hook(tracer.leave)
        try:
            yield
        finally:
            after.remove()
    finally:
        before.remove()


def op_trace(
    model: nn.Module,
    example: Example,
    *,
    dtype: torch.dtype | None = None,
    training: bool = False,
    se_blocks: Collection[str] = (),
    details: bool = False,
    on: On = "fake",
) -> OpTrace:
    """Record every operator of one forward pass with its cost; the model is not changed.

    Args:
        model: any module on any device, the meta device included.
        example: an input's shape or an example, as for `selab.meta.example_arguments`.
        dtype: of all floating-point tensors when bytes are counted; None for their own.
        training: count in train mode instead of eval mode.
        se_blocks: paths of modules to count as SE blocks, besides those of selab.
        on: `cpu` to run the kernels on a copy with real tensors, for a network in which values decide what is computed.
        details: also record module calls and function names, which explaining other counters needs.

    Raises:
        ModelError: the forward pass fails; names the module in which it did.
    """
    model = as_written(model)
    fakes = make_pass(model, example, on)
    tracer = _Tracer(fakes, dtype=dtype, se_blocks=se_blocks, details=details)
    try:
        # With gradients, so that autograd marks the tensors that need them. A scripted module is not copied, so
        # `evaluating` gives it its mode back.
        with (
            evaluating(fakes.model),
            torch.inference_mode(False),
            torch.enable_grad(),
            fakes.running(),
            _hooked(tracer),
            tracer.functions or nullcontext(),
            tracer,
        ):
            set_mode(fakes.model, training=training)
            tracer.follow_gradients(fakes())
    except SpecError:
        # A counting rule of the user's own; the input is not to blame.
        raise
    except Exception as error:
        given = described((fakes.args, fakes.kwargs))
        step = ""
        if isinstance(error, VALUE_NEEDED):
            step = f"; {ON_REAL_TENSORS}"
        elif blames_input(error):
            step = "; pass the input that the network expects"
        raise ModelError(
            f"{type(model).__name__}: counting fails in {tracer.where} with {given}: {reason_of(error)}{step}"
        ) from error
    return OpTrace(
        operations=tuple(tracer.operations),
        calls=dict(tracer.calls),
        module_calls=tuple(tracer.module_calls),
        se_blocks=tuple(place.path for place in tracer.places.values() if place.path == place.block),
    )
