"""What a trace on the meta device shows of a network's maps: who reads them, and whether anybody does so again."""

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from selab.meta import meta_twin


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a trace of inference shows.

    Attributes:
        owning: paths of blocks and joins whose (first) input nobody reads after them.
        reader: path of a BatchNorm → that of the one block, join or activation that reads its output; where nobody
            reads the BatchNorm's input either.
        alone: path of a BatchNorm → whether nobody else reads its input.
        producers: path of a BatchNorm → those of the modules that return its input or its output; path of a reader → of
            those that return what it reads.
    """

    owning: set[str]
    reader: dict[str, str]
    alone: dict[str, bool]
    producers: dict[str, set[str]]


class _Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches storages: which of them are read while they are watched."""

    def __init__(self, taken: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.again: set[str] = set()
        self._taken = taken
        self._watched: dict[int, str] = {}
        # A storage that is gone leaves its address to another one.
        self._alive: list[Any] = []
        self._outlasting: list[tuple[StorageWeakRef, str]] = []

    def watch(self, name: str, x: Tensor) -> None:
        """From now on a read of x's memory counts."""
        storage = x.untyped_storage()
        self._alive.append(storage)
        self._outlasting.append((StorageWeakRef(storage), name))  # type: ignore[no-untyped-call]
        if storage._cdata in self._taken or storage._cdata in self._watched:
            self.again.add(name)
        self._watched[storage._cdata] = name

    def forget(self, x: Tensor) -> None:
        """From now on it does not."""
        self._watched.pop(x.untyped_storage()._cdata, None)

    def look(self, values: object) -> None:
        """Notes the watched memory among these."""
        for leaf in tree_leaves(values):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata in self._watched:
                self.again.add(self._watched[leaf.untyped_storage()._cdata])

    def end(self) -> None:
        """Notes the memory that somebody keeps, and may read later."""
        self._alive.clear()
        self.again.update(name for kept, name in self._outlasting if not kept.expired())  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.look((args, kwargs))
        out = func(*args, **(kwargs or {}))
        self._alive.extend(leaf.untyped_storage() for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        return out


class _Trace:
    """Hooks that follow maps through BatchNorms and those who read them (blocks, joins, activations)."""

    def __init__(self, reads: _Reads) -> None:
        self.reads = reads
        self.owners: set[str] = set()
        self.calls: Counter[str] = Counter()
        self.readers: dict[str, list[str]] = {}
        self.producers: dict[str, set[str]] = {}
        self._normalised: list[tuple[Tensor, str]] = []
        self._given: list[tuple[Tensor, str]] = []

    def after_norm(self, path: str, args: tuple[Any, ...], out: Tensor) -> None:
        """Watches what came in and what goes out."""
        self.calls[path] += 1
        self.producers.setdefault(path, set()).update(producer for given, producer in self._given if given is args[0])
        self.reads.watch(f"input of {path}", args[0])
        self.reads.watch(f"output of {path}", out)
        self._normalised.append((out, path))
        self.readers.setdefault(path, [])

    def before_reader(self, path: str, args: tuple[Any, ...]) -> None:
        """Notes whose output it reads; what is read until it returns is its own business."""
        given_by = (producer for given, producer in self._given if args and given is args[0])
        self.producers.setdefault(path, set()).update(given_by)
        for out, norm in self._normalised:
            if args and args[0] is out:
                self.readers[norm].append(path)
                self.reads.look(args[1:])
                self.reads.forget(out)

    def after_reader(self, path: str, args: tuple[Any, ...]) -> None:
        """Watches what it has read."""
        self.calls[path] += 1
        self.reads.watch(path, args[0])

    def after_any(self, path: str, out: object) -> None:
        """Notes who gives out which map."""
        if isinstance(out, Tensor):
            self._given.append((out, path))
            for normalised, norm in self._normalised:
                if normalised is out and norm != path:
                    self.producers[norm].add(path)

    def seen(self) -> Seen:
        """What all this shows, after which nothing more is followed."""
        self._given.clear()
        self._normalised.clear()
        self.reads.end()
        again = self.reads.again
        reader = {}
        for norm, paths in self.readers.items():
            untouched = not again & {f"input of {norm}", f"output of {norm}", *paths}
            if untouched and len(paths) == 1 and self.calls[norm] == self.calls[paths[0]] == 1:
                reader[norm] = paths[0]
        alone = {norm: f"input of {norm}" not in again for norm in self.readers}
        return Seen(
            owning=(self.owners & set(self.calls)) - again, reader=reader, alone=alone, producers=self.producers
        )


Named = Callable[[nn.Module], Iterable[tuple[str, nn.Module]]]


def traced(model: nn.Module, input_nchw: tuple[int, ...], *, norms: Named, readers: Named) -> Seen:
    """Runs a copy of the network on the meta device, in inference.

    Args:
        model: left as it is.
        input_nchw: (N, C, H, W) of the example.
        norms: (path, module) of the BatchNorms in a network whose work might be left to others.
        readers: of those who might do it, or take the place of what they read; these have an attribute `can_overwrite`.

    Raises:
        Whatever the network raises.
    """
    twin = meta_twin(model).eval()
    example = torch.empty(input_nchw, device="meta", dtype=next((p.dtype for p in twin.parameters()), torch.float32))
    kept = (*twin.parameters(), *twin.buffers(), example)
    trace = _Trace(_Reads({tensor.untyped_storage()._cdata for tensor in kept}))
    with ExitStack() as stack:
        for path, module in twin.named_modules():
            given = partial(trace.after_any, path)
            stack.callback(module.register_forward_hook(lambda _, _args, out, given=given: given(out)).remove)
        for path, module in norms(twin):
            after = partial(trace.after_norm, path)
            stack.callback(module.register_forward_hook(lambda _, args, out, after=after: after(args, out)).remove)
        for path, module in readers(twin):
            if hasattr(module, "can_overwrite"):
                trace.owners.add(path)
            if hasattr(module, "inplace"):
                # In place, whoever reads its output would seem to read its input.
                activation: Any = module
                activation.inplace = False
            before, after = partial(trace.before_reader, path), partial(trace.after_reader, path)
            stack.callback(module.register_forward_pre_hook(lambda _, args, before=before: before(args)).remove)
            stack.callback(module.register_forward_hook(lambda _, args, _out, after=after: after(args)).remove)
        with torch.no_grad(), trace.reads:
            trace.reads.look(twin(example))
    return trace.seen()
