"""Automatic site detection: find the ends of blocks in a network that declares no sites.

The network runs once on fake tensors; `selab.attention.dataflow` records the values of the pass. The kinds of ends,
in the order of preference (a kind is looked for only if no earlier one gave a site):

1. ends of branches that are added, and of blocks that stand alone:

   * `residual`: of two feature maps that are added, the one with more convolutions since their common ancestor;
   * `parallel`: after the sum of parallel convolutions with BatchNorms, which re-parameterisation will merge into one
     convolution; inside the sum there are no sites;
   * `depthwise-separable`: outside of residual branches, a depthwise convolution, a pointwise one, and the elementwise
     operations after it, up to the next reader;

2. `concatenation`: after the concatenation of feature maps that share an input, or after the pointwise convolutions
   behind it where these are part of the block. With residual ends too, for blocks of the same class without a shortcut,
   and with depthwise-separable ends where most blocks of that kind are parts of concatenating ones;
3. `stage`: in a network without additions and concatenations up to its last feature map, the last layer before the
   resolution changes.

The site is the outermost module that returns exactly this value, so that a block there gates nothing else. That of a
stage holds no earlier stage.
"""

from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import nn

from selab.attention.channel_dim import batch_of_one, larger_images, shapes_at_convolutions, shapes_in
from selab.attention.dataflow import DataflowTrace
from selab.attention.gated_site import named_sites
from selab.attention.site_finder import BlockEnd, Ends, Finder
from selab.errors import InsertionError, ModelError
from selab.meta import Example, On, evaluating, failed_pass, make_pass, passages

__all__ = ["BlockEnd", "Ends", "block_ends", "trace_ends", "usable_ends"]

# How many of the ends that were left out an error message names.
_SHOWN = 3


def block_ends(model: nn.Module, example: Example, *, on: On = "fake") -> tuple[BlockEnd, ...]:
    """Return the modules at which the blocks of a network end, in the order of the network.

    Args:
        model: on any device; not changed.
        example: an example input: a shape (N, C, H, W), a tensor, positional arguments in a tuple or list, or keyword
            arguments in a mapping.
        on: `cpu` to run the kernels on a copy with real tensors, for a network in which values decide what is computed.

    Raises:
        InsertionError: there are none; the message says which were left out, and what to do.
        ModelError: the forward pass fails with this input.
    """
    return usable_ends(model, example, on=on).found


def usable_ends(model: nn.Module, example: Example, *, on: On = "fake") -> Ends:
    """Return what `block_ends` finds, with the ends that were left out.

    Raises:
        InsertionError: as `block_ends`.
        ModelError: the forward pass fails with this input.
    """
    ends = trace_ends(model, example, on=on)
    if not ends.found:
        more = f" and {len(ends.left_out) - _SHOWN} more" if len(ends.left_out) > _SHOWN else ""
        seen = f" (left out: {'; '.join(ends.left_out[:_SHOWN])}{more})" if ends.left_out else ""
        raise InsertionError(
            f"{type(model).__name__}: tracing finds no block end: no residual addition, depthwise-separable block or "
            f"concatenation of feature maps (N, C, H, W), and no stages of a plain network{seen}; "
            "name modules: --insert PATTERN (`selab sites` lists them)"
        )
    return ends


def trace_ends(model: nn.Module, example: Example, *, on: On = "fake") -> Ends:
    """Return what `block_ends` finds and the ends that were left out; no error if there is none.

    Raises:
        ModelError: the forward pass fails with this input.
    """
    if _takes_one_image(model, example, on):
        with suppress(ModelError):
            return _traced(model, batch_of_one(example), on)
    return _traced(model, example, on)


def _takes_one_image(model: nn.Module, example: Example, on: On) -> bool:
    """Return whether the convolutions of a network run on one image, (C, H, W); a trace needs a batch."""
    if any(len(shape) != 3 for shape in shapes_in(example)):
        return False
    seen = passages(model, [path for path, _ in named_sites(model)], example, on=on)
    return bool(shapes_at_convolutions(model, seen))


def _traced(model: nn.Module, example: Example, on: On) -> Ends:
    fakes = make_pass(model, example, on)
    trace = DataflowTrace(fakes)
    try:
        with evaluating(fakes.model), torch.no_grad():
            trace.run()
    except Exception as error:
        raise failed_pass(fakes, model, error) from error
    return _without_tokens(model, example, Finder(trace).ends(), on)


def _without_tokens(model: nn.Module, example: Example, ends: Ends, on: On) -> Ends:
    """Leave out sites whose map is not an image's: with an input of twice the height, only the height may change.

    Patches and attention maps have four dimensions too, but other sizes follow the input's.
    """
    if not ends.found:
        return ends
    paths = [end.path for end in ends.found]
    before = passages(model, paths, example, on=on)
    try:
        after = passages(model, paths, larger_images(example, 2, 1, on=on), on=on)
    except ModelError:
        # Its input has a fixed size.
        return ends
    found, left_out = [], list(ends.left_out)
    for end in ends.found:
        one, other = before[end.path].output_shape, after[end.path].output_shape
        if one is None or other is None or len(one) != len(other) or len(one) != 4:
            found.append(end)
        elif (one[0], one[1], one[3]) != (other[0], other[1], other[3]):
            sizes = f"{_by(one)}, and {_by(other)} with an input of twice the height"
            left_out.append(f"{end.path}: its output is not a feature map of the image: {sizes}")
        elif one[2:] == other[2:] == (1, 1):
            left_out.append(f"{end.path}: its output is one vector per image, {_by(one)}")
        else:
            found.append(end)
    return Ends(found=tuple(found), left_out=tuple(left_out))


def _by(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))
