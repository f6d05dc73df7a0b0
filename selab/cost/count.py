"""Count a network: parameters, MACs, FLOPs and bytes of one forward pass; by default no kernel runs in it.

"FLOPs" is not a well-defined quantity: papers and tools differ in what they count. These are the conventions of selab,
and every total names its convention.

A copy of the model runs its own `forward` on fake tensors: they report the device, dtype and strides of real ones, but
have no memory. Every aten operator is intercepted. Its output is another fake tensor, and its cost follows from the
shapes by the rules in `selab.cost.RULES`. Of the weights only the shapes are read, and nothing that `forward` assigns
reaches the model. So neither arithmetic nor memory is needed, whatever the batch and the resolution.

The cost of one operator:

* **conv_linear**: one MAC per multiplication of a convolution, a fully connected layer or a matrix product; biases are
  not counted. `paper` adds the additions of SE's global average pooling, nothing else.
* **all**: `conv_linear`, and one per fused multiply-add that any other operator needs: one per output element of an
  elementwise operation, one per element read of a reduction or a pooling window, one per element of a normalisation
  (a scale and a shift) and two more where it computes its own statistics, three for softmax (exponential, sum,
  division), one per neighbour that an interpolated or sampled element is made of, one per comparison of a sort
  (log2 n for each of n elements), one per random number. Attention in one operator costs its two products and a softmax
  over all scores, masked ones included. Moving data (views, copies, concatenation, padding, shuffling) is not
  arithmetic.
* **flops**: two per MAC of conv_linear, two per element for the scale and shift of a normalisation and for `addcmul`
  and its like, otherwise the same as `all`.
* **bytes**: compulsory traffic: distinct inputs read once (parameters included, expanded dimensions once), output
  written once. Views move nothing. A gather reads the elements that it returns, at most its whole table; a scatter in
  place moves the elements that it writes. Indices, masks and statistics that an operator returns with its result are
  left out, because inference does not need them.
* **activations**: output elements of the convolutions (Radosavovic et al., arXiv 2003.13678). Other operators
  have none: an SE block of 1x1 convolutions has some, the same block of fully connected layers has none.

The backward pass is derived from the forward's: each operand of a convolution or a matrix product that needs a gradient
(the input of the first layer does not, nor does a frozen weight) costs the forward's MACs once, however many groups
there are. Attention in one operator costs what its two products and its softmax do. Any other operator costs its
forward's arithmetic once per input that needs a gradient, a normalisation's scale and shift one per element each;
additions, views and copies pass the gradient on at no cost. `paper` adds one per squeezed element, the mean's gradient
spread back.
"""

from collections import Counter
from collections.abc import Callable, Collection, Sequence

import torch
from torch import nn

from selab.cost.packed import parameter_sizes
from selab.cost.tracer import Operation, OpTrace, Stage, op_trace
from selab.errors import ModelError
from selab.graphs.cost import count_graph
from selab.graphs.module import OnnxNetwork
from selab.meta import Example, On, as_written
from selab.records.types import Cost, Macs, OperatorCost, SECost, StageCost


def count(
    model: nn.Module,
    example: Example,
    *,
    dtype: torch.dtype | None = None,
    training: bool = False,
    se_blocks: Collection[str] = (),
    on: On = "fake",
) -> Cost:
    """Count one forward pass of a network, and the backward pass that belongs to it.

    The module's docstring states the conventions. MACs in `by_operator` and `by_module` follow the convention `all`.

    Args:
        model: any module on any device, the meta device included; not changed.
        example: an input's shape such as (N, C, H, W), a tensor, a tuple of positional or a mapping of keyword
            arguments.
        dtype: of all floating-point tensors when bytes are counted; their own where None.
        training: count the forward pass in train mode instead of eval mode.
        se_blocks: paths of modules to count as SE blocks, besides those of selab.
        on: `cpu` to run the kernels on a copy with real tensors, for a network in which values decide what is computed.

    Raises:
        ModelError: the forward pass fails, or `se_blocks` names no module.
    """
    if isinstance(model, OnnxNetwork):
        if not isinstance(example, Sequence):
            raise ModelError(f"{model.place}: an ONNX network is counted for a shape, (N, C, H, W)")
        return count_graph(model.model, tuple(example), model.place)
    return cost_of(model, op_trace(model, example, dtype=dtype, training=training, se_blocks=se_blocks, on=on))


def cost_of(model: nn.Module, traced: OpTrace) -> Cost:
    """Return the cost of a network from the operators of its forward pass."""
    model = as_written(model)
    operations = traced.operations
    by_module = _grouped(operations, lambda operation: operation.path)
    params, buffer_elements = _sizes(model)
    return Cost(
        params=params,
        buffer_elements=buffer_elements,
        macs=_macs(operations),
        macs_backward=_macs_backward(operations),
        flops=sum(2 * o.macs + o.other_flops for o in operations),
        flops_backward=sum(2 * o.backward_macs + o.backward_other_flops for o in operations),
        bytes=sum(o.bytes for o in operations),
        activations=sum(o.output_numel for o in operations if o.name == "convolution"),
        se=_se_cost(model, traced),
        by_operator=_grouped(operations, lambda operation: operation.name),
        by_module={
            path: OperatorCost(
                calls=traced.calls.get(path, cost.calls), macs=cost.macs, flops=cost.flops, bytes=cost.bytes
            )
            for path, cost in by_module.items()
        },
        unknown=dict(Counter(o.name for o in operations if not o.known)),
    )


def _macs(operations: Sequence[Operation]) -> Macs:
    products = sum(o.macs for o in operations)
    squeezed = sum(o.other for o in operations if o.stage == "squeeze")
    return Macs(conv_linear=products, paper=products + squeezed, all=products + sum(o.other for o in operations))


def _macs_backward(operations: Sequence[Operation]) -> Macs:
    products = sum(o.backward_macs for o in operations)
    squeezed = sum(o.backward_other for o in operations if o.stage == "squeeze")
    return Macs(
        conv_linear=products, paper=products + squeezed, all=products + sum(o.backward_other for o in operations)
    )


def _sizes(model: nn.Module) -> tuple[int, int]:
    """Return the elements of parameters and of persistent buffers; shared tensors count once."""
    buffers: dict[int, int] = {}
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                buffers[id(buffer)] = buffer.numel()
    return sum(parameter_sizes(model.modules()).values()), sum(buffers.values())


def _se_cost(model: nn.Module, traced: OpTrace) -> SECost:
    params = parameter_sizes(module for path in traced.se_blocks for module in model.get_submodule(path).modules())
    inside = [o for o in traced.operations if o.stage]

    def stage(name: Stage) -> StageCost:
        own = [o for o in inside if o.stage == name]
        return StageCost(macs=sum(o.stage_macs for o in own), bytes=sum(o.stage_bytes for o in own))

    return SECost(
        blocks=len({o.block for o in inside}),
        params=sum(params.values()),
        squeeze=stage("squeeze"),
        excitation=stage("excitation"),
        scale=stage("scale"),
    )


def _grouped(operations: Sequence[Operation], key: Callable[[Operation], str]) -> dict[str, OperatorCost]:
    sums: dict[str, list[int]] = {}
    for o in operations:
        if o.known:
            total = sums.setdefault(key(o), [0, 0, 0, 0])
            total[0] += 1
            total[1] += o.macs + o.other
            total[2] += 2 * o.macs + o.other_flops
            total[3] += o.bytes
    return {
        name: OperatorCost(calls=calls, macs=macs, flops=flops, bytes=moved)
        for name, (calls, macs, flops, moved) in sums.items()
    }
