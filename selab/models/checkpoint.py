"""Convert trained weights of other libraries: read the file safely, rename and check every tensor, write the result.

The input is untrusted: a safetensors file, or a pickle read by a loader that builds tensors and dictionaries only. The
output is a safetensors file with exactly the tensors of one variant, and metadata about their origin.
"""

import hashlib
import io
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import msgspec
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from selab._version import __version__
from selab.errors import SelabError
from selab.models import catalog
from selab.models.build import build
from selab.models.key_maps import Port, port_for, renamed
from selab.models.spec import Variant
from selab.records.store import write_atomically

# Where training scripts put the state dict; published accuracies are of the averaged weights.
_UNDER = ("state_dict_ema", "state_dict", "model")
_COUNTER = "num_batches_tracked"


class WeightsError(SelabError):
    """A file of weights cannot be read or written, or does not fit the network; the message names the tensors."""


@dataclass(frozen=True, kw_only=True)
class Renamed:
    """One tensor of a conversion.

    Attributes:
        theirs: its key in the input.
        ours: its key in the output.
        their_shape: its shape in the input.
        shape: its shape in the output.
        folded: whether it is a convolution's bias, subtracted from the BN's running mean and not in the output.
    """

    theirs: str
    ours: str
    their_shape: tuple[int, ...]
    shape: tuple[int, ...]
    folded: bool = False


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """The result of a conversion, or of a dry run.

    Attributes:
        port: the declared pair of networks.
        renamed: every tensor of the input, in its order.
        filled: counters of seen batches that the input lacks; they start at zero.
        metadata: of the output file.
    """

    port: Port
    renamed: tuple[Renamed, ...]
    filled: tuple[str, ...]
    metadata: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class _Input:
    """The tensors of a file, and where in the file they were."""

    state: dict[str, Tensor]
    under: str
    sha256: str


def convert(
    source_path: Path, target_path: Path | None, *, source: str, arch: str, replace: bool = False
) -> Conversion:
    """Convert the weights of an external network into those of the variant that computes the same function.

    Args:
        source_path: `.safetensors`, `.pt` or `.pth`.
        target_path: the `.safetensors` file to write; None for a dry run.
        source: `timm`, `torchvision` or `cadene`.
        arch: selab's variant.
        replace: whether an existing file may be replaced.

    Raises:
        UnknownNameError: no such source or variant, or no network of the source is known to be equal to it.
        WeightsError: the input cannot be read, is refused, or does not fit that network; the output exists or cannot be
            written. Then nothing is written.
    """
    variant = catalog.find(arch)
    port = port_for(source, arch)
    if target_path is not None:
        _check_target(target_path, source_path, replace=replace)
    found = _read(source_path)
    expected = build(variant, device="meta").model.state_dict()
    steps = _steps(found.state, port, variant, expected, where=str(source_path))
    converted = _converted(found.state, steps, expected, where=str(source_path))
    metadata = {
        "arch": variant.name,
        "facts_hash": variant.facts_hash,
        "input_sha256": found.sha256,
        "model": port.model,
        "selab": __version__,
        "source": source,
    } | ({"under": found.under} if found.under else {})
    if target_path is not None:
        write_atomically(target_path, safetensors.torch.save(converted, metadata))
    given = {step.ours for step in steps}
    filled = tuple(key for key in expected if key not in given)
    return Conversion(port=port, renamed=steps, filled=filled, metadata=metadata)


def load(
    model: nn.Module,
    weights: Path | Mapping[str, Tensor],
    *,
    variant: Variant | None = None,
    fitted: Variant | None = None,
) -> None:
    """Load weights into a network, all or none; only counters of seen batches may be missing.

    Args:
        model: keeps its device and precision.
        weights: a file, or a state dict.
        variant: what the network was built from. A file of another configuration is refused, because its tensors may
            fit and mean something else. A file trained by selab may be of images of another height and width.
        fitted: the variant with the data's classes and image size, if the network was built from that; a file of
            either is accepted.

    Raises:
        WeightsError: the file cannot be read, or is refused; a tensor is missing, unexpected, or of another shape. The
            model is not changed then.
    """
    where = str(weights) if isinstance(weights, Path) else "the state dict"
    if isinstance(weights, Path) and variant is not None:
        _check_made_for(variant, fitted or variant, read_metadata(weights), where)
    state = read_state(weights) if isinstance(weights, Path) else dict(weights)
    expected = model.state_dict()
    missing = [key for key in expected if key not in state and not _is_counter(key)]
    unexpected = [key for key in state if key not in expected]
    shapes = [
        _misfit(key, state[key], expected[key])
        for key in expected
        if key in state and (state[key].shape != expected[key].shape or not _same_kind(state[key], expected[key]))
    ]
    if missing or unexpected or shapes:
        raise WeightsError(f"{where}: does not fit {type(model).__name__}: {_listed(missing, unexpected, shapes)}")
    counters = {key: torch.zeros((), dtype=torch.long) for key in expected if key not in state}
    model.load_state_dict({**state, **counters})


def read_state(path: Path) -> dict[str, Tensor]:
    """Return the state dict of a file, on the CPU, without a prefix `module.`; it may be where training scripts put it.

    Raises:
        WeightsError: the file cannot be read, holds more than tensors, or no state dict.
    """
    return _read(path).state


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file (for selab's, as `Conversion.metadata`); empty for a pickle.

    Raises:
        WeightsError: the file cannot be read.
    """
    _check_readable(path)
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: is broken or not a safetensors file ({line(error)}); get it again") from None


# ------------------------------------------------------------------------------------------------------------- reading
def _read(path: Path) -> _Input:
    _check_readable(path)
    content = path.read_bytes()
    loaded = _from_safetensors(path, content) if path.suffix == ".safetensors" else _from_pickle(path, content)
    under = ""
    if isinstance(loaded, Mapping) and not _is_state(loaded):
        under = next((key for key in _UNDER if _is_state(loaded.get(key))), "")
        loaded = loaded.get(under)
    if not _is_state(loaded):
        raise WeightsError(
            f"{path}: has no state dict (tensors by name), neither at the top level nor under {', '.join(_UNDER)}; "
            "save model.state_dict()"
        )
    prefix = "module." if all(key.startswith("module.") for key in loaded) else ""
    state = {key.removeprefix(prefix): value for key, value in loaded.items()}
    for key, value in state.items():
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            raise WeightsError(
                f"{path}: {key}: is not a plain tensor (sparse, quantised or without data); save a dense one"
            )
    return _Input(state=state, under=under, sha256=hashlib.sha256(content).hexdigest())


def _check_readable(path: Path) -> None:
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        raise WeightsError(f"{path}: cannot be read: allowed are .safetensors, .pt and .pth files")
    try:
        path.open("rb").close()
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror}") from None


def _from_safetensors(path: Path, content: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise WeightsError(f"{path}: is broken or not a safetensors file ({line(error)}); get it again") from None


def _from_pickle(path: Path, content: bytes) -> object:
    """Read tensors, numbers, strings and containers; refuse everything else that a pickle would build or call."""
    try:
        with warnings.catch_warnings():
            # About the file's age and kind; errors say what is wrong with it.
            warnings.simplefilter("ignore")
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        if wanted is None:
            raise WeightsError(
                f"{path}: is broken or not a file of torch.save; get it again, or save a state dict"
            ) from None
        raise WeightsError(
            f"{path}: is refused: it holds more than tensors ({wanted[1]}), and reading that could run any code; "
            "if you trust it, save its state dict alone, best with safetensors.torch.save_file"
        ) from None
    except Exception:
        # An untrusted file may fail the reader in any way.
        raise WeightsError(
            f"{path}: is broken or not a file of torch.save; get it again, or save a state dict"
        ) from None


def _is_state(value: object) -> TypeGuard[Mapping[str, Tensor]]:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(key, str) and isinstance(one, Tensor) for key, one in value.items())
    )


def line(error: BaseException) -> str:
    """Return the first sentence of an error."""
    return re.split(r"\.\s|\n", str(error).strip())[0].rstrip(".") or type(error).__name__


# ------------------------------------------------------------------------------------------------------------- mapping
def _steps(
    state: Mapping[str, Tensor], port: Port, variant: Variant, expected: Mapping[str, Tensor], *, where: str
) -> tuple[Renamed, ...]:
    """Map every tensor; raise WeightsError unless input and output match one to one."""
    places = {**expected, **(_biases(expected) if port.folds_bias else {})}
    classifier = list(expected)[-1].rpartition(".")[0]
    steps: dict[str, Renamed] = {}
    unexpected, shapes = [], []
    for theirs, tensor in state.items():
        ours = renamed(theirs, port.rules)
        if ours not in places or ours in steps:
            unexpected.append(theirs)
            continue
        place = places[ours]
        if not _fits(tensor, place):
            if ours.rpartition(".")[0] == classifier and tensor.shape[1:].numel() == place.shape[1:].numel():
                raise WeightsError(
                    f"{where}: its classifier {theirs} has {len(tensor)} classes, and {variant.name} has "
                    f"{variant.num_classes}; give weights of {variant.num_classes} classes"
                )
            shapes.append(_misfit(theirs, tensor, place))
        steps[ours] = Renamed(
            theirs=theirs,
            ours=ours,
            their_shape=tuple(tensor.shape),
            shape=tuple(place.shape),
            folded=ours not in expected,
        )
    missing = [key for key in places if key not in steps and not _is_counter(key)]
    if unexpected or missing or shapes:
        # Present tensors are listed by the file's names; missing ones have none there.
        listed = _listed(missing, unexpected, shapes, said=" (by our names)")
        raise WeightsError(f"{where}: does not match {port.source}'s {port.model} (for {variant.name}): {listed}")
    return tuple(steps.values())


def _biases(expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the keys of biases that selab's convolutions lack, each with the running mean that absorbs it."""
    return {_bias_of(key): value for key, value in expected.items() if key.endswith(".bn.running_mean")}


def _bias_of(mean: str) -> str:
    return mean.removesuffix(".bn.running_mean") + ".conv.bias"


def _converted(
    state: Mapping[str, Tensor], steps: tuple[Renamed, ...], expected: Mapping[str, Tensor], *, where: str
) -> dict[str, Tensor]:
    """Return the output's tensors in order, each with memory of its own, as the format requires."""
    theirs = {step.ours: state[step.theirs].detach().reshape(step.shape) for step in steps}
    converted: dict[str, Tensor] = {}
    for key, place in expected.items():
        if key not in theirs:
            converted[key] = torch.zeros(place.shape, dtype=place.dtype)
            continue
        value = theirs[key].to(place.dtype, copy=True).contiguous()
        if key.endswith(".bn.running_mean") and _bias_of(key) in theirs and _bias_of(key) not in expected:
            value -= theirs[_bias_of(key)]
        if not value.isfinite().all():
            raise WeightsError(f"{where}: {key}: holds NaN or infinite values; get the file again")
        converted[key] = value
    return converted


def _fits(theirs: Tensor, ours: Tensor) -> bool:
    """Return whether shapes are equal, or a convolution (O, C, H, W) is a fully connected layer (O, C * H * W)."""
    whole_map = theirs.dim() == 4 and ours.dim() == 2 and theirs.flatten(1).shape == ours.shape
    return _same_kind(theirs, ours) and (theirs.shape == ours.shape or whole_map)


def _same_kind(theirs: Tensor, ours: Tensor) -> bool:
    return theirs.is_floating_point() == ours.is_floating_point() and not theirs.is_complex()


def _is_counter(key: str) -> bool:
    """Return whether a key is a BN's counter of batches. Files before torch 0.4.1 lack it, and eval mode ignores it."""
    return key.rpartition(".")[2] == _COUNTER


def _misfit(key: str, theirs: Tensor, ours: Tensor) -> str:
    if theirs.shape == ours.shape:
        return f"{key} {str(theirs.dtype).removeprefix('torch.')} instead of {str(ours.dtype).removeprefix('torch.')}"
    return f"{key} {tuple(theirs.shape)} instead of {tuple(ours.shape)}"


def _listed(missing: list[str], unexpected: list[str], shapes: list[str], *, said: str = "") -> str:
    """Return the first five keys of each kind of mismatch; `said`: which side's names the missing keys use."""
    parts = []
    kinds = ((f"missing{said}", missing), ("unexpected", unexpected), ("wrong shape or type", shapes))
    for name, keys in kinds:
        if keys:
            more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
            parts.append(f"{name}: {', '.join(keys[:5])}{more}")
    return "; ".join(parts)


# ------------------------------------------------------------------------------------------------------------- writing
def _check_target(path: Path, source: Path, *, replace: bool) -> None:
    if path.suffix != ".safetensors":
        raise WeightsError(f"{path}: the output is a .safetensors file; give it that suffix")
    if path.is_dir():
        raise WeightsError(f"{path}: is a folder; name a file in it")
    if path.exists() and source.exists() and path.samefile(source):
        raise WeightsError(f"{path}: is the input; name another file")
    if path.exists() and not replace:
        raise WeightsError(f"{path}: exists; use --replace to overwrite it, or name another file")


def _check_made_for(variant: Variant, fitted: Variant, metadata: Mapping[str, str], where: str) -> None:
    made_for = metadata.get("facts_hash")
    if made_for in (None, variant.facts_hash, fitted.facts_hash):
        return
    name = metadata.get("arch", "another network")
    if "recipe_hash" not in metadata:
        reason = f"an earlier configuration of {name}" if name == variant.name else name
        raise WeightsError(f"{where}: was converted for {reason}, not for {variant.name}; convert it again")
    trained = _as_trained(variant, metadata)
    what = f"{where}: is of {name}" if trained is None else f"{where}: is of {name} with {_size(trained)}"
    if trained is None or trained.facts_hash != made_for:
        other = "in an earlier configuration; train it again" if name == variant.name else f"not of {variant.name}"
        raise WeightsError(f"{what}, {other}")
    if (trained.num_classes, trained.input_chw[0]) != (fitted.num_classes, fitted.input_chw[0]):
        raise WeightsError(f"{what}, not {_size(fitted)}; give the data that it was trained on")


def _as_trained(variant: Variant, metadata: Mapping[str, str]) -> Variant | None:
    """Return the variant with the classes and image size of a file's metadata; None if it has none."""
    found = re.fullmatch(r"(\d+) (\d+)x(\d+)x(\d+)", f"{metadata.get('num_classes')} {metadata.get('input_chw')}")
    if found is None:
        return None
    classes, channels, height, width = map(int, found.groups())
    return msgspec.structs.replace(variant, num_classes=classes, input_chw=(channels, height, width))


def _size(variant: Variant) -> str:
    return f"{variant.num_classes} classes, {'×'.join(map(str, variant.input_chw))}"
