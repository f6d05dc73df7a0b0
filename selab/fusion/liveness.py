"""Liveness analysis on fake tensors: which modules read each feature map, and whether it is read again."""

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from selab.kernels.deferred_relu import DeferredReLU
from selab.meta import Example, On, make_pass
from selab.meta.modes import DispatchMode


@dataclass(frozen=True, kw_only=True)
class Liveness:
    """What one pass at inference shows; modules are given by their paths.

    Attributes:
        overwritable: blocks and joins whose first input nothing reads after them.
        consumer: BatchNorm → the only block, join or activation that reads its output, if nothing else reads its input.
        exclusive: BatchNorm → whether nothing else reads its input.
        producers: BatchNorm → the modules that return its input or its output; block, join or activation → those that
            return its input.
    """

    overwritable: set[str]
    consumer: dict[str, str]
    exclusive: dict[str, bool]
    producers: dict[str, set[str]]


class _Reads(DispatchMode):
    """Record which watched storages are read."""

    def __init__(self, permanent: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.read: set[str] = set()
        self._permanent = permanent
        self._watched: dict[int, str] = {}
        # Keeps storages alive: the address of a freed one may be given to another.
        self._alive: list[Any] = []
        self._outlasting: list[tuple[StorageWeakRef, str]] = []

    def watch(self, name: str, x: Tensor) -> None:
        """Count reads of x's memory from now on."""
        storage = x.untyped_storage()
        self._alive.append(storage)
        self._outlasting.append((StorageWeakRef(storage), name))  # type: ignore[no-untyped-call]
        if storage._cdata in self._permanent or storage._cdata in self._watched:
            self.read.add(name)
        self._watched[storage._cdata] = name

    def forget(self, x: Tensor) -> None:
        """Stop counting reads of x's memory."""
        self._watched.pop(x.untyped_storage()._cdata, None)

    def note(self, values: object) -> None:
        """Record reads of these values."""
        for leaf in tree_leaves(values):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata in self._watched:
                self.read.add(self._watched[leaf.untyped_storage()._cdata])

    def end(self) -> None:
        """Count memory that is still referenced, and may be read later, as read."""
        self._alive.clear()
        self.read.update(name for kept, name in self._outlasting if not kept.expired())  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.note((args, kwargs))
        out = func(*args, **(kwargs or {}))
        self._alive.extend(leaf.untyped_storage() for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        return out


class DataflowTrace:
    """Hooks that follow feature maps through BatchNorms and their consumers (blocks, joins, activations)."""

    def __init__(self, reads: _Reads) -> None:
        self.reads = reads
        self.can_overwrite: set[str] = set()
        self.calls: Counter[str] = Counter()
        self.consumers: dict[str, list[str]] = {}
        self.producers: dict[str, set[str]] = {}
        self._normalised: list[tuple[Tensor, str]] = []
        self._produced: list[tuple[Tensor, str]] = []

    def after_norm(self, path: str, args: tuple[Any, ...], out: Tensor) -> None:
        """Watch a BatchNorm's input and output."""
        self.calls[path] += 1
        self._note_producers(path, args)
        self.reads.watch(f"input of {path}", args[0])
        self.reads.watch(f"output of {path}", out)
        self._normalised.append((out, path))
        self.consumers.setdefault(path, [])

    def before_consumer(self, path: str, args: tuple[Any, ...]) -> None:
        """Record whose output a consumer reads; its own reads do not count."""
        self._note_producers(path, args)
        for out, norm in self._normalised:
            if args and args[0] is out:
                self.consumers[norm].append(path)
                self.reads.note(args[1:])
                self.reads.forget(out)

    def after_consumer(self, path: str, args: tuple[Any, ...]) -> None:
        """Watch a consumer's input."""
        self.calls[path] += 1
        self.reads.watch(path, args[0])

    def after_any(self, path: str, out: object) -> None:
        """Record the module that returned a feature map."""
        if isinstance(out, Tensor):
            self._produced.append((out, path))
            for normalised, norm in self._normalised:
                if normalised is out and norm != path:
                    self.producers[norm].add(path)

    def _note_producers(self, path: str, args: tuple[Any, ...]) -> None:
        found = {producer for produced, producer in self._produced if args and produced is args[0]}
        self.producers.setdefault(path, set()).update(found)

    def result(self) -> Liveness:
        """End the trace and return what it showed."""
        self._produced.clear()
        self._normalised.clear()
        self.reads.end()
        read = self.reads.read
        consumer = {}
        for norm, paths in self.consumers.items():
            unread = not read & {f"input of {norm}", f"output of {norm}", *paths}
            if unread and len(paths) == 1 and self.calls[norm] == self.calls[paths[0]] == 1:
                consumer[norm] = paths[0]
        return Liveness(
            overwritable=(self.can_overwrite & set(self.calls)) - read,
            consumer=consumer,
            exclusive={norm: f"input of {norm}" not in read for norm in self.consumers},
            producers=self.producers,
        )


Named = Callable[[nn.Module], Iterable[tuple[str, nn.Module]]]


def analyze(model: nn.Module, example: Example, *, norms: Named, consumers: Named, on: On = "fake") -> Liveness:
    """Run a copy of the network on fake tensors, at inference.

    Args:
        model: not changed.
        example: an example input: a shape such as (N, C, H, W), a tensor, positional arguments in a tuple or list, or
            keyword arguments in a mapping.
        norms: yields (path, module) of the BatchNorms that might be deferred.
        consumers: yields (path, module) of the modules that might apply them, or overwrite what they read; the latter
            have an attribute `can_overwrite`.
        on: `cpu` to run the kernels on a copy with real tensors.

    Raises:
        Whatever the network raises.
    """
    fakes = make_pass(model, example, on)
    twin = fakes.model.eval()
    for parent in twin.modules():
        for name, child in parent._modules.items():
            if isinstance(child, DeferredReLU):
                # The block after it reads its input.
                parent._modules[name] = nn.Identity()
    given = [leaf for leaf in tree_leaves((fakes.args, fakes.kwargs)) if isinstance(leaf, Tensor)]
    permanent = (*twin.parameters(), *twin.buffers(), *given)
    trace = DataflowTrace(_Reads({tensor.untyped_storage()._cdata for tensor in permanent}))
    with ExitStack() as stack:
        for path, module in twin.named_modules():
            note = partial(trace.after_any, path)
            stack.callback(module.register_forward_hook(lambda _, _args, out, note=note: note(out)).remove)
        for path, module in norms(twin):
            after = partial(trace.after_norm, path)
            stack.callback(module.register_forward_hook(lambda _, args, out, after=after: after(args, out)).remove)
        for path, module in consumers(twin):
            if hasattr(module, "can_overwrite"):
                trace.can_overwrite.add(path)
            if hasattr(module, "inplace"):
                # In place, a reader of its output would seem to read its input.
                activation: Any = module
                activation.inplace = False
            before, after = partial(trace.before_consumer, path), partial(trace.after_consumer, path)
            stack.callback(module.register_forward_pre_hook(lambda _, args, before=before: before(args)).remove)
            stack.callback(module.register_forward_hook(lambda _, args, _out, after=after: after(args)).remove)
        with torch.no_grad(), fakes.running(), trace.reads:
            trace.reads.note(fakes())
    return trace.result()
