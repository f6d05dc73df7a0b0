"""Run a network on fake tensors: the shapes at its modules, and how often each module runs, without arithmetic."""

import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map_only

from selab.errors import ModelError, one_line
from selab.meta.fake import VALUE_NEEDED, FakeMode, ValueNeededError
from selab.meta.real import OwnMemory
from selab.meta.state import restored
from selab.meta.twin import Copier

On = Literal["fake", "cpu"]
"""Whether a pass runs on fake tensors, or its kernels on real ones."""
ON_REAL_TENSORS = 'run it on real tensors: on="cpu", --on cpu'
"""The next step where the values of tensors decide what a network computes."""
Example = Tensor | Sequence[Any] | Mapping[str, Any]
"""An example input: a shape (N, C, H, W), a tensor, positional arguments in a tuple or list, or keyword arguments in a
mapping. Arguments may be nested lists, tuples and dicts of tensors and other values."""


def meta_twin(model: nn.Module) -> nn.Module:
    """Return a copy whose tensors are on the meta device: same structure, hooks and flags, no memory, no values.

    Shared tensors stay shared. Neither making the copy nor running it changes the model. `FakePass` is the better
    choice wherever the copy is only run: its tensors report their real devices.
    """

    def on_meta(tensor: Tensor) -> Tensor:
        twin = torch.empty_like(tensor, device="meta", requires_grad=False)
        return nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin

    made: nn.Module = Copier(on_meta)(model)
    return made


def as_written(model: nn.Module) -> nn.Module:
    """Return the module that `torch.compile` wrapped; any other module as it is."""
    written = getattr(model, "_orig_mod", model)
    return written if isinstance(written, nn.Module) else model


def is_shape(example: Example) -> bool:
    """Return whether an example is the shape of an input."""
    return (
        not isinstance(example, (Tensor, Mapping))
        and len(example) > 0
        and all(isinstance(size, int) and not isinstance(size, bool) for size in example)
    )


def are_shapes(example: Example) -> bool:
    """Return whether an example is a tuple or list of the shapes of several inputs."""
    return (
        isinstance(example, (tuple, list))
        and len(example) > 0
        and all(isinstance(one, (tuple, list)) and len(one) > 1 and is_shape(one) for one in example)
    )


def example_arguments(
    model: nn.Module, example: Example, *, device: torch.device | str | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and keyword arguments of an example input.

    Args:
        model: its first floating-point parameter gives dtype and device of a tensor of zeros if the example is a shape.
        example: a shape such as (N, C, H, W); a tensor; positional arguments in a tuple or list; keyword arguments in a
            mapping.
        device: of all tensors instead; `meta` for tensors without memory.

    Raises:
        ModelError: no tensor has this shape.
    """
    if isinstance(example, Tensor):
        return (_moved(example, device),), {}
    if isinstance(example, Mapping):
        return (), {key: _moved(value, device) for key, value in example.items()}
    if is_shape(example):
        like = next((p for p in model.parameters() if p.is_floating_point()), None)
        dtype = torch.get_default_dtype() if like is None else like.dtype
        place = device or (like.device if like is not None else torch.get_default_device())
        try:
            return (torch.zeros(tuple(example), dtype=dtype, device=place),), {}
        except (RuntimeError, TypeError) as error:
            reason = "too large" if "verflow" in str(error) else first_line(error)
            raise ModelError(
                f"no input of shape {tuple(example)}: {reason}; pass the input that the network expects"
            ) from error
    if are_shapes(example):
        return tuple(example_arguments(model, one, device=device)[0][0] for one in example), {}
    return tuple(_moved(value, device) for value in example), {}


def _moved(value: Any, device: torch.device | str | None) -> Any:
    if device is None:
        return value
    if torch.device(device).type == "meta":
        return tree_map_only(Tensor, lambda x: torch.empty_like(x, device="meta", requires_grad=False), value)
    return tree_map_only(Tensor, lambda x: x.to(device), value)


def shapes_of(values: object) -> str:
    """Return the shapes of all tensors among arguments, for messages."""
    return ", ".join(str(tuple(x.shape)) for x in tree_leaves(values) if isinstance(x, Tensor))


def described(values: object) -> str:
    """Return what arguments are, for messages: `an input of shape (1, 3, 8, 8)`."""
    shapes = shapes_of(values)
    return f"an input of shape {shapes}" if shapes else "an example without tensors"


_ABOUT_INPUT = re.compile(
    r"shape|\bsize|dimension|\bdim\b|channel|dtype|\btype|argument|out of range|must match|expected|\binput",
    re.IGNORECASE,
)


def blames_input(error: BaseException) -> bool:
    """Return whether a forward pass may have failed because of the shapes, dtypes or number of its inputs."""
    kinds = (RuntimeError, ValueError, TypeError, IndexError, AssertionError)
    if not isinstance(error, kinds) or isinstance(error, (NotImplementedError, *VALUE_NEEDED)):
        return False
    return _ABOUT_INPUT.search(str(error)) is not None


def reason_of(error: BaseException) -> str:
    """Return an exception's first line, after the name of its type unless that is a general one."""
    line = first_line(error)
    if isinstance(error, VALUE_NEEDED) and not isinstance(error, ValueNeededError):
        line = f"what it computes depends on the values of a tensor ({error.func})" if line else line
    general = type(error) in (RuntimeError, ValueError, TypeError) or isinstance(error, ValueNeededError)
    named = general or line == type(error).__name__
    return line if named else f"{type(error).__name__}: {line}"


class FakePass:
    """A copy of a network and of its example input on fake tensors, which report real devices, dtypes and strides.

    Nothing that the copy does changes the network, and no kernel runs.

    Attributes:
        model: the copy.
        args: the positional arguments.
        kwargs: the keyword arguments.
        mode: that runs the operators; None where real kernels run.
    """

    def __init__(self, model: nn.Module, example: Example) -> None:
        """Copy a network on any device; the meta device is taken for the CPU.

        Raises:
            ModelError: no tensor has the example's shape.
        """
        _refuse_lazy(model)
        self.mode: FakeMode | None = FakeMode()
        self._network = model
        self.model: nn.Module = Copier(self.mode.fake)(model)
        args, kwargs = example_arguments(
            model, example, device="meta" if is_shape(example) or are_shapes(example) else None
        )
        device = next((p.device for p in model.parameters() if p.is_floating_point()), torch.device("cpu"))

        fake_of = self.mode.fake

        def fake(x: Tensor) -> Tensor:
            made = fake_of(x, device=device if x.is_meta else None)
            return made.requires_grad_(False) if made.is_leaf else made

        self.args, self.kwargs = tree_map_only(Tensor, fake, (args, kwargs))

    def __call__(self) -> Any:
        """Run the copy on its example; within `running`."""
        return self.model(*self.args, **self.kwargs)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run operators on fake tensors; restore all global states at the end."""
        fast_path = torch.backends.mha.get_fastpath_enabled()
        with _eager(), restored(self._network), _without_mkldnn(), self.mode or nullcontext():
            # The fused paths of transformers are one operator, whose parts could not be told apart.
            torch.backends.mha.set_fastpath_enabled(False)
            if self.mode is not None:
                self.mode.closed = False
            try:
                yield
            finally:
                if self.mode is not None:
                    self.mode.closed = True
                torch.backends.mha.set_fastpath_enabled(fast_path)


def _refuse_lazy(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if any(is_lazy(x) for x in (*module._parameters.values(), *module._buffers.values())):
            raise ModelError(
                f"{type(model).__name__}: {path or 'it'} ({type(module).__name__}) has parameters without a shape; "
                "run the network once on an example, which gives them one"
            )


class RealPass(FakePass):
    """The same on real tensors on the CPU, for networks in which values decide what is computed: the kernels run."""

    def __init__(self, model: nn.Module, example: Example) -> None:
        """Copy a network, with its memory, to the CPU.

        Raises:
            ModelError: no tensor has the example's shape, or the network is on the meta device.
        """
        _refuse_lazy(model)
        if any(x.is_meta for x in (*model.parameters(), *model.buffers())):
            raise ModelError(f"{type(model).__name__}: is on the meta device, where tensors have no values to run on")
        self.mode = None
        self._network = model
        self.model = Copier(OwnMemory("cpu"))(model)
        args, kwargs = example_arguments(model, example, device="cpu")
        self.args, self.kwargs = tree_map_only(Tensor, lambda x: x.detach().clone(), (args, kwargs))


def make_pass(model: nn.Module, example: Example, on: On = "fake") -> FakePass:
    """Return a pass on fake tensors or, on `cpu`, on real ones.

    Raises:
        ModelError: as `FakePass` and `RealPass`.
    """
    return RealPass(model, example) if on == "cpu" else FakePass(model, example)


def failed_pass(made: FakePass, model: nn.Module, error: BaseException) -> ModelError:
    """Return the error of a network whose forward failed in a pass: what failed, on what, and the next step."""
    step = "; give the shape that the network expects (input_nchw, --input)" if blames_input(error) else ""
    if isinstance(error, TypeError) and "missing" in str(error):
        step = "; give every input that the network takes (inputs=, --input)"
    if isinstance(error, TypeError) and "unexpected keyword" in str(error):
        step = "; name the inputs as the network's forward does (inputs=)"
    if isinstance(error, VALUE_NEEDED):
        step = f"; {ON_REAL_TENSORS}"
    if not shapes_of((made.args, made.kwargs)):
        step = "; give a shape (N, C, H, W) as input_nchw=, or tensors as inputs="
    what = described((made.args, made.kwargs))
    return ModelError(f"{type(model).__name__}: forward fails with {what}: {reason_of(error)}{step}")


@contextmanager
def _without_mkldnn() -> Iterator[None]:
    """Let recurrent layers run as products instead of as one operator of a library."""
    mkldnn: Any = torch.backends.mkldnn
    before = mkldnn.set_flags(False)
    try:
        yield
    finally:
        mkldnn.set_flags(*before)


@contextmanager
def _eager() -> Iterator[None]:
    """Let compiled modules run eagerly; a model can hold one only if torch._dynamo is loaded."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        # torch 2.13 warns that hooks on all modules see torch.compile's wrapper twice, which is harmless here.
        warnings.filterwarnings("ignore", message=".*when there are global hooks on modules", category=UserWarning)
        yield


def set_mode(model: nn.Module, *, training: bool) -> None:
    """Put a model into train or eval mode; a network of torch.export keeps the one that it was exported in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.train(training)
    except NotImplementedError:
        for module, mode in modes:
            module.training = mode


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode; restore the mode of every module at the end."""
    modes = [(module, module.training) for module in model.modules()]
    set_mode(model, training=False)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@dataclass(kw_only=True)
class Passage:
    """The calls of a module in one forward pass, and the shapes of its first input and of its output.

    The shape of a value that is not a tensor is None; its kind is the name of its type.

    Attributes:
        calls: how often the module ran.
        input_shape: of the first positional argument of the last call.
        output_shape: of the last call.
        input_kind: type of that argument.
        output_kind: type of the output.
        input_dtype: of that argument, None if it is not a tensor.
        output_dtype: of the output, None if it is not a tensor.
        source: the path of the module that returned that argument as it is, if it is one of those that were asked for;
            of several, the innermost.
        returns_input: whether the last call returned that argument as it was.
    """

    calls: int = 0
    input_shape: tuple[int, ...] | None = None
    output_shape: tuple[int, ...] | None = None
    input_kind: str = "not given by position"
    output_kind: str = ""
    input_dtype: torch.dtype | None = None
    output_dtype: torch.dtype | None = None
    source: str = ""
    returns_input: bool = False


def passages(
    model: nn.Module,
    paths: Iterable[str],
    example: Example,
    *,
    on: On = "fake",
    prepare: Callable[[nn.Module], object] | None = None,
) -> Mapping[str, Passage]:
    """Run the model once on fake tensors; return the shapes and calls of the modules at these paths.

    Args:
        model: on any device; not changed.
        paths: module paths, as in `named_modules`.
        example: an example input: a shape such as (N, C, H, W), a tensor, positional arguments in a tuple or list, or
            keyword arguments in a mapping.
        on: `cpu` to run the kernels on a copy with real tensors.
        prepare: called with the copy before it runs.

    Raises:
        ModelError: the forward pass fails with this input.
    """
    fakes = make_pass(model, example, on)
    if prepare is not None:
        prepare(fakes.model)
    seen = {path: Passage() for path in paths}
    # While a tensor lives, no other has its id; one that was changed in place is another value.
    returned: dict[tuple[int, int], tuple[str, Tensor]] = {}
    given: dict[int, tuple[int, int]] = {}
    for path, passage in seen.items():
        module = fakes.model.get_submodule(path)
        module.register_forward_pre_hook(_finder(passage, returned, given))
        module.register_forward_hook(_recorder(path, passage, returned, given))
    try:
        with evaluating(fakes.model), torch.no_grad(), fakes.running():
            fakes()
    except Exception as error:
        raise failed_pass(fakes, model, error) from error
    return seen


def _kind(value: object) -> str:
    return "Tensor" if isinstance(value, Tensor) else type(value).__name__


def _identity(x: Tensor) -> tuple[int, int]:
    """Return what tells the value of a tensor from others; in-place changes within inference mode are not seen."""
    return id(x), 0 if x.is_inference() else x._version


def _finder(  # type: ignore[no-untyped-def]
    passage: Passage, returned: dict[tuple[int, int], tuple[str, Tensor]], given: dict[int, tuple[int, int]]
):
    # Before the module runs, which may change its input in place.
    def find(_module: nn.Module, args: tuple[object, ...]) -> None:
        first = args[0] if args else None
        passage.source, passage.returns_input = "", False
        if isinstance(first, Tensor):
            before = _identity(first)
            found = returned.get(before)
            passage.source = found[0] if found else ""
            given[id(passage)] = before

    return find


def _recorder(  # type: ignore[no-untyped-def]
    path: str,
    passage: Passage,
    returned: dict[tuple[int, int], tuple[str, Tensor]],
    given: dict[int, tuple[int, int]],
):
    def record(_module: nn.Module, args: tuple[object, ...], output: object) -> None:
        passage.calls += 1
        first = args[0] if args else None
        passage.input_shape = tuple(first.shape) if isinstance(first, Tensor) else None
        passage.output_shape = tuple(output.shape) if isinstance(output, Tensor) else None
        passage.input_kind = _kind(first) if args else "not given by position"
        passage.output_kind = _kind(output)
        passage.input_dtype = first.dtype if isinstance(first, Tensor) else None
        passage.output_dtype = output.dtype if isinstance(output, Tensor) else None
        if isinstance(output, Tensor):
            passage.returns_input = output is first and given.get(id(passage)) == _identity(output)
            returned.setdefault(_identity(output), (path, output))

    return record


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or the name of its type if it has none."""
    return one_line(error)
