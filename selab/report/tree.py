"""The module tree of a network, with the blocks that are, or could be, at each module."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import msgspec
from rich.text import Text
from rich.tree import Tree
from torch import nn

from selab import units
from selab.attention.auto_sites import BlockEnd
from selab.attention.gated_site import named_children, named_sites, sites_own
from selab.meta import Example, On, Passage, passages
from selab.records.types import Insertion


@dataclass(frozen=True, kw_only=True)
class _Node:
    """One module of the tree; `name` is the only thing in which folded neighbours may differ.

    Attributes:
        has_weights: whether it is a layer that multiplies by a matrix; a normalisation is not.
    """

    name: str
    kind: str
    shape: str
    marks: tuple[str, ...]
    insertion: str
    has_weights: bool
    children: tuple["_Node", ...]

    @property
    def is_plain(self) -> bool:
        """Whether it is a layer without children, marks or blocks."""
        return not (self.children or self.marks or self.insertion)

    @property
    def follows(self) -> bool:
        """Whether it may share the line of the layer before it."""
        return self.is_plain and not self.has_weights

    def looks(self) -> tuple[object, ...]:
        """Everything but the name."""
        below = tuple((child.name, child.looks()) for child in self.children)
        return self.kind, self.shape, self.marks, self.insertion, below


@dataclass(frozen=True, kw_only=True)
class _Marks:
    """What is said about modules, by path."""

    insertions: Mapping[str, Insertion]
    ends: Mapping[str, BlockEnd]
    groups: Mapping[str, tuple[str, ...]]
    seen: Mapping[str, Passage]


def site_tree(
    model: nn.Module,
    insertions: Sequence[Insertion] = (),
    *,
    ends: Sequence[BlockEnd] = (),
    groups: Mapping[str, Sequence[str]] | None = None,
    input_nchw: Example | None = None,
    depth: int | None = None,
    on: On = "fake",
) -> Tree:
    """Return the module tree; equal neighbours are folded into one line.

    Args:
        model: the network.
        insertions: what is, or would be, inserted.
        ends: the block ends that tracing found; they are marked `auto`.
        groups: the site groups that the network declares, name → paths.
        input_nchw: the shape of an example input; without it no output shapes are shown.
        depth: levels of modules to show; None for all of them.
        on: `cpu` to run the kernels on a copy with real tensors.

    Raises:
        ModelError: the forward pass fails with this input.
    """
    root = _node("", model, type(model).__name__, _marks(model, insertions, ends, groups, input_nchw, on))
    tree = Tree(_line(root, root.name), guide_style="dim")
    _hang(tree, root, depth)
    return tree


def sites_as_builtins(
    model: nn.Module,
    insertions: Sequence[Insertion] = (),
    *,
    ends: Sequence[BlockEnd] = (),
    groups: Mapping[str, Sequence[str]] | None = None,
    input_nchw: Example | None = None,
    on: On = "fake",
) -> list[dict[str, Any]]:
    """Return every module with what `site_tree` shows of it, for `--json`; nothing is folded.

    Raises:
        ModelError: the forward pass fails with this input.
    """
    marks = _marks(model, insertions, ends, groups, input_nchw, on)
    listed = []
    for path, module in named_sites(model):
        if not path:
            continue
        passage = marks.seen.get(path)
        listed.append(
            {
                "path": path,
                "type": type(sites_own(module)).__name__,
                "output_shape": None if passage is None else passage.output_shape,
                "calls": None if passage is None else passage.calls,
                "groups": list(marks.groups.get(path, ())),
                "auto": marks.ends[path].reason if path in marks.ends else None,
                "insertion": msgspec.to_builtins(marks.insertions.get(path)),
            }
        )
    return listed


def _marks(
    model: nn.Module,
    insertions: Sequence[Insertion],
    ends: Sequence[BlockEnd],
    groups: Mapping[str, Sequence[str]] | None,
    input_nchw: Example | None,
    on: On,
) -> _Marks:
    member_of: dict[str, tuple[str, ...]] = {}
    for name, paths in (groups or {}).items():
        for path in paths:
            member_of[path] = (*member_of.get(path, ()), name)
    every = [path for path, _ in named_sites(model)]
    return _Marks(
        insertions={one.path: one for one in insertions},
        ends={end.path: end for end in ends},
        groups=member_of,
        seen={} if input_nchw is None else passages(model, every, input_nchw, on=on),
    )


# --------------------------------------------------------------------------------------------------------------- lines
def _node(path: str, module: nn.Module, name: str, marks: _Marks) -> _Node:
    prefix = f"{path}." if path else ""
    passage = marks.seen.get(path)
    own = sites_own(module)
    is_list = isinstance(own, (nn.ModuleList, nn.ModuleDict))
    shape = "(container)" if is_list and passage is not None and passage.calls == 0 else _shape(passage)
    return _Node(
        name=name,
        kind=_kind(own) if path else "",
        shape=shape,
        marks=(*marks.groups.get(path, ()), *(("auto",) if path in marks.ends else ())),
        insertion=_inserted(marks.insertions[path], shape) if path in marks.insertions else "",
        has_weights=any(parameter.dim() > 1 for parameter in own.parameters(recurse=False)),
        children=tuple(_node(f"{prefix}{key}", child, key, marks) for key, child in named_children(module)),
    )


def _kind(module: nn.Module) -> str:
    """Return the class of a module, and for a layer its widths: `Conv2d 64→256 3×3 /2`."""
    kind = type(module).__name__
    if isinstance(module, nn.Linear):
        return f"{kind} {module.in_features}→{module.out_features}"
    if not isinstance(module, nn.Conv2d):
        return kind
    text = f"{kind} {module.in_channels}→{module.out_channels} {'×'.join(map(str, module.kernel_size))}"
    if max(module.stride) > 1:
        text += f" /{max(module.stride)}"
    if module.groups == module.in_channels > 1:
        return f"{text} depthwise"
    return text if module.groups == 1 else f"{text}, {units.counted(module.groups, 'group')}"


def _shape(passage: Passage | None) -> str:
    """Return `256×56×56`, of one image; or how often a module runs that does not run once."""
    if passage is None:
        return ""
    if passage.calls != 1:
        return "does not run" if passage.calls == 0 else f"runs {passage.calls} times"
    return passage.output_kind if passage.output_shape is None else "×".join(map(str, passage.output_shape[1:]))


def _inserted(one: Insertion, shape: str) -> str:
    """Return `SE 256→16 on 56×56, 8,464 params`; without the map where the line has it already."""
    width = f"{one.channels}" if one.squeeze_channels is None else f"{one.channels}→{one.squeeze_channels}"
    place = "" if one.placement == "standard" else f" {one.placement},"
    on = "" if shape == f"{one.channels}×{one.height}×{one.width}" else f" on {one.height}×{one.width}"
    return f"{one.block.upper()}{place} {width}{on}, {units.exact(one.params)} params"


def _hang(tree: Tree, node: _Node, depth: int | None) -> None:
    if depth == 0:
        return
    below = None if depth is None else depth - 1
    for run in _runs(node.children):
        first, last = run[0], run[-1]
        if all(one.looks() == first.looks() for one in run):
            name = first.name if first is last else f"{first.name} … {last.name} ({len(run)} times the same)"
            _hang(tree.add(_line(first, name)), first, below)
        else:
            tree.add(_chain(run))


def _runs(children: Sequence[_Node]) -> list[list[_Node]]:
    """Return groups of neighbours that share a line: equal ones, and a layer with what follows it without weights."""
    runs: list[list[_Node]] = []
    for _, alike in groupby(children, key=_Node.looks):
        run = list(alike)
        if len(run) == 1 and runs and run[0].follows and runs[-1][-1].is_plain and run[0].shape == runs[-1][-1].shape:
            runs[-1].append(run[0])
        else:
            runs.append(run)
    return runs


def _line(node: _Node, name: str) -> Text:
    marks = " ".join(f"[{mark}]" for mark in node.marks)
    inserted = f"← {node.insertion}" if node.insertion else ""
    return _joined((name, "bold"), (node.kind, ""), (node.shape, "dim"), (marks, "cyan"), (inserted, "bold green"))


def _chain(nodes: Sequence[_Node]) -> Text:
    """Return `conv1  Conv2d 64→64 1×1, bn1  BatchNorm2d, relu1  ReLU  64×56×56`."""
    links = [_joined((node.name, "bold"), (node.kind, "")) for node in nodes]
    return Text("  ").join([Text(", ").join(links), Text(nodes[0].shape, style="dim")])


def _joined(*parts: tuple[str, str]) -> Text:
    return Text("  ").join(Text(text, style=style) for text, style in parts if text)
