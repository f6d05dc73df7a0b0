"""External networks: from torchvision, from timm, and from a user's own Python.

A name becomes a variant whose builder is a function of this file. Libraries are imported on demand. Nothing is
downloaded: weights are random. A user's code runs when the network is built, not before, and its prints go to standard
error.
"""

import hashlib
import importlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import msgspec

from selab.attention.config import ExternalConfig
from selab.attention.user_code import beside, explained, imported
from selab.errors import SpecError, UnknownNameError, nearest
from selab.models.spec import DEPLOYED_FAMILY, ONNX_FAMILY, Variant

if TYPE_CHECKING:
    from torch import nn


_INPUT_CHW = (3, 224, 224)
_NUM_CLASSES = 1000

# The width that inception_v3 was made for; its last pooling needs 75 at least.
_TORCHVISION_INPUTS = {"inception_v3": (3, 299, 299)}
# These return a tuple in train mode if they keep their auxiliary classifiers, and warn where nobody chose how to start.
_AUXILIARY = {"aux_logits": False, "init_weights": True}
_TORCHVISION_ARGUMENTS: dict[str, dict[str, bool]] = {"googlenet": _AUXILIARY, "inception_v3": _AUXILIARY}

# Networks that callables have returned, while they live.
_returned: "WeakSet[nn.Module]" = WeakSet()

# Class name → the modules that define it. A class of the same name from elsewhere may compute anything.
_TIMM = ("timm.layers.", "timm.models.")
_SE_CLASSES: dict[str, tuple[str, ...]] = {
    "SEModule": (*_TIMM, "pretrainedmodels.models.senet"),
    "SqueezeExcite": _TIMM,
    "SqueezeExciteCl": _TIMM,
    "EffectiveSEModule": _TIMM,
    "EcaModule": _TIMM,
    "CecaModule": _TIMM,
    "GatherExcite": _TIMM,
    "GlobalContext": _TIMM,
    "CbamModule": _TIMM,
    "LightCbamModule": _TIMM,
    "CoordAttn": _TIMM,
    "SimpleCoordAttn": _TIMM,
    "EseModule": ("timm.models.hgnet",),
    "SqueezeExcitation": ("torchvision.ops.misc",),
    "SE": ("pycls.models.blocks",),
}


_BUILDER_PREFIX = "selab.foreign:"


def find(name: str, *, option: str = "--arch") -> Variant | None:
    """Return the variant of a name that is not of the catalog.

    `torchvision:NAME`, `timm:NAME`, `path/to/file.py:callable`, `package.module:callable`, `path/to/network.onnx`, or
    `path/to/network.onnx:no_se` for the same network without its SE blocks.

    Args:
        name: as the user gave it; it becomes the variant's name.
        option: where it was given, for messages.

    Returns:
        None if the name has none of these forms.

    Raises:
        UnknownNameError: the library has no such network; the message lists the nearest ones.
        SpecError: the library is not installed or fails on import; there is no such file, or no name in it was given.
    """
    library, _, model = name.partition(":")
    if library in ("torchvision", "timm"):
        find_in = _torchvision_variant if library == "torchvision" else _timm_variant
        return find_in(model, name, f"{option} {name}")
    graph = re.fullmatch(r"(.+\.onnx)(:no_se)?", name)
    if graph is not None:
        return _onnx_variant(Path(graph[1]), name, bare=graph[2] is not None)
    file = re.fullmatch(r"(.+\.py)(?::([\w.]*))?", name)
    if file is not None:
        path, attribute = file[1], file[2]
        if not attribute:
            raise SpecError(f"{option} {name}: name the function, class or network in it: {path}:NAME")
        if not Path(path).is_file():
            there = f"{path} is not a regular file" if Path(path).exists() else f"there is no file {path}"
            raise SpecError(f"{option} {name}: {there}")
        return _variant(
            name,
            family="file",
            title=f"{attribute} of {path}",
            source=path,
            builder="from_file",
            arguments={"path": path, "attribute": attribute},
        )
    if re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*:[\w.]+", name):
        module = name.partition(":")[0]
        return _variant(
            name,
            family="module",
            title=name,
            source=f"Python module {module}",
            builder="from_module",
            arguments={"target": name},
        )
    return None


def runs_code_of(variant: Variant) -> str | None:
    """Return the user's file or module whose code runs when this variant is built; None for selab's and a library's."""
    if variant.builder in BUILDERS:
        own = BUILDERS[variant.builder]
        if own is from_file:
            return str(variant.arguments.get("path", variant.file))
        return str(variant.arguments.get("target", variant.file)).partition(":")[0] if own is from_module else None
    module = variant.builder.partition(":")[0]
    return None if module.startswith("selab.") else module


def places_of_code(variant: Variant) -> tuple[str, ...]:
    """Return the files and modules of a user whose code runs when this variant is built, as messages name them."""
    builder = runs_code_of(variant)
    folder = Path(variant.file).resolve().parent if variant.file else Path()
    if builder is not None and variant.file and (folder / f"{builder}.py").is_file():
        builder = str(folder / f"{builder}.py")
    block = None
    if isinstance(variant.se, ExternalConfig):
        block = (beside(variant.se.target, folder) if variant.file else variant.se.target).rpartition(":")[0]
    return tuple(dict.fromkeys(place for place in (builder, block) if place))


def se_blocks(model: "nn.Module") -> tuple[str, ...]:
    """Return the paths of the SE blocks (and related blocks) that a library's network has of its own.

    A block is recognised by its class's name and module, so no library needs to be installed. A block inside another
    block belongs to that block.
    """
    # Importing it imports torch.
    from selab.attention.gated_site import named_sites

    found: list[str] = []
    for path, module in named_sites(model):
        if path and not (found and path.startswith(f"{found[-1]}.")) and _is_se_class(type(module)):
            found.append(path)
    return tuple(found)


def _is_se_class(kind: type) -> bool:
    return any(one.__module__.startswith(_SE_CLASSES.get(one.__name__, ("\0",))) for one in kind.__mro__)


# ----------------------------------------------------------------------------------------------------------- libraries
def check_torchvision(where: str) -> None:
    """Import torchvision, for detectors and segmenters.

    Raises:
        SpecError: it is not installed, or fails on import.
    """
    _library("torchvision", where, extra="detection")


def torchvision_model(*, num_classes: int, name: str) -> "nn.Module":
    """Return a classification network of torchvision with random weights."""
    models = _library("torchvision", f"torchvision:{name}").models
    arguments = _TORCHVISION_ARGUMENTS.get(name, {})
    return _make(lambda: models.get_model(name, weights=None, num_classes=num_classes, **arguments))


def timm_model(*, num_classes: int, name: str) -> "nn.Module":
    """Return a network of timm with random weights."""
    timm = _library("timm", f"timm:{name}")
    return _make(lambda: timm.create_model(name, pretrained=False, num_classes=num_classes))


def _torchvision_variant(model: str, name: str, where: str) -> Variant:
    library = _library("torchvision", where)
    # Detection, segmentation and video models have other inputs, or outputs other than logits.
    known = library.models.list_models(module=library.models)
    if model not in known:
        if model in library.models.list_models():
            raise UnknownNameError(
                f"{where}: is no classification network; detectors and segmenters have names of their own: "
                "faster_rcnn_NETWORK_fpn, retinanet_NETWORK_fpn, ssdlite_NETWORK, deeplabv3_NETWORK; or give "
                "path/to/file.py:NAME"
            )
        raise UnknownNameError(f"{where}: torchvision has no such classification network{nearest(model, known)}")
    return _variant(
        name,
        family="torchvision",
        title=f"{model} of torchvision",
        source=f"torchvision {library.__version__}",
        builder="torchvision_model",
        arguments={"name": model},
        input_chw=_TORCHVISION_INPUTS.get(model, _INPUT_CHW),
    )


def _timm_variant(model: str, name: str, where: str) -> Variant:
    library = _library("timm", where)
    architecture, _, tag = model.partition(".")
    known = library.list_models()
    if architecture not in known:
        raise UnknownNameError(f"{where}: timm has no such network{nearest(architecture, known)}")
    if tag and model not in (tags := library.list_pretrained(f"{architecture}.*")):
        raise UnknownNameError(f"{where}: timm knows no weights {tag!r} of {architecture}{nearest(model, tags)}")
    config = library.get_pretrained_cfg(model)
    return _variant(
        name,
        family="timm",
        title=f"{model} of timm",
        source=f"timm {library.__version__}",
        builder="timm_model",
        arguments={"name": model},
        input_chw=tuple(config.input_size),
        num_classes=config.num_classes,
    )


def from_onnx(*, num_classes: int, path: str, sha256: str, bare: bool) -> "nn.Module":
    """Return the network of an ONNX file.

    Args:
        num_classes: has no meaning here.
        path: of the file.
        sha256: of its content when it was named.
        bare: whether to leave its SE blocks out.

    Raises:
        SpecError: as `selab.graphs.reading.read`, or the file has changed.
        InsertionError: the blocks are to be left out, and there are none.
    """
    from selab.graphs.module import OnnxNetwork
    from selab.graphs.reading import read

    del num_classes
    if _digest(Path(path)) != sha256:
        raise SpecError(f"{path}: has changed since this command began; start it again")
    network = OnnxNetwork(read(Path(path)), path)
    return network.without_blocks() if bare else network


def _onnx_variant(path: Path, name: str, *, bare: bool) -> Variant:
    from selab.graphs.blocks import find_blocks, words_of
    from selab.graphs.graph import Graph
    from selab.graphs.reading import image_shape, read

    model = read(path)
    _, (_, *image) = image_shape(model, str(path))
    blocks = find_blocks(Graph(model))
    channels, height, width = (size or 0 for size in image)
    variant = _variant(
        name,
        family=ONNX_FAMILY,
        title=f"{path.name} without its SE blocks" if bare else f"{path.name}: {words_of(blocks)}",
        source=f"ONNX, by {model.producer_name or 'an unnamed exporter'}",
        builder="from_onnx",
        arguments={"path": str(path), "sha256": _digest(path), "bare": bare},
        input_chw=(channels, height, width),
    )
    own_baseline = f"{path}:no_se" if blocks and not bare else None
    return msgspec.structs.replace(variant, baseline=own_baseline)


def from_exported(*, num_classes: int, path: str, runtime: str) -> "nn.Module":
    """Return a network that was written for another runtime, by this project.

    Args:
        num_classes: has no meaning here.
        path: of the file.
        runtime: that it was written for.
    """
    from selab.graphs.module import DeployedNetwork

    del num_classes
    return DeployedNetwork(Path(path), runtime)


def exported_variant(path: Path, runtime: str, *, input_chw: tuple[int, int, int]) -> Variant:
    """Return the variant of a file that was just written for another runtime."""
    return _variant(
        str(path),
        family=DEPLOYED_FAMILY,
        title=path.name,
        source=runtime,
        builder="from_exported",
        arguments={"path": str(path), "runtime": runtime},
        input_chw=input_chw,
    )


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}") from None


def _library(name: str, where: str, *, extra: str = "") -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            raise SpecError(f"{where}: {name} is not installed; pip install 'selab[{extra or name}]'") from None
        raise SpecError(f"{where}: importing {name} fails: {explained(error)}") from error
    except Exception as error:
        raise SpecError(
            f"{where}: importing {name} fails: {explained(error)}; torchvision needs the torch that it was built "
            "with: install both from the same place"
        ) from error


def _variant(
    name: str,
    *,
    family: str,
    title: str,
    source: str,
    builder: str,
    arguments: dict[str, bool | int | float | str],
    input_chw: tuple[int, int, int] = _INPUT_CHW,
    num_classes: int = _NUM_CLASSES,
) -> Variant:
    return Variant(
        name=name,
        family=family,
        title=title,
        source=source,
        builder=f"{_BUILDER_PREFIX}{builder}",
        arguments=arguments,
        input_chw=input_chw,
        num_classes=num_classes,
        baseline=None,
        se=None,
        published=(),
        note="",
        origin=source,
        file="",
    )


# ----------------------------------------------------------------------------------------------------- a user's Python
def from_file(*, num_classes: int, path: str, attribute: str) -> "nn.Module":
    """Return the network that a callable (or an `nn.Module`) of a Python file gives.

    Args:
        num_classes: passed on if the callable has an argument of this name.
        path: of the file; it can import modules of its folder.
        attribute: the callable's name; dots lead into classes.

    Raises:
        SpecError: the file or the callable fails (the message has the error, file and line), needs arguments, or does
            not return an nn.Module.
    """
    return from_module(num_classes=num_classes, target=f"{path}:{attribute}")


def from_module(*, num_classes: int, target: str) -> "nn.Module":
    """Return the network that `package.module:callable` gives.

    Args:
        num_classes: passed on if the callable has an argument of this name.
        target: the module and the callable's name; dots lead into classes. The module is looked up in the current
            folder and among the installed packages.

    Raises:
        SpecError: as `from_file`, or there is no such module.
    """
    with imported(target) as found:
        return _network(found, num_classes, where=target)


# A variant's hash covers the name of its builder, and records keep that hash. So these names stay as they were in the
# first records, whatever this module is called.
BUILDERS: dict[str, Callable[..., "nn.Module"]] = {
    f"{_BUILDER_PREFIX}{builder.__name__}": builder
    for builder in (torchvision_model, timm_model, from_file, from_module, from_onnx, from_exported)
}


def _network(target: Any, num_classes: int, *, where: str) -> "nn.Module":
    import torch
    from torch import nn

    from selab.meta.real import real_copy

    if isinstance(target, nn.Module):
        return real_copy(target).to(torch.get_default_device())
    if not callable(target):
        raise SpecError(
            f"{where}: is {_kind(target)}; name a function or class that returns an nn.Module, or an nn.Module"
        )
    arguments = _arguments(target, num_classes, where)
    made = _make(lambda: target(**arguments))
    if not isinstance(made, nn.Module):
        raise SpecError(f"{where}: returns {_kind(made)}, not an nn.Module")
    if made in _returned:
        # Blocks inserted into one would be in the other too, and a baseline would be its own variant.
        raise SpecError(f"{where}: returns the same network again; make a new one in each call")
    _returned.add(made)
    return made


def _kind(value: object) -> str:
    return "None" if value is None else f"a value of type {type(value).__name__}"


def _arguments(target: Callable[..., object], num_classes: int, where: str) -> dict[str, int]:
    """Return `num_classes` if the callable has a parameter of this name; refuse other required parameters."""
    try:
        parameters = inspect.signature(target).parameters.values()
    except ValueError:
        # A callable written in C, without a signature; calling it shows what it needs.
        return {}
    named = {one.name for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
    needed = [
        one.name
        for one in parameters
        if one.default is one.empty
        and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
        and not (one.name == "num_classes" and one.name in named)
    ]
    if needed:
        raise SpecError(
            f"{where}: needs {', '.join(needed)}; write a function without arguments, or a family.toml whose variant "
            "has them under `arguments`"
        )
    return {"num_classes": num_classes} if "num_classes" in named else {}


def _make(constructor: "Callable[[], nn.Module]") -> "nn.Module":
    """Call a constructor on the current device.

    A constructor that reads values (torchvision's RegNets call `.item()`) cannot run on the meta device. It runs on the
    CPU, and the network is moved.
    """
    import torch
    from torch import nn

    device = torch.get_default_device()
    if device.type != "meta":
        return constructor()
    try:
        return constructor()
    except Exception:
        with torch.device("cpu"):
            made = constructor()
        return made.to(device) if isinstance(made, nn.Module) else made
