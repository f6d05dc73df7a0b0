"""Fake tensors: they have the device, dtype, shape and strides of real ones, but no memory; no kernel runs on them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
    in_kernel_invocation_manager,
)
from torch.utils._python_dispatch import TorchDispatchMode

from selab.meta.known import Memory, note, value_of
from selab.meta.shapes import FITS, MAKES

# The values of tensors up to this many elements are followed, so that a network may read its own flags and sizes.
KNOWN_NUMEL = 1024


class ValueNeededError(RuntimeError):
    """What the network computes depends on the value of a tensor, which a fake tensor does not have."""


class NoFakeKernelError(ValueNeededError):
    """An operator has no kernel that computes without values, as most of `quantized::` and of libraries."""


class LeakedError(RuntimeError):
    """A fake tensor outlived its pass, and is computed with."""


VALUE_NEEDED = (ValueNeededError, DataDependentOutputException, DynamicOutputShapeException)


class FakeMode(FakeTensorMode):
    """Run operators on fake tensors.

    torch's own mode imports torch._dynamo and sympy (one second) when it is made. Here operators run through their meta
    kernels directly, and torch's mode is completed and asked only where that needs more: custom kernels, devices that
    are mixed, channels-last convolutions. Small tensors whose values are known without a kernel on the input (flags,
    sizes, indices, constants) keep them in `known`.
    """

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)  # type: ignore[no-untyped-call]
        # What making and entering a fake tensor reads; the rest follows in `_complete`.
        self._is_complete = False
        # Whether its passes are over: what is left of their tensors must not be computed with.
        self.closed = False
        self.in_kernel_invocation = False
        self.enter_stack = []
        self.allow_meta = True
        self.allow_non_fake_inputs = True
        self._allow_unsafe_data_ptr_access = True
        self.shape_env = None
        self.static_shapes = True
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE
        # Device → the attributes of a fake tensor on it.
        self._attributes: dict[torch.device, dict[str, Any]] = {}
        # Real storage → meta storage, so that views and tied tensors stay views and tied.
        self._storages: dict[int, torch.UntypedStorage] = {}
        # Real tensor's id → (the tensor, so that it lives; its fake).
        self._fakes: dict[int, tuple[Tensor, Tensor]] = {}
        # Real storage of few elements → a copy of it.
        self._values: dict[int, torch.UntypedStorage] = {}
        # Meta storage → the memory of the tensors on it whose values are known.
        self._memories: dict[int, Memory] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch 2.13 otherwise imports torch._dynamo at the first operator.
        return False

    def __getattr__(self, name: str) -> Any:
        """Complete torch's mode when a version of torch reads what is set by its own `__init__` only."""
        if name.startswith("_") or self.__dict__.get("_is_complete", True):
            raise AttributeError(name)
        self._complete()
        return getattr(self, name)

    def _complete(self) -> None:
        if not self._is_complete:
            self._is_complete = True
            mine = dict(self.__dict__)
            FakeTensorMode.__init__(self, allow_non_fake_inputs=True)
            self.__dict__.update(mine)

    # Making fake tensors.

    def fake(self, tensor: Tensor, *, device: torch.device | None = None) -> Tensor:
        """Return the fake of a real or meta tensor; the same one each time. A parameter's fake is a parameter.

        Args:
            tensor: not read unless it is small.
            device: that the fake reports; None for the tensor's own. The fake of a meta tensor is on the CPU.
        """
        found = self._fakes.get(id(tensor))
        if found is None:
            with torch._C._DisableTorchDispatch():
                found = (tensor, self._new(tensor, device))
            self._fakes[id(tensor)] = found
        return found[1]

    def _new(self, tensor: Tensor, device: torch.device | None) -> Tensor:
        device = device or tensor.device
        if isinstance(tensor, FakeTensor):
            return tensor if tensor.fake_mode is self else self._of(_dense(tensor), tensor.fake_device, tensor)
        plain = type(tensor) in _PLAIN and tensor.layout is torch.strided
        if not plain or tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
            self._complete()
            return self.from_tensor(tensor)
        storage = tensor.untyped_storage()
        meta = self._storages.get(storage._cdata)
        if meta is None:
            meta = self._storages[storage._cdata] = torch.empty(
                storage.nbytes(), dtype=torch.uint8, device="meta"
            ).untyped_storage()
        made = torch.empty(0, dtype=tensor.dtype, device="meta")
        made.set_(meta, tensor.storage_offset(), tensor.shape, tensor.stride())
        fake = self._of(made, device, tensor)
        if not tensor.is_meta and storage.nbytes() <= 8 * KNOWN_NUMEL:
            self._know(fake, self._private(tensor, storage))
        return fake

    def _private(self, tensor: Tensor, storage: torch.UntypedStorage) -> Tensor:
        """Return the values of a tensor in memory of our own, which may be written; views share it."""
        values = self._values.get(storage._cdata)
        if values is None:
            held = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            values = self._values[storage._cdata] = held.clone().untyped_storage()
        made = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return made.set_(values, tensor.storage_offset(), tensor.shape, tensor.stride())

    def _made(self, meta: Tensor, device: torch.device) -> Tensor:
        """Return a fake tensor; from the second one on, its many attributes are copied from the first of a device."""
        attributes = self._attributes.get(device)
        if attributes is None:
            first = FakeTensor(self, meta, device)
            self._attributes[device] = dict(vars(first))
            return first
        made = Tensor._make_subclass(FakeTensor, meta, False, dispatch_device=True, device_for_backend_keys=device)
        vars(made).update(attributes)
        return made

    def _of(self, meta: Tensor, device: torch.device, like: Tensor) -> Tensor:
        fake = self._made(meta, torch.device("cpu") if device.type == "meta" else device)
        if isinstance(like, nn.Parameter):
            fake._is_param = True
        if isinstance(like, nn.Buffer):
            fake._is_buffer = True  # type: ignore[attr-defined]
            fake.persistent = like.persistent  # type: ignore[attr-defined]
        return fake.requires_grad_(True) if like.requires_grad else fake

    def wrap(self, made: Any, device: torch.device) -> Any:
        """Return plain meta tensors, also in a tuple or list, as fake ones on a device."""
        if isinstance(made, Tensor):
            if isinstance(made, FakeTensor):
                return made
            with torch._C._DisableTorchDispatch():
                return self._made(made, device)
        if isinstance(made, (tuple, list)):
            wrapped = [self.wrap(one, device) for one in made]
            return type(made)(*wrapped) if hasattr(made, "_fields") else type(made)(wrapped)
        return made

    # Running operators.

    def shortcut(self, func: Any, tensors: list[Tensor], args: Any, kwargs: Any) -> Any:
        """Return the outputs of a common operator on fake tensors without dispatching it; None where that cannot be."""
        name = func._schema.name
        if not tensors or (name not in MAKES and name not in FITS):
            return None
        device = None
        for x in tensors:
            if type(x) is not FakeTensor or x.fake_mode is not self or (device or x.fake_device) != x.fake_device:
                return None
            device = x.fake_device
        if all(value_of(x) is not None for x in tensors):
            return None
        made = self._made_quickly(name, args, kwargs)
        if made is not None and func._schema.is_mutable:
            self._forget(args[0])
        return made if made is None else self.wrap(made, device or torch.device("cpu"))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.closed:
            raise LeakedError(
                f"{func}: one of its tensors is a fake that a counting or tracing pass of selab made, without values; "
                "the network keeps it where a pass cannot put back what was there: clear that cache"
            )
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        if not isinstance(func, torch._ops.OpOverload):
            return self._by_torch(func, types, args, kwargs)
        tensors = list(_tensors(args, kwargs))
        if any(type(x) is not FakeTensor or x.fake_mode is not self for x in tensors):
            if any(type(x) not in _PLAIN and not isinstance(x, FakeTensor) for x in tensors):
                return NotImplemented
            args, kwargs = self._all_fake(args), {key: self._all_fake(value) for key, value in kwargs.items()}
            tensors = list(_tensors(args, kwargs))
        name = func._schema.name
        if name == "aten::lift_fresh":
            return args[0]
        real = self._run_known(func, tensors, args, kwargs)
        if real is _UNKNOWN and name in ("aten::index", "aten::masked_select"):
            args = self._with_indices(name, args)
            func, name = torch.ops.aten.index.Tensor, "aten::index"
        if torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags:
            if real is _UNKNOWN and not _has_fixed_shape(name, args):
                raise ValueNeededError(f"what it computes depends on the values of a tensor ({name})")
            if real is not _UNKNOWN:
                return self._made_known(real)
        out = self._run(func, types, name, tensors, args, kwargs)
        if real is _UNKNOWN and func._schema.is_mutable:
            for x in _written(func, args, kwargs):
                self._forget(x)
        if real is not _UNKNOWN:
            for fake, value in zip(_leaves(out), _leaves(real), strict=True):
                if isinstance(fake, FakeTensor) and fake.shape == value.shape:
                    self._know(fake, value)
        return out

    def _run(self, func: Any, types: Any, name: str, tensors: list[Tensor], args: Any, kwargs: Any) -> Any:
        """Run an operator's meta kernel on fake tensors."""
        asked = kwargs.get("device")
        if name in _BY_TORCH or name.startswith("aten::_nested"):
            return self._by_torch(func, types, args, kwargs)
        if not tensors and asked is None and not _makes_tensor(func):
            return func(*args, **kwargs)
        if asked is not None or (not tensors and _makes_tensor(func)):
            device = torch.device("cpu" if asked is None else asked)
            device = torch.device("cpu") if device.type == "meta" else device
            if name == "aten::empty" and device.type == "cpu" and _is_filled_in_cpp(args):
                with torch._C._DisableTorchDispatch():
                    return func(*args, **kwargs)
            kwargs = {**kwargs, "device": torch.device("meta")}
            if "pin_memory" in kwargs:
                kwargs["pin_memory"] = False
        else:
            found = _common_device(name, tensors)
            if found is None:
                return self._by_torch(func, types, args, kwargs)
            device = found
        made = self._made_quickly(name, args, kwargs)
        if made is None:
            try:
                with in_kernel_invocation_manager(self):
                    made = func(*args, **kwargs)
            except NotImplementedError:
                return self._by_torch(func, types, args, kwargs)
            except RuntimeError as error:
                # What torch.library raises for a custom operator.
                if "no fake impl registered" in str(error):
                    raise _without_kernel(name) from error
                raise
        return self.wrap(made, device)

    def _made_quickly(self, name: str, args: Any, kwargs: Any) -> Any:
        """Return the outputs of a common operator, without its meta kernel; None for others."""
        makes = MAKES.get(name)
        with torch._C._DisableTorchDispatch():
            if makes is not None:
                return makes(args, kwargs)
            fits = FITS.get(name)
            made = None if fits is None else fits(args, kwargs)
            return args[0] if made is not None and made.shape == args[0].shape else None

    def _by_torch(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """Let torch's own mode run an operator."""
        self._complete()
        try:
            with _silent():
                return self.dispatch(func, types, args, kwargs)
        except (NotImplementedError, UnsupportedOperatorException) as error:
            if isinstance(func, torch._ops.OpOverload):
                raise _without_kernel(func._schema.name) from error
            raise

    def _with_indices(self, name: str, args: Any) -> Any:
        """Return the arguments of `index` with indices instead of masks whose values are known."""
        x, masks = args[0], args[1]
        indices: list[Any] = []
        for mask in masks if name == "aten::index" else [masks]:
            known = None if mask is None else value_of(mask)
            if known is None or known.dtype not in (torch.bool, torch.uint8):
                indices.append(mask)
            else:
                with torch._C._DisableTorchDispatch():
                    found = known.nonzero().unbind(1)
                indices.extend(self.fake(one) for one in found)
        return x, indices

    def _all_fake(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.fake(value)
        if isinstance(value, (tuple, list)):
            return type(value)([self._all_fake(one) for one in value])
        return value

    # Known values.

    def _know(self, fake: Tensor, value: Tensor) -> None:
        note(fake, value, self._memories.setdefault(fake.untyped_storage()._cdata, Memory()))

    def _forget(self, written: Tensor) -> None:
        """Forget the values of all tensors that share memory with one that an operator wrote."""
        memory = self._memories.pop(written.untyped_storage()._cdata, None)
        if memory is not None:
            memory.written = True

    def _made_known(self, real: Any) -> Any:
        if isinstance(real, Tensor):
            return self.fake(real)
        return type(real)(self._made_known(one) for one in real) if isinstance(real, (tuple, list)) else real

    def _run_known(self, func: Any, tensors: list[Tensor], args: Any, kwargs: Any) -> Any:
        """Run an operator on the known values of its small inputs; `_UNKNOWN` if one has none."""
        if tensors:
            for x in tensors:
                if value_of(x) is None:
                    return _UNKNOWN
        elif not _is_small(func, args):
            return _UNKNOWN
        name = func._schema.name
        if "empty" in name or "_backward" in name:
            return _UNKNOWN

        def value(x: Any) -> Any:
            if isinstance(x, Tensor):
                return value_of(x)
            if isinstance(x, torch.device) and x.type == "meta":
                return torch.device("cpu")
            if isinstance(x, torch.Generator):
                return torch.Generator(x.device).set_state(x.get_state())
            return type(x)([value(one) for one in x]) if type(x) in (tuple, list) else x

        try:
            with torch._C._DisableTorchDispatch(), torch.no_grad():
                out = func(*(value(x) for x in args), **{key: value(x) for key, x in kwargs.items()})
        except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError):
            return _UNKNOWN
        small = all(x.numel() <= KNOWN_NUMEL for x in _leaves(out) if isinstance(x, Tensor))
        return out if small else _UNKNOWN


def _without_kernel(name: str) -> NoFakeKernelError:
    return NoFakeKernelError(f"{name} has no kernel for tensors without values")


_UNKNOWN = object()
_PLAIN = (Tensor, nn.Parameter, nn.Buffer)
# torch's mode has rules of its own for these.
_BY_TORCH = {
    *("aten::is_pinned", "aten::pin_memory", "aten::_pin_memory", "aten::_to_dense", "aten::_spdiags"),
    *("aten::_sparse_coo_tensor_with_dims_and_tensors", "aten::_embedding_bag", "aten::resize_as_"),
    *("aten::index_put_", "aten::index_put", "aten::_assert_tensor_metadata"),
    *("profiler::_record_function_enter", "profiler::_record_function_enter_new", "profiler::_record_function_exit"),
}
# These take indices, masks or a source that are on another device, and return what is on the first one's.
_FIRST_DEVICE = {"aten::index", "aten::copy_", "aten::copy", "aten::embedding", "aten::slice_scatter"}


def _tensors(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """Yield the tensors among an operator's arguments and in lists among them."""
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from (one for one in value if isinstance(one, Tensor))


def _leaves(value: Any) -> list[Any]:
    return [leaf for one in value for leaf in _leaves(one)] if isinstance(value, (tuple, list)) else [value]


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            yield from (one for one in _leaves(value) if isinstance(one, Tensor))


def _makes_tensor(func: Any) -> bool:
    return any("Tensor" in str(returned.type) for returned in func._schema.returns)


def _is_filled_in_cpp(args: Any) -> bool:
    """Return whether this may be the memory that C++ writes a list of numbers to, which must be real."""
    return len(args[0]) == 1 and args[0][0] <= KNOWN_NUMEL


def _is_small(func: Any, args: Any) -> bool:
    """Return whether an operator without tensor inputs makes a tensor of few elements."""
    numel = 1
    for value in args:
        for one in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(one, (int, float)) and not isinstance(one, bool):
                numel *= max(1, abs(int(one))) if abs(one) < 2**31 else 2**31
    return numel <= KNOWN_NUMEL**2 and _makes_tensor(func)


def _has_fixed_shape(name: str, args: Any) -> bool:
    """Return whether an operator that may read values has a shape that follows from the inputs' shapes."""
    if name == "aten::index":
        return not any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    if name == "aten::_ctc_loss":
        return not isinstance(args[3], Tensor) or value_of(args[3]) is not None
    return name == "aten::repeat_interleave" and len(args) > 1 and args[1] is not None


def _common_device(name: str, tensors: list[Tensor]) -> torch.device | None:
    """Return the device of an operator's inputs; None where they differ in a way that only torch's mode knows."""
    first = tensors[0].fake_device  # type: ignore[attr-defined]
    if name in _FIRST_DEVICE:
        return first  # type: ignore[no-any-return]
    devices = {x.fake_device for x in tensors if x.dim() or x.fake_device.type != "cpu"}  # type: ignore[attr-defined]
    return (devices.pop() if devices else first) if len(devices) < 2 else None


def _dense(fake: Tensor) -> Tensor:
    return torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device="meta")


@contextmanager
def _silent() -> Iterator[None]:
    """Keep torch's mode from logging the exceptions of kernels: they are reported by whoever called."""
    import logging

    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before
