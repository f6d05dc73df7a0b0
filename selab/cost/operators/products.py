"""Convolutions, matrix products, attention and recurrent layers, with the operators of every device."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from selab.cost.operators.base import (
    Arguments,
    Arithmetic,
    Needs,
    Rule,
    Traffic,
    Work,
    per_output,
    table,
)


# --------------------------------------------------------------------------------------------------------- convolutions
def _positions(x: Tensor, weight: Tensor) -> int:
    """Return the elements of one channel, over the whole batch; the batch dimension may be missing."""
    channels = x.shape[1 - weight.dim()]
    return x.numel() // channels if channels else 0


def _convolution_work(args: Arguments, out: Tensor) -> Work:
    """One MAC per weight and output position; if transposed, per weight and input position."""
    x, weight, transposed = args[0], args[1], args[6]
    return Work(_positions(x if transposed else out, weight) * weight.numel())


def _forward_convolution(args: Arguments, out: Tensor) -> Work:
    return Work(_positions(out, args[1]) * args[1].numel())


def _transposed_convolution(args: Arguments, _out: Tensor) -> Work:
    return Work(_positions(args[0], args[1]) * args[1].numel())


def _activated_convolution(count: int) -> Arithmetic:
    def work(args: Arguments, out: Tensor) -> Work:
        return Work(_positions(out, args[1]) * args[1].numel(), count * out.numel(), count * out.numel())

    return work


def _sequence_convolution(args: Arguments, out: Tensor) -> Work:
    """Of a map (time, batch, channels) and weights (window, channels, output channels)."""
    return Work(out.numel() * prod(args[1].shape[:2]))


def _packed_weight(packed: Any) -> Tensor | None:
    """Return the weight that a quantised layer has packed."""
    try:
        # Real tensors: the fake ones of a count must not follow.
        with torch._C._DisableTorchDispatch():
            weight = packed.unpack()[0]
    except (AttributeError, RuntimeError, TypeError):
        return None
    return weight if isinstance(weight, Tensor) else None


def _packed_traffic(args: Arguments, out: Tensor) -> Sequence[tuple[Tensor, int]]:
    weight = _packed_weight(args[1])
    moved = [args[0], out] if weight is None else [args[0], weight, out]
    return [(x, x.numel()) for x in moved]


def _quantised_convolution(args: Arguments, out: Tensor) -> Work | None:
    weight = _packed_weight(args[1])
    return None if weight is None else Work(_positions(out, weight) * weight.numel())


# ------------------------------------------------------------------------------------------------------ matrix products
def _product_work(left: int) -> Arithmetic:
    return lambda args, out: Work(out.numel() * args[left].shape[-1])


def _summed_products(args: Arguments, _out: Tensor) -> Work:
    """`addbmm`: the products of a batch, summed."""
    return Work(args[1].numel() * args[2].shape[-1])


def _outer_product(_args: Arguments, out: Tensor) -> Work:
    return Work(out.numel())


def _activated_product(args: Arguments, out: Tensor) -> Work:
    return Work(out.numel() * args[1].shape[-1], out.numel(), out.numel())


def _grouped_product(args: Arguments, out: Tensor) -> Work:
    """Rows of one factor are assigned to groups; each row meets one matrix."""
    a, b = args[0], args[1]
    ragged_k = a.dim() == 2 and b.dim() == 2
    return Work(a.numel() * b.shape[-1] if ragged_k else out.numel() * a.shape[-1])


def _trilinear_work(args: Arguments, _out: Tensor) -> Work:
    """Two matrix products: what only the first two factors have in common is summed before the third comes in."""
    factors = [list(factor.shape) for factor in args[:3]]
    for sizes, expanded in zip(factors, args[3:6], strict=True):
        for dim in sorted(expanded):
            sizes.insert(dim, 1)
    first, second, third = factors
    pair = [max(a, b) for a, b in zip(first, second, strict=True)]
    left = [1 if dim in args[6] and dim in args[5] else size for dim, size in enumerate(pair)]
    return Work(prod(pair) + prod(max(a, b) for a, b in zip(left, third, strict=True)))


def _distance_product(args: Arguments, out: Tensor) -> Work:
    """|a - b|² = |a|² - 2ab + |b|² as one matrix product over two columns more, then the roots."""
    other = 2 * (args[0].numel() + args[1].numel()) + 2 * out.numel()
    return Work(out.numel() * (args[0].shape[-1] + 2), other, other)


def _classified(args: Arguments, _out: Tensor) -> Work:
    """A linear layer, a softmax of its outputs and their cross-entropy, in one operator."""
    x, weight = args[0], args[1]
    rows = x.numel() // max(1, x.shape[-1])
    other = 3 * rows * weight.shape[0] + rows
    return Work(rows * weight.numel(), other, other)


# ------------------------------------------------------------------------------------------------------------ attention
class _Attention:
    """Scaled dot-product attention in one operator: two products and a softmax over the scores.

    Scaling and masking are part of the softmax. A causal mask skips nothing. Groups of queries may share a key.

    Args:
        head: dimension of the heads, which keys may have fewer of.
        row: dimension of the queries and keys.
    """

    def __init__(self, head: int = -3, row: int = -2) -> None:
        self._head, self._row = head, row

    def _products(self, args: Arguments) -> tuple[int, int, int]:
        """Return the scores, the MACs that make them, and the MACs that they weight the values by."""
        query, key, value = args[:3]
        scores = query.numel() // max(1, query.shape[-1]) * key.shape[self._row]
        return scores, scores * query.shape[-1], scores * value.shape[-1]

    def work(self, args: Arguments, _out: Tensor) -> Work:
        scores, similarity, weighting = self._products(args)
        return Work(similarity + weighting, 3 * scores, 3 * scores)

    def backward(self, args: Arguments, _out: Tensor, work: Work, needs: Needs) -> Work:
        _, similarity, weighting = self._products(args)
        query, key, value = (needs(x) for x in args[:3])
        through_scores = query or key
        return Work(
            similarity * (query + key) + weighting * (through_scores + value),
            through_scores * work.other,
            through_scores * work.other_flops,
        )


def attention_backward(args: Arguments, out: Tensor) -> Work:
    """Return the arithmetic of the gradients of queries, keys and values; the first argument is the output's."""
    work = _HEADS_FIRST.work(args[1:], out)
    return _HEADS_FIRST.backward(args[1:], out, work, lambda _: True)


_HEADS_FIRST, _ROWS_FIRST = _Attention(), _Attention(head=-2, row=-3)


def _native_attention(args: Arguments, _out: Tensor) -> Work:
    query, key, heads, projection = args[0], args[1], args[4], args[7]
    return _self_attention(query, key, heads, args[5].numel() // 3, projection.numel())


def _self_attention(query: Tensor, key: Tensor, heads: int, into: int, back: int) -> Work:
    """Of maps (batch, rows, features): three projections, attention, and the projection back."""
    batch, rows, features = query.shape
    scores = batch * rows * key.shape[1]
    macs = batch * (rows + 2 * key.shape[1]) * into + 2 * scores * features + batch * rows * back
    return Work(macs, 3 * heads * scores, 3 * heads * scores)


def _encoder_layer(args: Arguments, _out: Tensor) -> Work:
    """Attention, two layers with an activation between them, two normalisations and two additions."""
    x, heads, wide, narrow = args[0], args[2], args[14], args[16]
    attention = _self_attention(x, x, heads, args[3].numel() // 3, args[5].numel())
    tokens = prod(x.shape[:2])
    hidden, normalised = tokens * wide.shape[0], 2 * x.numel()
    return Work(
        attention.macs + tokens * (wide.numel() + narrow.numel()),
        attention.other + hidden + 3 * normalised + normalised,
        attention.other_flops + hidden + 4 * normalised + normalised,
    )


# ----------------------------------------------------------------------------------------------------- recurrent layers
# Arithmetic per element of the state besides the products, by torch's number of the mode: ReLU, tanh, LSTM, GRU.
_CELL = {0: 2, 1: 2, 2: 13, 3: 10}


def _cell_work(mode: int) -> Arithmetic:
    return per_output(_CELL[mode])


def _layer_parts(args: Arguments) -> tuple[int, Sequence[Tensor], int, int]:
    """Return positions (steps times batch), weight matrices, elements of all states, and steps of oneDNN's layer."""
    x, matrices = args[0], [args[1], args[2]]
    positions = x.numel() // max(1, x.shape[-1])
    return positions, matrices, _CELL[args[9]] * args[10], x.shape[0]


def _stack_parts(args: Arguments, at: int) -> tuple[int, Sequence[Tensor], int, int]:
    """Return the same of the layers that cuDNN or MIOpen runs at once; `at` is the position of the mode."""
    x, weights = args[0], args[1]
    named = at == 6  # cuDNN also has projections.
    layers, batch_first = args[at + 2 + named], args[at + 3 + named]
    directions = 2 if args[at + 6 + named] else 1
    packed = args[at + 7 + named]
    positions = x.numel() // max(1, x.shape[-1])
    steps = len(packed) or (x.shape[1] if batch_first and x.dim() == 3 else x.shape[0])
    matrices = [weight for weight in weights if weight.dim() == 2]
    return positions, matrices, _CELL[args[at]] * args[at + 1] * layers * directions, steps


def _recurrent(parts: Any, name: str, traffic: Traffic | None = None) -> Rule:
    def work(args: Arguments, _out: Tensor) -> Work:
        positions, matrices, cell, _ = parts(args)
        return Work(positions * sum(x.numel() for x in matrices), positions * cell, positions * cell)

    def backward(args: Arguments, _out: Tensor, done: Work, needs: Needs) -> Work:
        positions, matrices, _, steps = parts(args)
        first = matrices[0].numel()
        # The first step's state is given: no gradient passes on to it.
        carried = positions * (steps - 1) // max(1, steps)
        states = sum(carried * x.numel() for x in matrices[1:])
        own = sum(positions * x.numel() for x in matrices if needs(x))
        return Work(needs(args[0]) * positions * first + states + own, done.other, done.other_flops)

    return Rule(name=name, work=work, backward=backward, traffic=traffic)


def _stack_traffic(args: Arguments, out: Tensor) -> Sequence[tuple[Tensor, int]]:
    """CuDNN gets its weights twice: one by one, and in one buffer."""
    given = [args[0], *args[1], *(x for x in args[4:6] if isinstance(x, Tensor)), out]
    return [(x, x.numel()) for x in given]


# ------------------------------------------------------------------------------------------------------------ the table
def _convolutions(work: Arithmetic, names: str) -> dict[str, Rule]:
    return table(Rule(name="convolution", work=work, operands=(0, 1)), names)


def _products(work: Arithmetic, operands: tuple[int, ...], name: str, names: str) -> dict[str, Rule]:
    return table(Rule(name=name, work=work, operands=operands), names)


PRODUCTS: dict[str, Rule] = {
    "aten::convolution": Rule(name="convolution", work=_convolution_work, role="convolution", operands=(0, 1)),
    **table(
        Rule(name="convolution", work=_convolution_work, role="convolution", operands=(0, 1)),
        "_convolution convolution_overrideable",
    ),
    **_convolutions(
        _forward_convolution,
        "cudnn_convolution mkldnn_convolution miopen_convolution miopen_depthwise_convolution _slow_conv2d_forward "
        "slow_conv_dilated2d slow_conv_dilated3d slow_conv3d_forward conv_depthwise3d _conv_depthwise2d "
        "_nnpack_spatial_convolution _mps_convolution",
    ),
    **_convolutions(
        _transposed_convolution,
        "cudnn_convolution_transpose miopen_convolution_transpose slow_conv_transpose2d slow_conv_transpose3d "
        "_mps_convolution_transpose",
    ),
    **_convolutions(_activated_convolution(1), "cudnn_convolution_relu miopen_convolution_relu"),
    **_convolutions(_activated_convolution(2), "cudnn_convolution_add_relu miopen_convolution_add_relu"),
    **_convolutions(_sequence_convolution, "conv_tbc"),
    **table(
        Rule(name="convolution", work=_quantised_convolution, traffic=_packed_traffic),
        "quantized::conv1d quantized::conv2d quantized::conv3d quantized::conv1d_relu quantized::conv2d_relu "
        "quantized::conv3d_relu quantized::conv1d_dynamic quantized::conv2d_dynamic quantized::conv3d_dynamic",
    ),
    "aten::addmm": Rule(name="linear", work=_product_work(1), operands=(1, 2)),
    "aten::mm": Rule(name="linear", work=_product_work(0), operands=(0, 1)),
    "aten::bmm": Rule(name="matmul", work=_product_work(0), operands=(0, 1)),
    **_products(
        _product_work(0),
        (0, 1),
        "linear",
        "linear mkldnn_linear mkldnn::_linear_pointwise _scaled_mm _scaled_mm_v2 _int_mm _mixed_dtypes_linear "
        "_weight_int8pack_mm _weight_int4pack_mm _weight_int4pack_mm_for_cpu "
        "_weight_int4pack_mm_with_scales_and_zeros",
    ),
    **table(
        Rule(name="linear", work=_product_work(0), traffic=_packed_traffic),
        "quantized::linear quantized::linear_relu quantized::linear_dynamic quantized::linear_relu_dynamic "
        "quantized::linear_dynamic_fp16 quantized::linear_relu_dynamic_fp16",
    ),
    **_products(_product_work(1), (1, 2), "linear", "addmm_"),
    **_products(_activated_product, (1, 2), "linear", "_addmm_activation"),
    **_products(_product_work(0), (0, 1), "matmul", "mv dot vdot"),
    **_products(_product_work(1), (1, 2), "matmul", "baddbmm baddbmm_ addmv addmv_"),
    **_products(_summed_products, (1, 2), "matmul", "addbmm addbmm_"),
    **_products(_outer_product, (1, 2), "matmul", "addr addr_"),
    **_products(_grouped_product, (0, 1), "matmul", "_grouped_mm _scaled_grouped_mm _scaled_grouped_mm_v2"),
    **_products(_trilinear_work, (0, 1, 2), "bilinear", "_trilinear"),
    **_products(_distance_product, (0, 1), "cdist", "_euclidean_dist"),
    **_products(
        _classified,
        (0, 1),
        "linear_cross_entropy",
        "torch_nn::_linear_cross_entropy_batch_chunked torch_nn::_linear_cross_entropy_batch_chunked_no_reduction",
    ),
    # Each place of the map times the columns of a matrix.
    **_products(_product_work(0), (0,), "affine_grid", "affine_grid_generator"),
    **table(
        Rule(name="attention", work=_HEADS_FIRST.work, backward=_HEADS_FIRST.backward),
        "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
        "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
        "_scaled_dot_product_fused_attention_overrideable _scaled_dot_product_attention_math_for_mps "
        "_triton_scaled_dot_attention _cudnn_attention_forward",
    ),
    **table(
        Rule(name="attention", work=_ROWS_FIRST.work, backward=_ROWS_FIRST.backward),
        "_flash_attention_forward _efficient_attention_forward",
    ),
    "aten::_native_multi_head_attention": Rule(name="attention", work=_native_attention),
    "aten::_transformer_encoder_layer_fwd": Rule(name="transformer_layer", work=_encoder_layer),
    "aten::mkldnn_rnn_layer": _recurrent(_layer_parts, "recurrent"),
    "aten::_cudnn_rnn": _recurrent(lambda args: _stack_parts(args, 6), "recurrent", _stack_traffic),
    "aten::miopen_rnn": _recurrent(lambda args: _stack_parts(args, 5), "recurrent"),
    **table(Rule(name="recurrent", work=_cell_work(2)), "_thnn_fused_lstm_cell"),
    **table(Rule(name="recurrent", work=_cell_work(3)), "_thnn_fused_gru_cell"),
}
