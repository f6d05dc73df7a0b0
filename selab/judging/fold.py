"""Fold a gate that is a constant into the weights before or behind its block.

A constant factor per channel is linear: it goes through whatever treats channels alike and alone (pooling, dropout;
a ReLU where no factor is negative), and ends in the scale of a batch normalisation, in the output channels of a
convolution, or in the input channels of the next one. The network is followed in its exported program: any network can
be folded whose forward pass can be exported.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import Node

from selab.attention.insert import take_out
from selab.errors import ModelError
from selab.meta import evaluating, first_line

Way = Literal["scale", "output channels", "input channels"]
_aten = torch.ops.aten
# Positively homogeneous, channel by channel: f(s x) = s f(x) for s >= 0.
_POSITIVE = {_aten.relu.default, _aten.relu_.default, _aten.leaky_relu.default, _aten.leaky_relu_.default}
_POSITIVE |= {_aten.max_pool2d.default, _aten.adaptive_max_pool2d.default}
# Linear, channel by channel.
_LINEAR = {_aten.dropout.default, _aten.feature_dropout.default, _aten.alias.default, _aten.clone.default}
_LINEAR |= {_aten.contiguous.default, _aten.avg_pool2d.default, _aten.adaptive_avg_pool2d.default}
_LINEAR |= {_aten.upsample_nearest2d.vec}
_CONVOLUTIONS = {_aten.conv2d.default, _aten.conv2d.padding}
_NORMS = {_aten.batch_norm.default}


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the factors of a block go.

    Attributes:
        way: into what.
        weight: the parameter's name.
        bias: the name of the one that is scaled too; empty for none.
        groups: of the convolution.
        needs_positive: whether a ReLU or a maximum stands between, so that no factor may be negative.
        maker: the weight of the convolution that makes the map; empty where several make it.
    """

    way: Way
    weight: str
    bias: str = ""
    groups: int = 1
    needs_positive: bool = False
    maker: str = ""

    @property
    def words(self) -> str:
        """Where, in words: `scale of layer1.0.bn3`."""
        return f"{self.way} of {self.weight.rpartition('.')[0]}"


def places(model: nn.Module, paths: Iterable[str], example: Tensor) -> dict[str, Place | str]:
    """Return where the factors of each block could go, or why they cannot be folded.

    Args:
        model: any network; not changed.
        paths: of blocks that multiply their input by one factor per channel.
        example: an input, (N, C, H, W).

    Raises:
        ModelError: the forward pass cannot be exported.
    """
    program = _Program(model, example)
    return {path: program.place_of(path) for path in paths}


def fold(
    model: nn.Module, constants: Mapping[str, Tensor], example: Tensor
) -> tuple[nn.Module, dict[str, Place | str]]:
    """Return a copy of a network whose blocks are constants in other weights, and where each of them went.

    Args:
        model: left unchanged.
        constants: path of a block → its factors, (C).
        example: an input, (N, C, H, W).

    Returns:
        The copy, and for each path the place, or why the block stays as it is.

    Raises:
        ModelError: the forward pass cannot be exported.
    """
    model = copy.deepcopy(model)
    found: dict[str, Place | str] = {}
    left = dict(constants)
    while left:
        now = places(model, left, example)
        done = False
        for path, place in now.items():
            found[path] = place
            if isinstance(place, str):
                continue
            if place.needs_positive and bool((left[path] < 0).any()):
                found[path] = "a factor is negative, and a ReLU or a maximum stands between"
                continue
            _scale(model, place, left.pop(path))
            take_out(model, path)
            done = True
        if not done:
            break
        # A block that stood between another one and its place is gone now.
    return model, {path: found[path] for path in constants}


class _Program:
    """The exported program of a network, with the names of its parameters."""

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        with evaluating(model):
            try:
                exported = torch.export.export(model, (example,), strict=False)
            except Exception as error:
                raise ModelError(
                    f"{type(model).__name__}: cannot be followed, because its forward pass cannot be exported: "
                    f"{first_line(error)}"
                ) from error
        self.names: Mapping[str, str] = exported.graph_signature.inputs_to_parameters
        self.nodes = list(exported.graph.nodes)
        state = [*exported.graph_signature.inputs_to_parameters, *exported.graph_signature.inputs_to_buffers]
        self.state = {node for node in self.nodes if node.name in set(state)}

    def place_of(self, path: str) -> Place | str:
        """Return where the factors of a block could go, or why they cannot be folded."""
        inside = [node for node in self.nodes if node.op == "call_function" and _is_in(node, path)]
        if not inside:
            return "it does not run"
        members = set(inside)
        given = {one for node in inside for one in node.all_input_nodes if one not in members and one not in self.state}
        returned = [node for node in inside if set(node.users) - members]
        if len(given) != 1 or len(returned) != 1:
            return "it does not run exactly once, from one input to one output"
        (map_in,) = given
        before, maker = self._before(map_in, members), self._maker(map_in)
        if isinstance(before, Place):
            # A ReLU that the block took over stands between its factors and what is before it.
            own = any(node.target in _POSITIVE for node in _on_the_map(inside))
            return replace(before, needs_positive=before.needs_positive or own, maker=maker)
        behind = self._behind(returned[0])
        if isinstance(behind, Place):
            return replace(behind, maker=maker)
        return f"{before}; {behind}"

    def _before(self, node: Node, readers: set[Node]) -> Place | str:
        positive = False
        while True:
            if set(node.users) - readers:
                return "its input is read elsewhere too"
            if node.op != "call_function":
                return "its input is the network's own"
            if node.target in _NORMS:
                return self._place("scale", node.args[1], node.args[2], positive=positive)
            if node.target in _CONVOLUTIONS:
                bias = node.args[2] if len(node.args) > 2 else None
                return self._place("output channels", node.args[1], bias, positive=positive)
            if node.target not in _POSITIVE | _LINEAR:
                return f"{_named(node)} stands before it"
            positive |= node.target in _POSITIVE
            readers, node = {node}, node.all_input_nodes[0]

    def _maker(self, node: Node) -> str:
        """Return the weight's name of the convolution that a map comes from; empty if it comes from several."""
        while node.op == "call_function" and node.target not in _CONVOLUTIONS:
            given = [one for one in node.all_input_nodes if one not in self.state]
            if len(given) != 1:
                return ""
            (node,) = given
        return self.names.get(getattr(node.args[1], "name", ""), "") if node.op == "call_function" else ""

    def _behind(self, node: Node) -> Place | str:
        positive = False
        while True:
            users = list(node.users)
            if len(users) != 1 or users[0].op != "call_function" or users[0].args[0] is not node:
                return "its output does not go into one convolution alone"
            (user,) = users
            if user.target in _CONVOLUTIONS:
                groups: Any = user.args[6] if len(user.args) > 6 else 1
                return self._place("input channels", user.args[1], None, positive=positive, groups=groups)
            if user.target not in _POSITIVE | _LINEAR:
                return f"{_named(user)} stands behind it"
            positive |= user.target in _POSITIVE
            node = user

    def _place(self, way: Way, weight: Any, bias: Any, *, positive: bool, groups: int = 1) -> Place | str:
        names = []
        for one in (weight, bias):
            if one is None:
                names.append("")
                continue
            name = self.names.get(getattr(one, "name", ""), "")
            if not name:
                return "the weights that would take its factors are computed"
            if len(one.users) != 1:
                return f"{name} is used more than once"
            names.append(name)
        if not names[0]:
            return "the batch normalisation has no scale"
        return Place(way=way, weight=names[0], bias=names[1], groups=groups, needs_positive=positive)


def _is_in(node: Node, path: str) -> bool:
    stack = node.meta.get("nn_module_stack") or {}
    return any(where == path or where.endswith(f".{path}") for where, _ in stack.values())


def _on_the_map(inside: list[Node]) -> list[Node]:
    """Return the operators of a block that return a map, and not one value a channel."""
    found = []
    for node in inside:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.dim() == 4 and value.shape[2] * value.shape[3] > 1:
            found.append(node)
    return found


def _named(node: Node) -> str:
    return str(getattr(node.target, "__name__", node.target)).partition(".")[0]


def _scale(model: nn.Module, place: Place, factors: Tensor) -> None:
    with torch.no_grad():
        weight = model.get_parameter(place.weight)
        factors = factors.to(weight)
        if place.way == "input channels":
            groups = place.groups
            parts = weight.view(groups, weight.shape[0] // groups, *weight.shape[1:])
            parts.mul_(factors.view(groups, 1, -1, 1, 1))
            return
        weight.mul_(factors.view(-1, *[1] * (weight.dim() - 1)))
        if place.bias:
            model.get_parameter(place.bias).mul_(factors)
