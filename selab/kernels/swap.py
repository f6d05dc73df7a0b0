"""Swap a module's class, in place, for a subclass of it that computes the same in fewer passes.

Parameters, buffers, children, hooks, checkpoint keys and `isinstance` stay what they were.
"""

from typing import Any, ClassVar, Self

from torch import nn


class Swapped:
    """Base of the mixins that `swap` puts before a module's own class.

    Attributes:
        library: the class that the module had before.
    """

    library: ClassVar[type[nn.Module]]

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        """Pickle and copy as (mixin, class before): the class made of both cannot be imported by a name."""
        if not is_exact(self):
            return super().__reduce_ex__(protocol)
        return _empty, (type(self).__bases__[0], self.library), self.__getstate__()

    @classmethod
    def within(cls, library: type[nn.Module]) -> type[Self]:
        """Return the subclass of both; made once for each pair, so that such modules are of one class."""
        key: tuple[type, ...] = cls, library
        if key not in _CLASSES:
            # torch.fx treats classes of torch.nn as leaves, and would record a call of the module, not its forward.
            place = cls.__module__ if library.__module__.startswith("torch.nn") else library.__module__
            body = {"library": library, "__module__": place, "__doc__": library.__doc__}
            _CLASSES[key] = type(library.__name__, key, body)
        made: type[Self] = _CLASSES[key]
        return made


_CLASSES: dict[tuple[type, ...], Any] = {}


def swap(module: nn.Module, mixin: type[Swapped]) -> None:
    """Put `mixin` before the module's class, in place; leave a module alone that has it already."""
    if not isinstance(module, mixin):
        changed: Any = module
        changed.__class__ = mixin.within(type(module))


def restore(module: nn.Module) -> None:
    """Undo `swap`, in place; leave a module alone whose class was changed again since, as by a parametrization."""
    if is_exact(module):
        changed: Any = module
        changed.__class__ = changed.library


def is_exact(module: nn.Module) -> bool:
    """Return whether the class is one that `swap` made, not a subclass of it, which may compute anything."""
    kind = type(module)
    return _CLASSES.get(kind.__bases__) is kind


def library_of(module: nn.Module) -> type[nn.Module]:
    """Return a module's class, or the one that it had before `swap`."""
    return module.library if isinstance(module, Swapped) and is_exact(module) else type(module)


def _empty(mixin: type[Swapped], library: type[nn.Module]) -> nn.Module:
    """Return a swapped module without its state."""
    kind: Any = mixin.within(library)
    made: nn.Module = kind.__new__(kind)
    return made
