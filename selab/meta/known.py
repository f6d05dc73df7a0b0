"""Values that fake tensors are known to have.

A value is valid until something writes into the memory of its tensor. Tensors of one memory share a mark of that, so
that nothing refers to the tensors themselves: `Module.to` refuses to swap a tensor with weak references.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(eq=False)
class Memory:
    """The memory of one or several fake tensors.

    Attributes:
        written: whether it was written since the values were noted.
    """

    written: bool = False


@dataclass(frozen=True, eq=False)
class _Known:
    value: Tensor
    memory: Memory


def note(fake: Tensor, value: Tensor, memory: Memory) -> None:
    """Note the value of a fake tensor, as long as nothing writes into its memory."""
    fake.known = _Known(value, memory)  # type: ignore[attr-defined]


def value_of(fake: Tensor) -> Tensor | None:
    """Return the value that a tensor is known to have; None if it is not known."""
    found: _Known | None = getattr(fake, "known", None)
    return None if found is None or found.memory.written else found.value
