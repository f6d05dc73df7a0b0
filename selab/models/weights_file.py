"""Read a file of weights safely, and find a network's tensors in it, wherever a training script put them.

The input is untrusted: a safetensors file, or a pickle read by a loader that builds tensors and containers only. A file
may hold several state dicts, an average of the weights among them, and wrappers prefix the keys. What was taken, which
prefix was removed and what was left is reported, and a choice that nobody made is refused.
"""

import hashlib
import io
import pickle
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeGuard

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from selab import units
from selab.errors import SelabError

# Where training scripts put a moving average of the weights, and the weights themselves.
_AVERAGES = (
    "state_dict_ema",
    "model_ema",
    "ema",
    "ema_state_dict",
    "model_ema_state_dict",
    "ema_model",
    "ema_model_state_dict",
    "ema_state",
    "ema_net",
    "net_ema",
    "params_ema",
    "average",
)
_PLAIN = (
    "state_dict",
    "model",
    "model_state_dict",
    "net",
    "net_state_dict",
    "network",
    "model_state",
    "module",
    "params",
    "online_model",
)
# These hold no tensors themselves, but one of the above.
_CONTAINERS = ("checkpoint", "tensors", "state")
_KNOWN = frozenset({*_AVERAGES, *_PLAIN, *_CONTAINERS})
_DEEPEST = 3
# Modules that hold the network as their child: DistributedDataParallel, LightningModules, averages.
_WRAPPERS = frozenset({"module", "model", "net", "network", "backbone", "online_model", *_AVERAGES})
# The same for wrappers whose name no network uses itself; they may stand anywhere in a key.
_PRIVATE = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# Counters of averages: torch's AveragedModel, ema_pytorch.
_BOOKKEEPING = frozenset({"n_averaged", "initted", "step", "num_updates", "decay"})
_PICKLES = (".pt", ".pth", ".tar", ".ckpt", ".bin")
_KEY_LENGTH = 100
MOST_NAMES = 3
"""Keys that a message shows."""
_COUNTER = "num_batches_tracked"


class WeightsError(SelabError):
    """A file of weights cannot be read or written, or does not fit the network; the message names the tensors."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """The network that a file is read for.

    Attributes:
        place: the network's key of a file's key; None if there is none.
        keys: all keys of the network.
    """

    place: Callable[[str], str | None]
    keys: Collection[str]

    def score(self, state: Collection[str]) -> tuple[bool, int]:
        """Return whether the keys are exactly the network's (counters of batches may be missing), and how many are."""
        places = [self.place(key) for key in state]
        found = {place for place in places if place is not None}
        missing = any(key not in found and not is_counter(key) for key in self.keys)
        return len(found) == len(places) and not missing, len(found)


@dataclass(frozen=True, kw_only=True)
class Found:
    """The tensors of one network in a file.

    Attributes:
        state: on the CPU, without the prefix of a wrapper.
        under: where in the file they were, `state_dict`; empty for the top level.
        prefix: what was removed from their keys, `module._orig_mod.`; empty for nothing.
        average: whether they are a moving average of the weights.
        left: what else the file holds.
        other: whether what was left has the weights of the other kind, averaged or not.
        unfit: where weights of the other kind are that are not the network's; empty if there are none.
        unusual: whether they are at a place that training scripts do not use; such tensors are never taken, but make
            the choice ambiguous if they are the network's too.
        sha256: of the file.
    """

    state: dict[str, Tensor]
    under: str = ""
    prefix: str = ""
    average: bool = False
    left: tuple[str, ...] = ()
    other: bool = False
    unfit: str = ""
    unusual: bool = False
    sha256: str = ""

    @property
    def words(self) -> str:
        """What was taken out of the file, for the user; empty if it holds the network's tensors and nothing else."""
        kind = ", an average of the weights (EMA)" if self.average else ""
        parts = [f"taken from {shown(self.under)}{kind}"] if self.under else [f"taken{kind}"] if kind else []
        if self.prefix:
            parts.append(f"prefix {shown(self.prefix)} removed")
        if self.left:
            parts.append(f"left out: {some(self.left)}")
        if self.other:
            parts.append("--no-ema takes the weights without averaging" if self.average else "--ema takes the average")
        elif self.unfit:
            kind = "weights without averaging" if self.average else "average of the weights"
            parts.append(f"the {kind} under {shown(self.unfit)} cannot be taken: the keys are not the network's")
        return "; ".join(parts)


def read(path: Path, *, target: Target | None = None, ema: bool | None = None) -> Found:
    """Return the tensors of one network in a file.

    Args:
        path: `.safetensors`, or a file of `torch.save`: `.pt`, `.pth`, `.tar`, `.ckpt`, `.bin`.
        target: the network; without it, only prefixes that no network has itself are removed.
        ema: True for the average of the weights, False for the weights themselves, None for the average if there is
            one: published accuracies are of averages.

    Raises:
        WeightsError: the file cannot be read, holds more than tensors, no state dict, or several that could be meant.
    """
    check_readable(path)
    content = path.read_bytes()
    loaded = _from_safetensors(path, content) if path.suffix == ".safetensors" else _from_pickle(path, content)
    forms = [form for one in _candidates(loaded) for form in _forms(one, path, target)]
    if all(form.unusual for form in forms):
        raise WeightsError(f"{path}: {_no_state_dict(loaded)}")
    chosen = _chosen(forms, path, target, ema)
    for key, value in chosen.state.items():
        _check_plain(path, key, value)
    return replace(chosen, sha256=hashlib.sha256(content).hexdigest())


def pick(state: Mapping[str, Tensor], target: Target) -> Found:
    """Return the tensors of a network in a state dict; prefixes of wrappers are removed where its keys then fit.

    Raises:
        WeightsError: several parts of the state dict fit.
    """
    there = "the state dict"
    return replace(_chosen(list(_forms(Found(state=dict(state)), there, target)), there, target, None), other=False)


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file (for selab's, as `Conversion.metadata`); empty for a pickle.

    Raises:
        WeightsError: the file cannot be read.
    """
    check_readable(path)
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: is broken or not a safetensors file ({line(error)}); get it again") from None


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the network inside of `torch.compile`, DistributedDataParallel and DataParallel."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def without_private(key: str) -> str:
    """Return a key without the wrappers of `torch.compile`, FSDP and checkpointing: `a._orig_mod.b` → `a.b`."""
    return ".".join(part for part in key.split(".") if part not in _PRIVATE)


def is_counter(key: str) -> bool:
    """Return whether a key is a BN's counter of batches. Files before torch 0.4.1 lack it, and eval mode ignores it."""
    return key.rpartition(".")[2] == _COUNTER


def shown(key: str) -> str:
    """Return a key of a file on one line, cut if it is long."""
    text = key if key.isprintable() else repr(key)[1:-1]
    return text if len(text) <= _KEY_LENGTH else f"{text[:_KEY_LENGTH]}…"


def some(keys: Collection[str], *, most: int = MOST_NAMES) -> str:
    """Return the first keys and how many more there are."""
    more = f" and {len(keys) - most:,} more" if len(keys) > most else ""
    return ", ".join(shown(key) for key in list(keys)[:most]) + more


def line(error: BaseException) -> str:
    """Return the first sentence of an error."""
    return re.split(r"\.\s|\n", str(error).strip())[0].rstrip(".") or type(error).__name__


# ------------------------------------------------------------------------------------------------------------- choosing
def _chosen(forms: list[Found], path: Path | str, target: Target | None, ema: bool | None) -> Found:
    """Return the tensors that are meant; refuse several that could be."""
    usual = [form for form in forms if not form.unusual]
    if ema is not None and not any(form.average == ema for form in usual):
        what, there = ("average of the weights", "--no-ema") if ema else ("weights without averaging", "--ema")
        held = some(list(dict.fromkeys(_place(form) for form in usual)))
        raise WeightsError(f"{path}: holds no {what}, only what is under {held}; use {there}, or leave the option out")
    if target is None:
        # The last form of a state dict has all prefixes removed.
        every = list({form.under: form for form in usual}.values())
        fitting = [form for form in every if ema is None or form.average == ema]
    else:
        scores = [target.score(form.state.keys()) for form in forms]
        every = [form for form, (fits, _) in zip(forms, scores, strict=True) if fits]
        fitting = [form for form in every if ema is None or form.average == ema]
        if all(form.unusual for form in fitting):
            # The nearest one, whose mismatches a message will list.
            near = [
                (form, score[1])
                for form, score in zip(forms, scores, strict=True)
                if not form.unusual and (ema is None or form.average == ema)
            ]
            return max(near, key=lambda pair: pair[1])[0]
    averages = [form for form in fitting if form.average]
    if any(not form.unusual for form in averages):
        fitting = averages
    distinct = [form for index, form in enumerate(fitting) if not any(_equal(form, one) for one in fitting[:index])]
    if len(distinct) > 1:
        places = some([f"{_place(form)}{f' ({form.prefix})' if form.prefix else ''}" for form in distinct])
        raise WeightsError(
            f"{path}: holds several networks that could be meant: {places}; save the state dict of one alone"
        )
    chosen = distinct[0] if not distinct[0].unusual else next(form for form in fitting if not form.unusual)
    other = any(form.average != chosen.average and not form.unusual for form in every)
    unfit = "" if other else next((_place(form) for form in usual if form.average != chosen.average), "")
    return replace(chosen, other=other, unfit=unfit)


def _place(form: Found) -> str:
    return form.under or "the top level"


def _equal(one: Found, other: Found) -> bool:
    """Return whether two state dicts have the same tensors."""
    if one.state.keys() != other.state.keys():
        return False
    pairs = ((one.state[key], other.state[key]) for key in one.state)
    return all(a is b or (a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)) for a, b in pairs)


def _candidates(
    loaded: object, under: tuple[str, ...] = (), left: tuple[str, ...] = (), *, average: bool = False
) -> Iterator[Found]:
    """Yield every state dict at the top level, or under the names that training scripts use."""
    if not isinstance(loaded, Mapping) or len(under) > _DEEPEST:
        return
    if _is_state(loaded):
        extra = tuple(key for key in loaded if _is_extra(key))
        state = {key: value for key, value in loaded.items() if isinstance(value, Tensor)}
        yield Found(state=state, under=".".join(under), average=average, left=left + extra)
        return
    for name in (*_AVERAGES, *_PLAIN, *_CONTAINERS):
        if isinstance(loaded.get(name), Mapping):
            others = tuple(str(key) for key in loaded if key != name)
            yield from _candidates(loaded[name], (*under, name), (*left, *others), average=average or name in _AVERAGES)
    yield from _unusual(loaded, under, average=average)


def _unusual(loaded: Mapping[object, object], under: tuple[str, ...], *, average: bool) -> Iterator[Found]:
    """Yield the state dicts that training scripts would not put where they are: beside others, or under other names."""
    loose = {key: value for key, value in loaded.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if loose:
        yield Found(state=loose, under=".".join(under), average=average, unusual=True)
    for name, part in loaded.items():
        if name in _KNOWN or not isinstance(part, Mapping):
            continue
        # Not deeper, as a dictionary may hold itself.
        inner = {(): part} | {(known,): part[known] for known in (*_AVERAGES, *_PLAIN) if known in part}
        for path, one in inner.items():
            if _is_state(one):
                names = (str(name), *path)
                yield Found(
                    state={key: value for key, value in one.items() if isinstance(value, Tensor)},
                    under=".".join((*under, *names)),
                    average=average or any(map(_says_average, names)),
                    unusual=True,
                )


def _says_average(name: str) -> bool:
    return not {"ema", "average", "averaged", "avg", "swa"}.isdisjoint(re.split(r"[\W_]+", name.lower()))


def _forms(one: Found, path: Path | str, target: Target | None) -> Iterator[Found]:
    """Yield a state dict as it is, and without the prefixes that wrappers may have put before its keys.

    Args:
        one: a state dict of a file.
        path: the file, for messages.
        target: the network, whose keys decide; without it, no prefixes are removed that a network may have itself.
    """
    for form in _unwrapped_forms(one, path, target):
        yield _with_ordered_prefix(form, one.state)


def _with_ordered_prefix(form: Found, whole: Mapping[str, Tensor]) -> Found:
    """Return a form whose prefix has its parts in the order in which the keys of the file have them."""
    parts = form.prefix.split(".")[:-1]
    if not _PRIVATE.intersection(parts) or _PRIVATE.issuperset(parts):
        return form
    # Tensors are the same objects in both; one object may have several names.
    keys: dict[int, list[str]] = {}
    for key, value in whole.items():
        keys.setdefault(id(value), []).append(key)
    orders: dict[tuple[str, ...], None] = {}
    for key, value in form.state.items():
        for name in keys.get(id(value), ()):
            if f".{without_private(name)}".endswith(f".{key}"):
                orders[_removed(name.split("."), key.split("."))] = None
                break
    longest = max(orders, key=len, default=())
    left = [part for part in parts if part not in longest]
    return replace(form, prefix="".join(f"{part}." for part in (*longest, *left)))


def _removed(name: list[str], key: list[str]) -> tuple[str, ...]:
    """Return the parts of a name in a file that its key lacks, in their order."""
    left = list(key)
    removed = []
    for part in reversed(name):
        if left and part == left[-1] and part not in _PRIVATE:
            left.pop()
        else:
            removed.append(part)
    return tuple(reversed(removed))


def _unwrapped_forms(one: Found, path: Path | str, target: Target | None) -> Iterator[Found]:
    counters = tuple(key for key in one.state if key in _BOOKKEEPING)
    bare = {key: value for key, value in one.state.items() if key not in counters}
    if "n_averaged" in counters and all("module" in key.split(".") for key in bare):
        # torch's AveragedModel counts, and its network is its child `module`.
        one = replace(one, average=True)
    if any(_PRIVATE.intersection(key.split(".")) for key in bare):
        one = _renamed(one, bare, without_private, path)
        bare = {key: value for key, value in one.state.items() if key not in counters}
    yield one
    prefix = one.prefix
    # A LightningModule's state dict is under this name.
    names = _WRAPPERS if target is not None or one.under == "state_dict" else frozenset({"module"})
    state, average, left = bare, one.average, one.left
    while True:
        firsts = {key.partition(".")[0] if "." in key else "" for key in state}
        if len(firsts) != 1 or not (firsts <= names):
            break
        first = next(iter(firsts))
        state = {key.removeprefix(f"{first}."): value for key, value in state.items()}
        prefix += f"{first}."
        average = average or first in _AVERAGES
        yield replace(one, state=state, prefix=prefix, average=average, left=left)
    if target is not None and len(firsts) > 1:
        whole = replace(one, state=state, prefix=prefix, average=average, left=left)
        yield from _parts(whole, path, target, counters={key: one.state[key] for key in counters})


def _parts(whole: Found, path: Path | str, target: Target, *, counters: Mapping[str, Tensor]) -> Iterator[Found]:
    """Yield the children of a module that holds the network beside others: a loss with weights, metrics, an average.

    Where one of them is the network, others that are it too make the choice ambiguous, whatever their names are: also
    the rest, if its keys have no prefix.
    """
    groups: dict[str, dict[str, Tensor]] = {}
    for key, value in whole.state.items():
        first, dot, inner = key.partition(".")
        groups.setdefault(first if dot else "", {})[inner if dot else key] = value
    names = sorted(groups.keys() - {""})
    networks = []
    for first in (name for name in names if name in _WRAPPERS):
        part = replace(
            whole,
            state=groups[first],
            prefix=f"{whole.prefix}{first}.",
            average=whole.average or first in _AVERAGES,
            left=(*whole.left, *(f"{whole.prefix}{name}" for name in names if name != first)),
        )
        forms = list(_unwrapped_forms(part, path, target))
        yield from forms
        if any(target.score(form.state.keys())[0] for form in forms):
            networks.append(first)
    if not networks:
        return
    for first in (name for name in names if name not in _WRAPPERS):
        average = whole.average or _says_average(first)
        prefix = f"{whole.prefix}{first}."
        yield replace(whole, state=groups[first], prefix=prefix, average=average, unusual=True)
    rest = {key: value for key, value in whole.state.items() if key.partition(".")[0] not in networks}
    left = (*whole.left, *(f"{whole.prefix}{name}" for name in networks))
    for own in (rest, {**rest, **counters}) if counters else (rest,):
        yield replace(whole, state=own, left=left)


def _renamed(one: Found, state: Mapping[str, Tensor], rename: Callable[[str], str], path: Path | str) -> Found:
    """Return a state dict with renamed keys; refuse two tensors of one name."""
    renamed: dict[str, Tensor] = {}
    removed: dict[str, None] = {}
    for key, value in state.items():
        name = rename(key)
        if name in renamed:
            raise WeightsError(
                f"{path}: holds two tensors for {shown(name)}, one of them as {shown(key)}; save it anew"
            )
        renamed[name] = value
        removed.update({f"{part}.": None for part in key.split(".") if part in _PRIVATE})
    kept = {key: value for key, value in one.state.items() if key not in state}
    return replace(one, state=renamed | kept, prefix=one.prefix + "".join(removed))


def _is_state(value: object) -> TypeGuard[Mapping[str, object]]:
    """Return whether a value is tensors by name; a module's extra state may be among them."""
    return (
        isinstance(value, Mapping)
        and any(isinstance(one, Tensor) for one in value.values())
        and all(isinstance(key, str) and (isinstance(one, Tensor) or _is_extra(key)) for key, one in value.items())
    )


def _is_extra(key: object) -> bool:
    return isinstance(key, str) and key.rpartition(".")[2] == "_extra_state"


def _no_state_dict(loaded: object) -> str:
    """Say why a file holds no state dict, and what it does hold."""
    if not isinstance(loaded, Mapping):
        return f"has no state dict (tensors by name), but a {type(loaded).__name__}; save model.state_dict()"
    says = (
        f"has no state dict (tensors by name) at the top level or under {', '.join(_PLAIN[:2])} or another usual name"
    )
    inner = [str(key) for key, value in loaded.items() if isinstance(value, Mapping) and _is_state(value)]
    if inner:
        return f"{says}; there are tensors under {some(inner)}: save one of these alone"
    holds = f", but {units.counted(len(loaded), 'key')}: {some([str(key) for key in loaded])}" if loaded else ""
    says = f"{says}{holds}; save model.state_dict()"
    for name, part in (("", loaded), *((f"{key}.", value) for key, value in loaded.items())):
        odd = [] if not isinstance(part, Mapping) else [key for key in part if not isinstance(part[key], Tensor)]
        dotted = isinstance(part, Mapping) and any(isinstance(part[key], Tensor) and "." in str(key) for key in part)
        if odd and dotted and isinstance(part, Mapping):
            kind = type(part[odd[0]]).__name__
            return (
                f"{name}{shown(str(odd[0]))}: is of type {kind}, not a tensor, among tensors; if the network is "
                "quantised, save the state dict of the one before"
            )
    return says


def _check_plain(path: Path, key: str, value: Tensor) -> None:
    plain = type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided
    if not plain or value.is_quantized or value.device.type != "cpu":
        raise WeightsError(
            f"{path}: {shown(key)}: is not a plain tensor (sparse, quantised or without data); save a dense one"
        )


# -------------------------------------------------------------------------------------------------------------- reading
def check_readable(path: Path) -> None:
    """Check that a file can be opened and has the suffix of a file of weights.

    Raises:
        WeightsError: it has not, or it cannot.
    """
    if not path.suffix and not path.exists():
        raise WeightsError(f"{path}: cannot be read: there is no such file; name a file of weights")
    if path.suffix != ".safetensors" and path.suffix not in _PICKLES:
        raise WeightsError(
            f"{path}: cannot be read: allowed are .safetensors, .pt, .pth, .pth.tar, .ckpt and .bin files"
        )
    if path.exists() and not path.is_file():
        raise WeightsError(f"{path}: cannot be read: not a regular file; name a file of weights")
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
