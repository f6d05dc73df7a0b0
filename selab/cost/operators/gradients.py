"""Operators of autograd, for networks whose forward pass takes a gradient."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from selab.cost.operators.base import Arguments, Arithmetic, Rule, Work, elements, nothing, per_input, per_output, table
from selab.cost.operators.products import attention_backward


def _convolution_work(args: Arguments, _out: Tensor) -> Work:
    """The forward's MACs for the map's gradient, and once more for the weight's, however many groups there are."""
    grad, x, weight, transposed, mask = args[0], args[1], args[2], args[7], args[10]
    positions = x if transposed else grad
    channels = positions.shape[1]
    macs = (positions.numel() // channels if channels else 0) * weight.numel()
    return Work(macs * (bool(mask[0]) + bool(mask[1])), *[_bias_sums(grad, mask)] * 2)


def _bias_sums(grad: Tensor, mask: Sequence[bool]) -> int:
    return grad.numel() if len(mask) > 2 and mask[2] else 0


def _normalisation_work(statistics: int, mask_at: int) -> Arithmetic:
    """The map's gradient as its forward pass, and one per element for each of scale and shift."""

    def work(args: Arguments, _out: Tensor) -> Work:
        mask: Any = args[mask_at]
        through, scale, shift = (bool(flag) for flag in mask)
        return elements((through * (1 + statistics) + scale + shift) * args[0].numel())

    return work


GRADIENTS: dict[str, Rule] = {
    "aten::convolution_backward": Rule(name="convolution_backward", work=_convolution_work),
    **table(
        Rule(name="attention_backward", work=attention_backward),
        "_scaled_dot_product_flash_attention_for_cpu_backward _scaled_dot_product_flash_attention_backward "
        "_scaled_dot_product_efficient_attention_backward _scaled_dot_product_cudnn_attention_backward "
        "_scaled_dot_product_fused_attention_overrideable_backward",
    ),
    **table(
        Rule(name="activation_backward", work=per_output(1)),
        "elu_backward gelu_backward hardshrink_backward hardsigmoid_backward hardswish_backward hardtanh_backward "
        "leaky_relu_backward log_sigmoid_backward logit_backward mish_backward _prelu_kernel_backward "
        "rrelu_with_noise_backward sigmoid_backward silu_backward softplus_backward softshrink_backward tanh_backward "
        "threshold_backward native_dropout_backward glu_backward",
    ),
    **table(
        Rule(name="softmax_backward", work=per_output(3)),
        "_softmax_backward_data _log_softmax_backward_data _masked_softmax_backward",
    ),
    **table(Rule(name="norm_backward", work=_normalisation_work(2, 9)), "native_batch_norm_backward"),
    **table(Rule(name="norm_backward", work=_normalisation_work(2, 7)), "native_layer_norm_backward"),
    **table(Rule(name="norm_backward", work=_normalisation_work(2, 9)), "native_group_norm_backward"),
    **table(
        Rule(name="pool_backward", work=per_input(1)),
        "max_pool2d_with_indices_backward max_pool3d_with_indices_backward avg_pool2d_backward avg_pool3d_backward "
        "_adaptive_avg_pool2d_backward _adaptive_avg_pool3d_backward adaptive_max_pool2d_backward "
        "adaptive_max_pool3d_backward fractional_max_pool2d_backward fractional_max_pool3d_backward",
    ),
    **table(Rule(name="upsample_backward", work=per_input(2)), "upsample_linear1d_backward"),
    **table(Rule(name="upsample_backward", work=per_input(4)), "upsample_bilinear2d_backward"),
    **table(Rule(name="upsample_backward", work=per_input(8)), "upsample_trilinear3d_backward"),
    **table(Rule(name="upsample_backward", work=per_input(16)), "upsample_bicubic2d_backward"),
    **table(
        Rule(name="upsample_backward", work=per_input(1)),
        "upsample_nearest1d_backward upsample_nearest2d_backward upsample_nearest3d_backward "
        "_upsample_nearest_exact1d_backward _upsample_nearest_exact2d_backward _upsample_nearest_exact3d_backward",
    ),
    **table(Rule(name="gather_backward", work=per_input(1)), "embedding_dense_backward unfold_backward"),
    **table(
        Rule(name="loss_backward", work=per_output(2)),
        "mse_loss_backward smooth_l1_loss_backward huber_loss_backward soft_margin_loss_backward "
        "binary_cross_entropy_backward",
    ),
    **table(
        Rule(name="copy", work=nothing, linear=True),
        "select_backward slice_backward diagonal_backward nll_loss_backward nll_loss2d_backward "
        "reflection_pad1d_backward reflection_pad2d_backward reflection_pad3d_backward replication_pad1d_backward "
        "replication_pad2d_backward replication_pad3d_backward masked_scatter_backward",
    ),
}
