"""Check what a training resumes from, before anything of it is used: the progress, and every tensor.

The file is untrusted: a momentum buffer of another shape would be read and written past its end by a fused optimizer,
and a wrong sum or a missing buffer would become a wrong result.
"""

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from selab import units
from selab.training.recipe import Recipe, lr_at
from selab.training.record import mistaken_accuracy, mistaken_end, mistaken_epochs
from selab.training.run import Checkpoint

if TYPE_CHECKING:
    from selab.training.data import Data

# Of a group of parameters: set before every step.
_SET = ("lr", "params")
_SCALER = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")
_PARTS = ("model", "optimizer", "scaler", "average")


def mistaken_progress(found: Checkpoint, recipe: Recipe, data: "Data") -> Iterator[str]:
    """Yield what is impossible in a checkpoint's progress: field and reason.

    Args:
        found: the checkpoint, of the right types.
        recipe: as run.
        data: what is trained and tested on.
    """
    steps = data.train_size // recipe.batch
    if not 0 <= found.epoch <= recipe.epochs:
        yield f"epoch: is {found.epoch}, expected 0 to {recipe.epochs}"
        return
    last = steps - 1 if found.epoch < recipe.epochs else 0
    if not 0 <= found.step <= last:
        yield f"step: is {found.step}, expected 0 to {last} in epoch {found.epoch}"
        return
    for name in ("epoch_s", "seconds"):
        if not 0 <= getattr(found, name) < math.inf:
            yield f"{name}: is {getattr(found, name)!r}, expected a finite number, not negative"
    yield from _mistaken_sums(found, recipe)
    if len(found.epochs) != found.epoch:
        yield f"epochs: are {len(found.epochs)}, in epoch {found.epoch}"
    yield from mistaken_epochs(found.epochs, recipe, data)
    for index, epoch in enumerate(found.epochs):
        lr = lr_at(recipe, index + (steps - 1) / steps)
        if not math.isclose(epoch.lr, lr, rel_tol=1e-6, abs_tol=1e-12):
            yield f"epochs[{index}].lr: is {epoch.lr!r}, the recipe gives {lr!r}"
    if (found.test is None) != (found.epoch == 0):
        yield f"test: is {'missing' if found.test is None else 'there'} in epoch {found.epoch}"
    if found.test is not None:
        yield from (f"test.{wrong}" for wrong in mistaken_accuracy(found.test, data))
        yield from mistaken_end(found.epochs, found.test)


def _mistaken_sums(found: Checkpoint, recipe: Recipe) -> Iterator[str]:
    """Yield what is impossible in the sums of the running epoch: of losses and of right answers, by rank."""
    if not 1 <= len(found.sums) <= recipe.batch:
        yield f"sums: are of {units.counted(len(found.sums), 'process', 'processes')}, expected 1 to {recipe.batch}"
        return
    if not all(0 <= loss < math.inf for loss, _ in found.sums):
        yield f"sums: {found.sums}; losses are finite and not negative"
    images = found.step * recipe.batch
    right = [count for _, count in found.sums]
    if not all(0 <= count <= images and count == int(count) for count in right) or sum(right) > images:
        yield f"sums: {found.sums}; right answers are whole numbers, together at most {images} after step {found.step}"
    if not found.step and any(any(pair) for pair in found.sums):
        yield f"sums: {found.sums}; they are 0 at the start of an epoch"


# -------------------------------------------------------------------------------------------------------------- tensors
def mistaken_tensors(
    found: object,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: "torch.amp.GradScaler",
    average: Mapping[str, Tensor] | None,
) -> Iterator[str]:
    """Yield what does not fit in a checkpoint's tensors: where and why.

    Args:
        found: the tensors of the file.
        model: the network with its initial weights: a parameter without optimizer state must still have them.
        optimizer: of its parameters, before the first step.
        scaler: of the losses.
        average: the moving average of the weights; None if the recipe has none.
    """
    if not isinstance(found, dict) or set(found) != set(_PARTS):
        yield f"tensors: are {_kind(found)}, expected a dictionary of {', '.join(_PARTS)}"
        return
    yield from _mistaken_state(found["model"], model.state_dict(), "model")
    if average is None and found["average"] is not None:
        yield "average: is there, the recipe has none"
    elif average is not None:
        yield from _mistaken_state(found["average"], average, "average")
    yield from _mistaken_scaler(found["scaler"], scaler.state_dict())
    yield from _mistaken_optimizer(found["optimizer"], found["model"], model, optimizer)


def _mistaken_state(found: object, expected: Mapping[str, Tensor], where: str) -> Iterator[str]:
    if not isinstance(found, dict) or set(found) != set(expected):
        keys = found if isinstance(found, dict) else {}
        differing = sorted(str(key) for key in set(keys) ^ set(expected))[:5]
        yield f"{where}: does not have the network's keys ({', '.join(differing) or _kind(found)})"
        return
    for key, value in expected.items():
        yield from _mistaken_tensor(found[key], value, f"{where}.{key}")
        never_negative = key.rpartition(".")[2] in ("running_var", "num_batches_tracked")
        if never_negative and _is_dense(found[key]) and (found[key] < 0).any():
            yield f"{where}.{key}: is negative"


def _mistaken_tensor(found: object, expected: Tensor, where: str) -> Iterator[str]:
    if not isinstance(found, Tensor):
        yield f"{where}: is {_kind(found)}, expected a tensor"
    elif not _is_dense(found):
        yield f"{where}: is sparse, quantised or without data, expected a dense tensor"
    elif (found.shape, found.dtype) != (expected.shape, expected.dtype):
        yield (
            f"{where}: is {_type(found)} of shape {tuple(found.shape)}, expected {_type(expected)} of shape "
            f"{tuple(expected.shape)}"
        )
    elif not found.isfinite().all():
        yield f"{where}: holds NaN or infinite values"


def _mistaken_scaler(found: object, expected: Mapping[str, Any]) -> Iterator[str]:
    if not isinstance(found, dict) or set(found) != set(expected):
        yield f"scaler: has {_kind(found)}, expected {', '.join(_SCALER) if expected else 'nothing, without fp16'}"
        return
    if not expected:
        return
    if not isinstance(found["scale"], float) or not 0 < found["scale"] < math.inf:
        yield f"scaler.scale: is {_shown(found['scale'])}, expected a finite number above 0"
    for name in _SCALER[1:4]:
        if type(found[name]) is not type(expected[name]) or found[name] != expected[name]:
            yield f"scaler.{name}: is {_shown(found[name])}, expected {expected[name]!r}"
    tracker = found["_growth_tracker"]
    if type(tracker) is not int or not 0 <= tracker <= expected["growth_interval"]:
        yield f"scaler._growth_tracker: is {_shown(tracker)}, expected 0 to {expected['growth_interval']}"


def _mistaken_optimizer(
    found: object, weights: object, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Iterator[str]:
    expected = optimizer.state_dict()
    if not isinstance(found, dict) or set(found) != {"state", "param_groups"}:
        yield f"optimizer: is {_kind(found)}, expected a dictionary of state and param_groups"
        return
    yield from _mistaken_groups(found["param_groups"], expected["param_groups"])
    parameters = parameters_of(optimizer)
    state = found["state"]
    if not isinstance(state, dict) or not all(type(key) is int and key in range(len(parameters)) for key in state):
        yield f"optimizer.state: is {_kind(state)}, expected a dictionary of parameters 0 to {len(parameters) - 1}"
        return
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for index, parameter in enumerate(parameters):
        name = names[id(parameter)]
        if index in state:
            yield from _mistaken_entry(state[index], parameter, optimizer, f"optimizer.state[{index}] ({name})")
        elif _moved(weights, name, parameter):
            yield f"optimizer.state: lacks {index} ({name}), which has been trained"


def _moved(weights: object, name: str, initial: Tensor) -> bool:
    """Return whether a parameter of the checkpoint differs from its initial value: then it has had gradients."""
    value = weights.get(name) if isinstance(weights, dict) else None
    return _is_dense(value) and value.shape == initial.shape and not torch.equal(value, initial.detach().cpu())


def _mistaken_groups(found: object, expected: list[dict[str, Any]]) -> Iterator[str]:
    if not isinstance(found, list) or len(found) != len(expected):
        yield f"optimizer.param_groups: is {_kind(found)}, expected a list of {len(expected)}"
        return
    for index, (theirs, ours) in enumerate(zip(found, expected, strict=True)):
        where = f"optimizer.param_groups[{index}]"
        if not isinstance(theirs, dict) or not set(_SET) <= set(theirs):
            yield f"{where}: is {_kind(theirs)}, expected a dictionary with lr and params"
            continue
        if type(theirs["lr"]) not in (int, float) or not 0 <= theirs["lr"] < math.inf:
            yield f"{where}.lr: is {_shown(theirs['lr'])}, expected a finite number, not negative"
        # Versions of torch differ in the keys that they write; ours are used in any case.
        for name in [name for name in ours if name in theirs and name != "lr"]:
            # Compared as text too: True is not 1.
            if theirs[name] != ours[name] or repr(theirs[name]) != repr(ours[name]):
                yield f"{where}.{name}: is {_shown(theirs[name])}, expected {_shown(ours[name])}"


def _mistaken_entry(found: object, parameter: Tensor, optimizer: torch.optim.Optimizer, where: str) -> Iterator[str]:
    group = next(group for group in optimizer.param_groups if any(one is parameter for one in group["params"]))
    if isinstance(optimizer, torch.optim.RMSprop):
        names = {"step", "square_avg", *(("momentum_buffer",) if group["momentum"] else ())}
        optional = {"momentum_buffer", "grad_avg"}
    elif isinstance(optimizer, torch.optim.Adam):
        names, optional = {"step", "exp_avg", "exp_avg_sq"}, {"max_exp_avg_sq"}
    else:
        names, optional = ({"momentum_buffer"} if group["momentum"] else set()), {"momentum_buffer"}
    if not isinstance(found, dict) or not names <= set(found) <= names | optional:
        yield f"{where}: has {_kind(found)}, expected {', '.join(sorted(names)) or 'nothing'}"
        return
    for name, value in found.items():
        if name in names and name != "step":
            yield from _mistaken_tensor(value, parameter, f"{where}.{name}")
        elif name not in names and value is not None:
            yield f"{where}.{name}: is {_kind(value)}, expected None"
    for name in names & {"square_avg", "exp_avg_sq"}:
        if _is_dense(found[name]) and (found[name] < 0).any():
            yield f"{where}.{name}: is negative"
    if "step" in names:
        step = found["step"]
        yield from _mistaken_tensor(step, torch.zeros(()), f"{where}.step")
        if _is_dense(step) and step.shape == () and not step >= 0:
            yield f"{where}.step: is negative"


# ---------------------------------------------------------------------------------------------------------------- using
def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return an optimizer's parameters in the order of its state dict."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def optimizer_state(found: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return a checked state dict for an optimizer: with its own groups, and buffers that lie in memory as parameters.

    A buffer of a file may overlap itself or another one, which a fused optimizer does not expect.
    """
    state: dict[int, dict[str, Any]] = {}
    for index, parameter in enumerate(parameters_of(optimizer)):
        entry = found["state"].get(index)
        if entry is not None:
            state[index] = {name: _own(name, value, parameter) for name, value in entry.items()}
    return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}


def _own(name: str, value: Tensor | None, parameter: Tensor) -> Tensor | None:
    if value is None or name == "step":
        return None if value is None else value.clone()
    return torch.empty_like(parameter.detach(), memory_format=torch.preserve_format).copy_(value)


def _is_dense(value: object) -> TypeGuard[Tensor]:
    return (
        type(value) in (Tensor, nn.Parameter)
        and value.layout == torch.strided  # type: ignore[attr-defined]
        and not value.is_quantized  # type: ignore[attr-defined]
        and value.device.type == "cpu"  # type: ignore[attr-defined]
    )


def _type(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _kind(value: object) -> str:
    if isinstance(value, dict):
        keys = ", ".join(str(key)[:40] for key in list(value)[:6])
        return f"a dictionary of {keys or 'nothing'}"
    return f"a list of {len(value)}" if isinstance(value, list) else f"a value of type {type(value).__name__}"


def _shown(value: object) -> str:
    text = repr(value).partition("\n")[0]
    return text if len(text) <= 60 else f"{text[:60]}…"
