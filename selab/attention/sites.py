"""Sites of attention blocks: site groups that a network declares, module-path patterns, and taps.

A *site* is a module. A *tap* is the tensor at the site that SE reads and scales: an output or an input of a module. In
a residual block (children `branch`, `shortcut` and a `join` without parameters) the placement chooses one of the
block's tensors. At any other module the tap is the module's own output or input.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import nn

from selab.attention.base import Attention
from selab.attention.config import Placement
from selab.attention.gated_site import named_sites
from selab.attention.se import GatedJoin
from selab.errors import InsertionError, nearest

Side = Literal["input", "output"]


@dataclass(frozen=True, kw_only=True)
class Tap:
    """The tensor that one block gates.

    Attributes:
        site: the path of the site.
        module: the path of the module whose input or output is gated.
        side: which of the two.
        block: the path of the module whose input is the `block_input` of `squeeze_from`.
        edge: for a residual block's join, the edge that is gated; empty otherwise.
    """

    site: str
    module: str
    side: Side
    block: str
    edge: Literal["", "branch", "shortcut", "output"] = ""


def declared_groups(model: nn.Module) -> dict[str, list[str]]:
    """Return the site groups that a network declares by a method `site_groups`; empty without that method."""
    declare = getattr(model, "site_groups", None)
    return dict(declare()) if callable(declare) else {}


def is_residual_block(module: nn.Module) -> bool:
    """Return whether a module has children branch, shortcut, and a join without parameters of its own."""
    children = dict(module.named_children())
    if not {"branch", "shortcut", "join"} <= children.keys():
        return False
    join = children["join"]
    return isinstance(join, GatedJoin) or next(join.parameters(), None) is None


def find_sites(model: nn.Module, sites: str | Sequence[str]) -> list[str]:
    """Return the paths that a site group or patterns match, in the order of the network.

    Args:
        model: any module.
        sites: the name of a declared group, one pattern, or several. In a pattern `*` matches within one name and `**`
            across names: `layer*.*.bn3`, `features.**.conv`.

    Raises:
        InsertionError: no site, or a pattern that matches nothing.
    """
    groups = declared_groups(model)
    if isinstance(sites, str) and sites in groups:
        found = groups[sites]
        if not found:
            raise InsertionError(f"{type(model).__name__}: its site group {sites!r} is empty; no site found")
        return list(found)
    patterns = [sites] if isinstance(sites, str) else list(sites)
    for pattern in patterns:
        _check_pattern(pattern)
    if not patterns:
        raise InsertionError(f"{type(model).__name__}: no site found: no pattern was given{_offer(groups)}")
    # The root has an empty path and no parent, so it cannot be a site.
    every = [path for path, _ in named_sites(model, shared=True) if path]
    paths = [path for path in every if not _in_se(model, path)]
    chosen: set[str] = set()
    for pattern in patterns:
        matching = [path for path in paths if matches(pattern, path)]
        if not matching:
            inside = [path for path in every if matches(pattern, path)]
            if inside:
                raise InsertionError(f"{inside[0]}: is inside another SE block; choose a site outside of it")
            offer = _offer(groups) + _of_that_name(pattern, paths)
            raise InsertionError(f"pattern {pattern!r} matches no module of {type(model).__name__}{offer}")
        chosen.update(matching)
    return [path for path in paths if path in chosen]


def _of_that_name(pattern: str, paths: Sequence[str]) -> str:
    """Return similar paths, or modules whose own name matches the end of the pattern, for a message."""
    near = nearest(pattern, paths)
    if near.startswith("; did you mean"):
        return near
    last = pattern.rpartition(".")[2]
    named = [path for path in paths if fnmatchcase(path.rpartition(".")[2], last)] if last.strip("*") else []
    if not named:
        return near
    shown = ", ".join(named[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")
    return f"; modules of that name: {shown}"


def _check_pattern(pattern: str) -> None:
    """Raise InsertionError, with the position, for text that cannot match any path."""
    position = 1
    for name in pattern.split("."):
        problem = ""
        if not name:
            problem = "a name is missing here"
        elif "**" in name and name != "**":
            problem, position = "** must be alone between dots; * matches within a name", position + name.index("**")
        elif (at := re.search(r"[^\w*?\[\]!+-]", name)) is not None:
            problem, position = f"{at[0]!r} cannot be part of a module's path", position + at.start()
        elif name.count("[") != name.count("]"):
            problem, position = "[ without ]", position + max(name.rfind("["), name.rfind("]"))
        if problem:
            raise InsertionError(
                f"pattern {pattern!r}: character {position}: {problem}; a pattern is names with dots between, such as "
                "layer*.*.bn3 or features.**.conv"
            )
        position += len(name) + 1


def in_stages(sites: Sequence[str], stages: Collection[int]) -> list[str]:
    """Return the sites below modules named `stage<N>`.

    Raises:
        InsertionError: a stage without any of the sites; the message lists the stages that have some.
    """
    of = {site: next((int(name[5:]) for name in site.split(".") if _STAGE.fullmatch(name)), None) for site in sites}
    there = sorted({stage for stage in of.values() if stage is not None})
    for stage in stages:
        if stage not in there:
            has = f"sites are in stages {', '.join(map(str, there))}" if there else "no site is in a module stage<N>"
            raise InsertionError(f"stages: {stage}: {has}; choose among those, or name the sites by patterns")
    return [site for site, stage in of.items() if stage in stages]


_STAGE = re.compile(r"stage\d+")


def _offer(groups: dict[str, list[str]]) -> str:
    return f"; site groups: {', '.join(groups)}" if groups else ""


def matches(pattern: str, path: str) -> bool:
    """Return whether a pattern matches a module's path: `*` within a name, `**` across names."""
    return _match_names(pattern.split("."), path.split("."))


def _match_names(patterns: list[str], names: list[str]) -> bool:
    if not patterns:
        return not names
    if patterns[0] == "**":
        return any(_match_names(patterns[1:], names[start:]) for start in range(len(names) + 1))
    return bool(names) and fnmatchcase(names[0], patterns[0]) and _match_names(patterns[1:], names[1:])


def _in_se(model: nn.Module, path: str) -> bool:
    """Return whether a path is an SE block or inside of one."""
    module: Any = model
    for name in path.split("."):
        module = getattr(module, name)
        if isinstance(module, Attention):
            return True
    return False


def tap_for(model: nn.Module, site: str, placement: Placement) -> Tap:
    """Return the tensor that a placement gates at a site.

    Raises:
        InsertionError: the placement needs a residual block, or a block that names its 3x3 convolution.
    """
    module = model.get_submodule(site)
    if is_residual_block(module):
        return _residual_tap(module, site, placement)
    if placement in ("identity", "3x3"):
        raise InsertionError(
            f"{site}: placement {placement!r} needs a residual block (children branch, shortcut, join), and "
            f"{type(module).__name__} is not one; use 'standard' (its output) or 'pre' (its input), or a pattern that "
            "names the module itself"
        )
    return Tap(site=site, module=site, side="input" if placement == "pre" else "output", block=site.rpartition(".")[0])


def _residual_tap(block: nn.Module, site: str, placement: Placement) -> Tap:
    match placement:
        case "standard":
            return Tap(site=site, module=f"{site}.branch", side="output", block=site, edge="branch")
        case "identity":
            return Tap(site=site, module=f"{site}.shortcut", side="output", block=site, edge="shortcut")
        case "post":
            return Tap(site=site, module=f"{site}.join", side="output", block=site, edge="output")
        case "pre":
            return Tap(site=site, module=f"{site}.branch", side="input", block=site)
        case "3x3":
            after = getattr(block, "after_3x3", None)
            if not isinstance(after, str):
                raise InsertionError(
                    f"{site}: {type(block).__name__} does not name the child of its branch for the 3x3 placement "
                    "(attribute after_3x3); name that module by a pattern instead"
                )
            return Tap(site=site, module=f"{site}.branch.{after}", side="output", block=site)
    raise InsertionError(f"placement {placement!r}: allowed: standard, pre, post, identity, 3x3")


def check_unshared(model: nn.Module, paths: Iterable[str]) -> None:
    """Refuse modules with several paths: a block there would run once for each path.

    Raises:
        InsertionError: names the module and its other path.
    """
    homes: dict[int, list[str]] = {}
    for path, module in named_sites(model, shared=True):
        homes.setdefault(id(module), []).append(path)
    for path in paths:
        others = [other for other in homes[id(model.get_submodule(path))] if other != path]
        if others:
            raise InsertionError(f"{path}: is shared with {others[0]}; use separate modules to gate them separately")
