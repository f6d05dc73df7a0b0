"""Build a variant: import its builder, call it, insert the blocks of its configuration."""

import importlib
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import msgspec
import torch
from torch import nn

from selab.attention.config import ExternalConfig, Init, SiteConfig
from selab.attention.insert import insert_se
from selab.attention.se import SqueezeExcitation
from selab.attention.user_code import before_code, beside, imported
from selab.errors import InsertionError, ModelError, SelabError, SpecError
from selab.graphs.cost import blocks_of
from selab.graphs.module import DeployedNetwork, OnnxNetwork
from selab.graphs.reading import image_shape
from selab.meta import Example, first_line
from selab.meta.modes import made_on
from selab.models import composed, external
from selab.models.inputs import check_inputs, example_of, feed
from selab.models.spec import Variant
from selab.records.types import Insertion


@dataclass(frozen=True, kw_only=True)
class Built:
    """A network and the attention blocks that were inserted.

    Attributes:
        native: paths of the SE blocks that an external network has of its own.
    """

    model: nn.Module
    insertions: tuple[Insertion, ...] = ()
    native: tuple[str, ...] = ()


def build(
    variant: Variant,
    *,
    seed: int = 0,
    device: str = "cpu",
    input_chw: tuple[int, int, int] | None = None,
    init: Init | None = None,
) -> Built:
    """Build a variant, in train mode.

    A variant that is to be looked at on real tensors is built with values, where none would be allocated otherwise.

    A variant and its baseline of one seed share the initial values of all common layers, because the blocks are
    initialised after the network. The caller's random state is not changed. The SE blocks run their reference
    implementation; `selab.fuse` makes them fast.

    Args:
        variant: what to build.
        seed: of the initial weights.
        device: where the parameters are made; `meta` allocates none.
        input_chw: the input, if it is not the variant's own.
        init: of the SE blocks, if it is not that of the configuration.

    Raises:
        SpecError: the builder cannot be imported, or refuses its arguments.
        InsertionError: a block cannot be inserted at its site.
        ModelError: the network fails on this input.
    """
    if variant.on == "cpu" and device == "meta":
        device = "cpu"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with made_on(device):
            model = construct(variant)
        if isinstance(model, DeployedNetwork):
            return Built(model=model)
        if isinstance(model, OnnxNetwork):
            batch = image_shape(model.model, model.place)[1][0] or 1
            return _built_graph(model, variant, (batch, *(input_chw or variant.input_chw)))
        if not isinstance(model, nn.Module):
            raise SpecError(f"{variant.origin}: builder: {variant.builder} does not return a torch.nn.Module")
        try:
            check_inputs(model, variant.inputs)
        except ModelError as error:
            raise ModelError(f"{variant.place}: {error}") from None
        native = external.se_blocks(model)
        if variant.se is None:
            feed(model, variant.inputs)
            return Built(model=model, native=native)
        try:
            example: Example = (1, *(input_chw or variant.input_chw))
            if variant.inputs:
                example = example_of(model, variant.inputs, batch=1)
            insertions = insert_se(model, _config(variant, init), inputs=example, on=variant.on)
            _run_as_written(model)
        except (InsertionError, ModelError) as error:
            raise type(error)(f"{variant.place}: {error}") from error
        feed(model, variant.inputs)
    return Built(model=model, insertions=insertions, native=native)


def construct(variant: Variant) -> Any:
    """Call a variant's builder: its network without blocks, with weights of the current random state.

    Raises:
        SpecError: the builder cannot be imported, or refuses its arguments.
    """
    if composed.is_one(variant):
        external.check_torchvision(variant.name)
    builder = _builder(variant)
    if not callable(builder):
        raise SpecError(f"{variant.origin}: builder: {variant.builder!r} is not callable; name a function or a class")
    try:
        return builder(num_classes=variant.num_classes, **variant.arguments)
    except SelabError:
        raise
    except Exception as error:
        raise SpecError(
            f"{variant.place}: {variant.builder} refuses its arguments {dict(variant.arguments)}: {first_line(error)}"
        ) from error


def _built_graph(network: OnnxNetwork, variant: Variant, image: tuple[int, ...]) -> Built:
    """Return an ONNX network with the SE blocks that it has."""
    if variant.se is not None:
        raise InsertionError(f"{variant.place}: an ONNX network takes no blocks; leave --se and --insert out")
    if variant.inputs:
        raise ModelError(f"{variant.place}: an ONNX network takes one image; give its size as --input CxHxW")
    if 0 in image:
        size = "x".join(str(length or "?") for length in image[1:])
        raise ModelError(f"{variant.place}: the size of its input is free ({size}); give it as --input CxHxW")
    return Built(model=network, insertions=blocks_of(network.model, image, network.place))


def _config(variant: Variant, init: Init | None) -> SiteConfig:
    """Return the configuration of a variant's blocks; a block's file may be in the folder of the family's TOML."""
    config = variant.se
    assert config is not None
    if isinstance(config, ExternalConfig) and variant.file:
        config = msgspec.structs.replace(config, target=beside(config.target, Path(variant.file).resolve().parent))
    return config if init is None else msgspec.structs.replace(config, init=init)


def _run_as_written(model: nn.Module) -> None:
    """Let SE blocks run operation by operation, as other libraries do; `fuse` changes that on request."""
    for module in model.modules():
        if isinstance(module, SqueezeExcitation):
            module.impl = "reference"


def _builder(variant: Variant):  # type: ignore[no-untyped-def]
    if variant.builder in external.BUILDERS:
        return external.BUILDERS[variant.builder]
    module_name, _, attribute = variant.builder.partition(":")
    beside_it = Path(variant.file).resolve().parent / f"{module_name}.py" if variant.file else None
    if beside_it is not None and beside_it.is_file():
        # Loaded by its path: two folders may have modules of one name.
        try:
            with imported(f"{beside_it}:{attribute}") as found:
                pass
        except SpecError as error:
            raise SpecError(f"{variant.origin}: builder: {variant.builder!r} cannot be imported: {error}") from error
        return _checked_builder(found, variant)
    root = module_name.partition(".")[0]
    folder = Path(variant.file).resolve().parent if variant.file else None
    local = folder is not None and (folder / root).is_dir()
    if root in sys.stdlib_module_names and not local:
        raise SpecError(
            f"{variant.origin}: builder: {variant.builder!r} is of Python's standard library; "
            "name a class or function that returns a torch.nn.Module"
        )
    if variant.file and root != "selab":
        before_code(module_name)
    with _import_beside(folder if local else None):
        try:
            found = getattr(importlib.import_module(module_name), attribute)
        except (ImportError, AttributeError) as error:
            raise SpecError(
                f"{variant.origin}: builder: {variant.builder!r} cannot be imported: {first_line(error)}; "
                "it is looked up beside the TOML and among the installed packages"
            ) from error
        except Exception as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise SpecError(f"{variant.origin}: builder: importing {module_name!r} fails: {reason}") from error
    return _checked_builder(found, variant)


def _checked_builder(found: Any, variant: Variant) -> Any:
    """Return a builder; refuse what cannot return a network, before it is called with a TOML's arguments.

    Raises:
        SpecError: a class of something else, a function that says it returns something else, one of torch's own
            functions, one written in C, or no callable.
    """
    kind = ""
    if isinstance(found, type):
        kind = "" if issubclass(found, nn.Module) else "a class of something else"
    elif not callable(found):
        kind = f"not callable, but a value of type {type(found).__name__}"
    elif inspect.isbuiltin(found) or str(getattr(found, "__module__", "")).partition(".")[0] == "torch":
        kind = "a function that returns no network"
    else:
        returned = _returned_type(found)
        if returned is not None and not issubclass(returned, nn.Module):
            kind = f"a function that returns {returned.__name__}"
    if kind:
        raise SpecError(
            f"{variant.origin}: builder: {variant.builder!r} is {kind}; name a class or function that returns a "
            "torch.nn.Module"
        )
    return found


def _returned_type(function: object) -> type | None:
    """Return the class that a function is annotated to return; None if it says nothing that can be resolved."""
    try:
        returned = get_type_hints(function).get("return")
    except Exception:
        # A name that exists for type checkers only.
        return None
    return returned if isinstance(returned, type) and returned is not object else None


@contextmanager
def _import_beside(folder: Path | None) -> Iterator[None]:
    """Let a family's TOML name a package of its folder."""
    if folder is None:
        yield
        return
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
