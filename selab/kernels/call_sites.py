"""Read a function's bytecode: where the arguments of one of its calls come from, and where the result goes.

The answers hold for every path through the function. What is not understood is None or absent, which a caller of this
module must take as "may be read again".
"""

import dis
from collections.abc import Iterable, Iterator
from functools import lru_cache
from types import CodeType
from typing import Any, NamedTuple

TEMPORARY = ""
"""The source of an argument that no local variable holds."""


class Use(NamedTuple):
    """A call that receives a value.

    Attributes:
        callee: the called expression, as in `CallSite`.
        position: of the argument.
        offset: of the call, in bytes.
    """

    callee: tuple[str, ...]
    position: int
    offset: int


class Destination(NamedTuple):
    """Where the result of a call goes.

    Attributes:
        uses: the calls that receive it, and nothing holds it after them.
        returned: whether the function may return it.
    """

    uses: tuple[Use, ...]
    returned: bool


class CallSite(NamedTuple):
    """One call in a function.

    Attributes:
        callee: a local variable and attributes of it, such as ("self", "layer1", "se"); empty for anything else.
        sources: for each positional argument, the local variable it was loaded from, `TEMPORARY`, or None if unknown.
        live: the local variables that may be read after the call.
        parameters: the parameters that still have the value that they were called with, with their positions.
        destination: of the result; None if it may go anywhere else.
    """

    callee: tuple[str, ...]
    sources: tuple[str | None, ...]
    live: frozenset[str]
    parameters: dict[str, int]
    destination: Destination | None


class _Op(NamedTuple):
    offset: int
    name: str
    arg: int
    value: Any


# A function that calls one of these may read any local variable.
_READ_LOCALS = {"locals", "vars", "eval", "exec", "dir", "_getframe", "currentframe", "f_locals", "stack"}
_CO_OPTIMIZED, _NOT_PLAIN = 0x1, 0x20 | 0x80 | 0x100 | 0x200  # generators and coroutines
_UNCONDITIONAL = ("JUMP_FORWARD", "JUMP_BACKWARD", "JUMP_BACKWARD_NO_INTERRUPT", "JUMP_ABSOLUTE")
_ENDS = ("RETURN_VALUE", "RETURN_CONST", "RAISE_VARARGS", "RERAISE")
_NOTHING = ("CACHE", "EXTENDED_ARG", "NOP", "RESUME", "PRECALL", "KW_NAMES", "COPY_FREE_VARS", "MAKE_CELL", "NOT_TAKEN")
# Values popped and pushed.
_EFFECTS = {
    **dict.fromkeys((*_NOTHING, *_UNCONDITIONAL, "DELETE_FAST"), (0, 0)),
    **dict.fromkeys(("LOAD_CONST", "LOAD_DEREF", "LOAD_CLOSURE", "LOAD_CLASSDEREF", "PUSH_NULL"), (0, 1)),
    **dict.fromkeys(("STORE_FAST", "POP_TOP", "RETURN_VALUE", "STORE_DEREF", "STORE_GLOBAL"), (1, 0)),
    **dict.fromkeys(("BINARY_OP", "BINARY_SUBSCR", "COMPARE_OP", "IS_OP", "CONTAINS_OP"), (2, 1)),
    **dict.fromkeys(("UNARY_NEGATIVE", "UNARY_NOT", "UNARY_INVERT", "UNARY_POSITIVE", "TO_BOOL", "GET_ITER"), (1, 1)),
    "STORE_ATTR": (2, 0),
    "STORE_SUBSCR": (3, 0),
    "LOAD_METHOD": (1, 2),
    "RETURN_CONST": (0, 0),
}
# Operators of tensors: a feature map with a deferred BatchNorm is normalised by them.
_OPERATORS = ("BINARY_OP", "BINARY_SUBSCR", "COMPARE_OP", "UNARY_NEGATIVE", "LOAD_ATTR", "LOAD_METHOD")


@lru_cache(maxsize=4096)
def call_site(code: CodeType, offset: int) -> CallSite | None:
    """Analyse the call at a byte offset of a function, as `frame.f_lasti` gives it; None if that is not possible."""
    if not code.co_flags & _CO_OPTIMIZED or code.co_flags & _NOT_PLAIN or _READ_LOCALS.intersection(code.co_names):
        return None
    try:
        return _Function(code).call(offset)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError):  # an interpreter with another bytecode
        return None


class _Function:
    """The instructions of a function, and the order in which they may run."""

    def __init__(self, code: CodeType) -> None:
        self.code = code
        self.ops = list(_ops(code))
        self.index = {op.offset: i for i, op in reversed(list(enumerate(self.ops)))}
        self.jumps = {i: self.index[op.value] for i, op in enumerate(self.ops) if _is_jump(op.name)}
        handlers = {self.index[entry.target] for entry in _exception_entries(code)}
        self.joined = {*self.jumps.values(), *handlers}
        self.raises = bool(handlers)
        self.after = [(*self._successors(i), *handlers) for i in range(len(self.ops))]
        self.live = self._live()

    def _successors(self, i: int) -> Iterator[int]:
        op = self.ops[i]
        if i in self.jumps:
            yield self.jumps[i]
        if op.name not in _UNCONDITIONAL and op.name not in _ENDS:
            yield i + 1

    def _live(self) -> list[set[str]]:
        """Return the local variables that may be read before they are stored, at the start of each instruction."""
        live: list[set[str]] = [set() for _ in self.ops]
        changed = True
        while changed:
            changed = False
            for i in reversed(range(len(self.ops))):
                kind, name = _local(self.ops[i])
                now = self.live_after(i, live)
                now = now - {name} if kind == "store" else now | {name} if kind == "load" else now
                changed |= now != live[i]
                live[i] = now
        return live

    def live_after(self, i: int, live: list[set[str]] | None = None) -> set[str]:
        return set().union(*((live or self.live)[j] for j in self.after[i]))

    def call(self, offset: int) -> CallSite | None:
        i = self.index[offset]
        count = self._positional(i)
        if count is None:
            return None
        return CallSite(
            callee=self._callee(i, count),
            sources=tuple(self._source(i, count - 1 - position) for position in range(count)),
            live=frozenset(self.live_after(i)),
            parameters=self._unchanged_parameters(i),
            destination=self._destination(i),
        )

    def _positional(self, i: int) -> int | None:
        """Return the number of arguments of a call that has positional ones only."""
        before = i - 1
        while self.ops[before].name in ("PRECALL", "CACHE", "EXTENDED_ARG"):
            before -= 1
        return self.ops[i].arg if self.ops[i].name == "CALL" and self.ops[before].name != "KW_NAMES" else None

    def _producer(self, i: int, depth: int) -> int | None:
        """Return the instruction that pushed the value at `depth` below the top of the stack, just before i."""
        while i not in self.joined and i > 0:
            i -= 1
            effect = None if i in self.jumps else _effect(self.ops[i])
            if effect is None:
                return None
            pops, pushes = effect
            if depth < pushes:
                return i
            depth += pops - pushes
        return None

    def _source(self, i: int, depth: int) -> str | None:
        at = self._producer(i, depth)
        if at is None:
            return None
        kind, name = _local(self.ops[at])
        if kind != "load":
            return TEMPORARY
        stored = any(_local(op) == ("store", name) for op in self.ops[at + 1 : i])
        return None if stored or self.ops[at].name == "LOAD_FAST_AND_CLEAR" else name

    def _callee(self, i: int, count: int) -> tuple[str, ...]:
        at = self._producer(i, count)
        if at is not None and self.ops[at].name == "PUSH_NULL":
            at = self._producer(i, count + 1)
        names: list[str] = []
        while at is not None and self.ops[at].name in ("LOAD_ATTR", "LOAD_METHOD"):
            names.append(self.ops[at].value)
            at = self._producer(at, 0)
        if at is None or _local(self.ops[at])[0] != "load":
            return ()
        return (_local(self.ops[at])[1], *reversed(names))

    def _unchanged_parameters(self, i: int) -> dict[str, int]:
        before: dict[int, list[int]] = {}
        for j, after in enumerate(self.after):
            for k in after:
                before.setdefault(k, []).append(j)
        seen, waiting = {i}, [i]
        while waiting:
            for j in before.get(waiting.pop(), ()):
                if j not in seen:
                    seen.add(j)
                    waiting.append(j)
        stored = {_local(self.ops[j])[1] for j in seen if _local(self.ops[j])[0] == "store"}
        names = self.code.co_varnames[: self.code.co_argcount]
        return {name: position for position, name in enumerate(names) if name not in stored}

    def _destination(self, i: int) -> Destination | None:
        """Follow the value that the call i pushes; None if it may go anywhere but to calls and back to the caller."""
        if self.raises:
            return None
        uses: dict[Use, None] = {}
        returned = False
        waiting: list[tuple[int, int | None, str]] = [(j, 0, "") for j in self.after[i]]
        seen = set(waiting)
        while waiting:
            i, depth, variable = waiting.pop()
            op = self.ops[i]
            kind, name = _local(op)
            effect = _effect(op)
            if effect is None:
                return None
            pops, pushes = effect
            if depth is not None and depth < pops:
                kept = variable if variable and variable in self.live_after(i) else ""
                if op.name == "STORE_FAST":
                    if kept and name != variable:
                        return None
                    depth, variable = None, name
                elif op.name == "RETURN_VALUE":
                    returned = True
                    continue
                elif op.name in _OPERATORS or op.name == "POP_TOP":
                    depth, variable = None, kept
                else:
                    count = self._positional(i)
                    callee = () if count is None else self._callee(i, count)
                    if count is None or depth >= count or not callee or kept:
                        return None
                    uses[Use(callee, count - 1 - depth, op.offset)] = None
                    continue
            elif variable and name == variable:
                if kind == "store":
                    variable = ""
                    depth = None if depth is None else depth - pops + pushes
                elif depth is not None:
                    return None
                else:
                    depth = 0
            elif depth is not None:
                depth += pushes - pops
            if depth is None and not variable:
                continue
            for j in self.after[i]:
                if depth is not None and op.name == "FOR_ITER" and j == self.jumps[i]:
                    return None
                state = (j, depth, variable)
                if state not in seen:
                    seen.add(state)
                    waiting.append(state)
        return Destination(tuple(uses), returned)


def _ops(code: CodeType) -> Iterator[_Op]:
    """Yield the instructions; one that loads or stores two local variables as two."""
    for one in dis.get_instructions(code):
        if isinstance(one.argval, tuple) and one.opname.count("_FAST") == 2:
            head, _, tail = one.opname.partition("_FAST_")
            for name, value in zip((f"{head}_FAST", tail), one.argval, strict=True):
                yield _Op(one.offset, name, 0, value)
        else:
            yield _Op(one.offset, one.opname, one.arg or 0, one.argval)


def _exception_entries(code: CodeType) -> Iterable[Any]:
    entries: Iterable[Any] = dis.Bytecode(code).exception_entries  # type: ignore[attr-defined]
    return entries


def _is_jump(name: str) -> bool:
    return dis.opmap.get(name, -1) in _JUMPS


_JUMPS = {*dis.hasjrel, *dis.hasjabs}


def _local(op: _Op) -> tuple[str, str]:
    """Return what an instruction does with which local variable: load, store (or delete), or nothing."""
    if "_FAST" not in op.name:
        return "", ""
    if op.name.startswith("LOAD_FAST"):
        return "load", op.value
    if op.name in ("STORE_FAST", "DELETE_FAST"):
        return "store", op.value
    raise ValueError(op.name)


def _effect(op: _Op) -> tuple[int, int] | None:
    """Return how many values an instruction takes from the stack and puts there; None if that is not known."""
    name, arg = op.name, op.arg
    if name in _EFFECTS:
        return _EFFECTS[name]
    if name.startswith("LOAD_FAST"):
        return 0, 1
    if name == "LOAD_GLOBAL":
        return 0, 1 + (arg & 1)
    if name == "LOAD_ATTR":
        # From Python 3.12 on it loads methods as well.
        return 1, 1 + (arg & 1 if "LOAD_METHOD" not in dis.opmap else 0)
    if name == "CALL":
        return arg + 2, 1
    if name in ("BUILD_TUPLE", "BUILD_LIST", "BUILD_SET", "BUILD_STRING", "BUILD_SLICE"):
        return arg, 1
    if name == "COPY":
        return arg, arg + 1
    if name == "SWAP":
        return arg, arg
    if name == "FOR_ITER":
        return 1, 2
    if name.startswith("POP_JUMP"):
        return 1, 0
    return None
