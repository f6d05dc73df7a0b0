"""Paths of modules."""

from torch import nn

from selab.attention.gated_site import named_sites


def shared_paths(model: nn.Module) -> set[str]:
    """Return the paths of modules that have several paths."""
    homes: dict[int, list[str]] = {}
    for path, module in named_sites(model, shared=True):
        homes.setdefault(id(module), []).append(path)
    return {path for paths in homes.values() if len(paths) > 1 for path in paths}


def holds(path: str, other: str) -> bool:
    """Return whether a module contains another one, or is it."""
    return path == "" or f"{other}.".startswith(f"{path}.")


def common(*paths: str) -> str:
    """Return the innermost module that contains all of these."""
    names = [tuple(path.split(".")) for path in paths]
    kept = []
    for level in zip(*names, strict=False):
        if len(set(level)) > 1:
            break
        kept.append(level[0])
    return ".".join(kept)


def named(path: str) -> str:
    """Return a path, or words for the empty one."""
    return path or "the network"
