"""Convert trained weights of other libraries: read the file safely, rename and check every tensor, write the result.

The input is untrusted: a safetensors file, or a pickle read by a loader that builds tensors and dictionaries only. The
output is a safetensors file with exactly the tensors of one variant, and metadata about their origin.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import safetensors.torch
import torch
from torch import Tensor, nn

from selab import units
from selab._version import __version__
from selab.models import catalog
from selab.models.build import build
from selab.models.key_maps import Port, port_for, renamed
from selab.models.spec import Variant
from selab.models.weights_file import (
    MOST_NAMES,
    Found,
    Target,
    WeightsError,
    is_counter,
    line,
    pick,
    read,
    read_metadata,
    shown,
    some,
    unwrapped,
    without_private,
)
from selab.records.files import write_atomically

__all__ = [
    "Conversion",
    "Head",
    "Loaded",
    "Renamed",
    "WeightsError",
    "convert",
    "line",
    "load",
    "read_metadata",
    "read_state",
]
Head = Literal["keep", "drop"]
"""What becomes of a classifier of another number of classes: it is refused, or ours stays as it was initialised."""
_VARIANCE = "running_var"


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
        taken: what was taken out of the input, in words; empty if it is nothing but the network's state dict.
        dropped: tensors of the classifier, of another number of classes; in the output they are as initialised.
    """

    port: Port
    renamed: tuple[Renamed, ...]
    filled: tuple[str, ...]
    metadata: dict[str, str]
    taken: str = ""
    dropped: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What was loaded into a network.

    Attributes:
        taken: what was taken out of the file, in words; empty if it is nothing but the network's state dict.
        dropped: tensors of the classifier, of another number of classes; the network's own stayed.
    """

    taken: str = ""
    dropped: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """What a user must know, in one line; empty if there is nothing."""
        dropped = f"classifier left as initialised: {some(self.dropped)}" if self.dropped else ""
        return "; ".join(part for part in (self.taken, dropped) if part)


def convert(
    source_path: Path,
    target_path: Path | None,
    *,
    source: str,
    arch: str,
    replace: bool = False,
    ema: bool | None = None,
    head: Head = "keep",
    num_classes: int | None = None,
) -> Conversion:
    """Convert the weights of an external network into those of the variant that computes the same function.

    Args:
        source_path: `.safetensors`, or a file of `torch.save`.
        target_path: the `.safetensors` file to write; None for a dry run.
        source: `timm`, `torchvision` or `cadene`.
        arch: selab's variant.
        replace: whether an existing file may be replaced.
        ema: whether to take a moving average of the weights; None for the average if the file has one.
        head: `drop` accepts a classifier of another number of classes and initialises ours, from seed 0.
        num_classes: of the classifier, where it is not the variant's: 365 for weights of Places365.

    Raises:
        UnknownNameError: no such source or variant, or no network of the source is known to be equal to it.
        WeightsError: the input cannot be read, is refused, or does not fit that network; the output exists or cannot be
            written. Then nothing is written.
    """
    variant = catalog.find(arch)
    port = port_for(source, arch)
    if num_classes is not None:
        variant = msgspec.structs.replace(variant, num_classes=num_classes)
    if target_path is not None:
        _check_target(target_path, source_path, replace=replace)
    expected = build(variant, device="meta").model.state_dict()
    found = read(source_path, target=_target(port, expected), ema=ema)
    steps, dropped = _steps(found.state, port, variant, expected, where=str(source_path), head=head)
    converted = _converted(found.state, steps, expected, where=str(source_path))
    if dropped:
        initial = build(variant).model.state_dict()
        converted |= {key: initial[key].detach().clone() for key in dropped}
    metadata = {
        "arch": variant.name,
        "facts_hash": variant.facts_hash,
        "input_sha256": found.sha256,
        "model": port.model,
        "selab": __version__,
        "source": source,
    } | _taken_from(found, dropped)
    if num_classes is not None:
        metadata |= {"num_classes": str(num_classes), "input_chw": "x".join(map(str, variant.input_chw))}
    if target_path is not None:
        write_atomically(target_path, safetensors.torch.save(converted, metadata))
    given = {step.ours for step in steps}
    filled = tuple(key for key in expected if key not in given and key not in dropped)
    return Conversion(
        port=port, renamed=steps, filled=filled, metadata=metadata, taken=found.words, dropped=tuple(dropped)
    )


def _taken_from(found: Found, dropped: list[str]) -> dict[str, str]:
    """Return what a file's metadata say about where the tensors were."""
    facts = {
        "under": found.under,
        "prefix": found.prefix,
        "average": "ema" if found.average else "",
        "initialised": " ".join(dropped),
    }
    return {key: value for key, value in facts.items() if value}


def load(
    model: nn.Module,
    weights: Path | Mapping[str, Tensor],
    *,
    variant: Variant | None = None,
    fitted: Variant | None = None,
    ema: bool | None = None,
    head: Head = "keep",
) -> Loaded:
    """Load weights into a network, all or none; only counters of seen batches may be missing.

    Prefixes of wrappers (`module.`, `_orig_mod.`, `model.`, …) are removed from a file's keys where the network's keys
    are then found. A network that is wrapped itself is loaded inside its wrapper.

    Args:
        model: keeps its device and precision.
        weights: a file, or a state dict.
        variant: what the network was built from. A file of another configuration is refused, because its tensors may
            fit and mean something else. A file trained by selab may be of images of another height and width.
        fitted: the variant with the data's classes and image size, if the network was built from that; a file of
            either is accepted.
        ema: True for the moving average of the weights that a file holds, False for the weights themselves, None for
            the average if there is one.
        head: `drop` leaves the classifier as it is if the weights' classifier has another number of classes.

    Returns:
        What was taken out of the file, and what was dropped.

    Raises:
        WeightsError: the file cannot be read, or is refused; a tensor is missing, unexpected, or of another shape. The
            model is not changed then.
    """
    where = str(weights) if isinstance(weights, Path) else "the state dict"
    if isinstance(weights, Path) and variant is not None:
        _check_made_for(variant, fitted or variant, read_metadata(weights), where, head)
    model = unwrapped(model)
    expected = model.state_dict()
    target = _own_target(expected)
    found = read(weights, target=target, ema=ema) if isinstance(weights, Path) else pick(weights, target)
    # Submodules may be compiled: their keys have a wrapper's name in between.
    places = {without_private(key): key for key in expected}
    state = {places.get(key, key): value for key, value in found.state.items()}
    missing = [key for key in expected if key not in state and not is_counter(key)]
    unexpected = [key for key in state if key not in expected]
    wrong = [
        key
        for key in expected
        if key in state and (state[key].shape != expected[key].shape or not _same_kind(state[key], expected[key]))
    ]
    classes = _classifier(state, expected, wrong)
    dropped = tuple(wrong) if classes and head == "drop" else ()
    if missing or unexpected or (wrong and not dropped):
        listed = _listed(missing, unexpected, [_misfit(key, state[key], expected[key]) for key in wrong])
        hint = ""
        if classes and not missing and not unexpected:
            theirs, ours = classes
            hint = (
                f"; its classifier has {theirs} classes, this network {ours}: build it with {theirs} classes, or leave "
                "its own classifier (selab weights convert --head drop; head='drop' in Python)"
            )
        named = type(model).__name__ if variant is None else variant.name
        raise WeightsError(f"{where}: does not fit {named}: {listed}{hint}")
    if isinstance(weights, Path):
        for key, value in state.items():
            if key not in dropped:
                # Also a value that the network's type cannot hold becomes infinite.
                _check_values(key, value.to(expected[key].dtype), where)
    counters = {key: torch.zeros((), dtype=torch.long) for key in expected if key not in state}
    model.load_state_dict({**state, **counters, **{key: expected[key] for key in dropped}})
    return Loaded(taken=found.words, dropped=dropped)


def read_state(path: Path, *, ema: bool | None = None) -> dict[str, Tensor]:
    """Return the state dict of a file, on the CPU, without a prefix `module.`; it may be where training scripts put it.

    Args:
        path: the file.
        ema: as in `load`.

    Raises:
        WeightsError: the file cannot be read, holds more than tensors, no state dict, or several.
    """
    return read(path, ema=ema).state


def _own_target(expected: Mapping[str, Tensor]) -> Target:
    """Return a network whose keys are a file's; compiled submodules are called as they were before."""
    keys = {without_private(key) for key in expected}
    return Target(place=lambda key: key if key in keys else None, keys=keys)


def _target(port: Port, expected: Mapping[str, Tensor]) -> Target:
    """Return a network whose keys are a file's after renaming."""
    places = {**expected, **(_biases(expected) if port.folds_bias else {})}

    def place(key: str) -> str | None:
        ours = renamed(key, port.rules)
        return ours if ours in places else None

    return Target(place=place, keys=places)


def _classifier(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], wrong: list[str]
) -> tuple[int, int] | None:
    """Return the numbers of classes, theirs and ours, if classifiers of another number are all that does not fit.

    Those are the network's last layer, and auxiliary ones of as many classes; they differ in their first dimension
    alone, so a network of another width is not taken for one.
    """
    layers = [key.rpartition(".")[0] for key, value in expected.items() if value.is_floating_point()]
    if not wrong or layers[-1] not in {key.rpartition(".")[0] for key in wrong}:
        return None
    for key in wrong:
        theirs, ours = state[key], expected[key]
        if not theirs.dim() or theirs.dim() != ours.dim() or theirs.shape[1:] != ours.shape[1:]:
            return None
        if not len(theirs) or not _same_kind(theirs, ours):
            return None
    sizes = {(len(state[key]), len(expected[key])) for key in wrong}
    return sizes.pop() if len(sizes) == 1 and any(expected[key].dim() > 1 for key in wrong) else None


# ------------------------------------------------------------------------------------------------------------- mapping
def _steps(
    state: Mapping[str, Tensor],
    port: Port,
    variant: Variant,
    expected: Mapping[str, Tensor],
    *,
    where: str,
    head: Head,
) -> tuple[tuple[Renamed, ...], list[str]]:
    """Map every tensor, and return also the keys of a dropped classifier.

    Raises:
        WeightsError: input and output do not match one to one.
    """
    places = {**expected, **(_biases(expected) if port.folds_bias else {})}
    classifier = list(expected)[-1].rpartition(".")[0]
    steps: dict[str, Renamed] = {}
    dropped: list[str] = []
    unexpected, shapes = [], []
    for theirs, tensor in state.items():
        ours = renamed(theirs, port.rules)
        if ours not in places or ours in steps:
            unexpected.append(theirs)
            continue
        place = places[ours]
        if not _fits(tensor, place):
            inner = (tensor.shape[1:].numel(), place.shape[1:].numel())
            resized = tensor.dim() and place.dim() and len(tensor) != len(place) and len(set(inner)) == 1
            if ours.rpartition(".")[0] == classifier and resized and _same_kind(tensor, place):
                if head == "drop":
                    dropped.append(ours)
                    continue
                has = units.counted(len(tensor), "class", "classes")
                needs = units.counted(variant.num_classes, "class", "classes")
                raise WeightsError(
                    f"{where}: its classifier {shown(theirs)} has {has}, and {variant.name} has "
                    f"{variant.num_classes}; give weights of {needs}, --num-classes {len(tensor)}, or --head drop to "
                    "initialise the classifier anew"
                )
            shapes.append(_misfit(theirs, tensor, place))
        steps[ours] = Renamed(
            theirs=theirs,
            ours=ours,
            their_shape=tuple(tensor.shape),
            shape=tuple(place.shape),
            folded=ours not in expected,
        )
    missing = [key for key in places if key not in steps and key not in dropped and not is_counter(key)]
    if unexpected or missing or shapes:
        # Present tensors are listed by the file's names; missing ones have none there.
        listed = _listed(missing, unexpected, shapes, said=" (by our names)")
        raise WeightsError(f"{where}: does not match {port.source}'s {port.model} (for {variant.name}): {listed}")
    return tuple(steps.values()), dropped


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
        _check_values(key, value, where)
        converted[key] = value
    return converted


def _fits(theirs: Tensor, ours: Tensor) -> bool:
    """Return whether shapes are equal, or a convolution (O, C, H, W) is a fully connected layer (O, C * H * W)."""
    whole_map = theirs.dim() == 4 and ours.dim() == 2 and theirs.flatten(1).shape == ours.shape
    return _same_kind(theirs, ours) and (theirs.shape == ours.shape or whole_map)


def _same_kind(theirs: Tensor, ours: Tensor) -> bool:
    return theirs.is_floating_point() == ours.is_floating_point() and not theirs.is_complex()


def _misfit(key: str, theirs: Tensor, ours: Tensor) -> str:
    kinds = [str(one.dtype).removeprefix("torch.") for one in (theirs, ours)]
    shapes = [str(tuple(one.shape)) for one in (theirs, ours)]
    if not _same_kind(theirs, ours):
        said = kinds if theirs.shape == ours.shape else map(" ".join, zip(kinds, shapes, strict=True))
        return f"{shown(key)} {' instead of '.join(said)}"
    return f"{shown(key)} {' instead of '.join(shapes)}"


def _listed(missing: list[str], unexpected: list[str], shapes: list[str], *, said: str = "") -> str:
    """Return how many keys of each kind do not fit, and three of them; `said`: whose names the missing keys use."""
    kinds = [(f"missing{said}", missing), ("unexpected", unexpected), ("of the wrong shape or type", shapes)]
    kinds = [kind for kind in kinds if kind[1]]
    shares = [MOST_NAMES // len(kinds)] * len(kinds)
    shares[0] += MOST_NAMES - sum(shares)
    parts = []
    for (name, keys), most in zip(kinds, shares, strict=True):
        more = ", …" if len(keys) > most else ""
        parts.append(f"{len(keys):,} {name}: {', '.join(map(shown, keys[:most]))}{more}")
    return "; ".join(parts)


# ------------------------------------------------------------------------------------------------------------- writing
def _check_values(key: str, value: Tensor, where: str) -> None:
    """Refuse NaN, infinity, and a running variance below zero, whose square root would be NaN."""
    if not value.is_floating_point():
        return
    # float8 has no isfinite of its own.
    exact = value.double()
    if not exact.isfinite().all():
        raise WeightsError(f"{where}: {key}: holds NaN or infinite values; get the file again")
    if key.rpartition(".")[2] == _VARIANCE and (exact < 0).any():
        raise WeightsError(f"{where}: {key}: holds negative values, and a variance has none; get the file again")


def _check_target(path: Path, source: Path, *, replace: bool) -> None:
    if path.suffix != ".safetensors":
        raise WeightsError(f"{path}: the output is a .safetensors file; give it that suffix")
    if path.is_dir():
        raise WeightsError(f"{path}: is a folder; name a file in it")
    if path.exists() and source.exists() and path.samefile(source):
        raise WeightsError(f"{path}: is the input; name another file")
    if path.exists() and not replace:
        raise WeightsError(f"{path}: exists; use --replace to overwrite it, or name another file")


def _check_made_for(variant: Variant, fitted: Variant, metadata: Mapping[str, str], where: str, head: Head) -> None:
    made_for = metadata.get("facts_hash")
    if made_for in (None, variant.facts_hash, fitted.facts_hash):
        return
    name = metadata.get("arch", "another network")
    if "num_classes" not in metadata:
        reason = f"an earlier configuration of {name}" if name == variant.name else name
        raise WeightsError(f"{where}: was converted for {reason}, not for {variant.name}; convert it again")
    trained = _as_trained(variant, metadata)
    what = f"{where}: is of {name}" if trained is None else f"{where}: is of {name} with {_size(trained)}"
    if trained is None or trained.facts_hash != made_for:
        other = "in an earlier configuration; train it again" if name == variant.name else f"not of {variant.name}"
        raise WeightsError(f"{what}, {other}")
    if trained.input_chw[0] != fitted.input_chw[0] or (trained.num_classes != fitted.num_classes and head == "keep"):
        raise WeightsError(f"{what}, not {_size(fitted)}; give the data that it was trained on")


def _as_trained(variant: Variant, metadata: Mapping[str, str]) -> Variant | None:
    """Return the variant with the classes and image size of a file's metadata; None if it has none."""
    found = re.fullmatch(r"(\d+) (\d+)x(\d+)x(\d+)", f"{metadata.get('num_classes')} {metadata.get('input_chw')}")
    if found is None:
        return None
    classes, channels, height, width = map(int, found.groups())
    return msgspec.structs.replace(variant, num_classes=classes, input_chw=(channels, height, width))


def _size(variant: Variant) -> str:
    return f"{units.counted(variant.num_classes, 'class', 'classes')}, {'×'.join(map(str, variant.input_chw))}"
