"""Elementwise operators, reductions, normalisations, losses, sorting and quantisation."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from selab.cost.operators.base import (
    Arguments,
    Arithmetic,
    Role,
    Rule,
    Traffic,
    Work,
    argument,
    comparisons,
    elements,
    named,
    per_input,
    per_output,
    table,
)


# ------------------------------------------------------------------------------------------------------- normalisations
def _normalisation(computes_statistics: bool) -> Arithmetic:
    """One multiply-add per element for scale and shift, and two for the statistics where they are computed."""
    statistics = 2 if computes_statistics else 0
    return per_output(1 + statistics, 2 + statistics)


def _in_train_mode(args: Arguments) -> bool:
    """Return whether the statistics are those of the batch; without running ones, the flag stands further left."""
    return bool(args[3] if len(args) == 6 else args[5])


def _always(_args: Arguments) -> bool:
    return True


def _batch_norm_work(args: Arguments, out: Tensor) -> Work:
    return _normalisation(_in_train_mode(args))(args, out)


# ----------------------------------------------------------------------------------------------------------- reductions
def _distances(args: Arguments, out: Tensor) -> Work:
    """A difference and a power per element of each pair, and a root per pair."""
    return elements((2 * args[0].shape[-1] + 1) * out.numel())


def _sorted(dim_at: int | None) -> Arithmetic:
    """Return the rule of sorting along a dimension (all elements if None): n log₂ n comparisons."""

    def work(args: Arguments, _out: Tensor) -> Work:
        x = args[0]
        dim = None if dim_at is None else argument(args, dim_at, -1)
        length = x.numel() if not isinstance(dim, int) or x.dim() == 0 else x.shape[dim]
        return elements(x.numel() * comparisons(length))

    return work


def _searched(sequence_at: int) -> Arithmetic:
    """Return the rule of a binary search for every output in a sorted sequence."""

    def work(args: Arguments, out: Tensor) -> Work:
        sequence = args[sequence_at]
        return elements(out.numel() * comparisons((sequence.shape[-1] if sequence.dim() else 1) + 1))

    return work


# --------------------------------------------------------------------------------------------------------------- losses
def _loss(count: int) -> Arithmetic:
    """Return the rule of a loss: `count` per element, and one more where the elements are summed."""

    def work(args: Arguments, out: Tensor) -> Work:
        x = args[0]
        return elements((count + (out.numel() < x.numel())) * x.numel())

    return work


def _picked_work(args: Arguments, _out: Tensor) -> Work:
    """The negative log-likelihood: one element per target is read, weighted and summed."""
    return elements(args[1].numel())


def _picked_traffic(args: Arguments, out: Tensor) -> Sequence[tuple[Tensor, int]]:
    x, target, weight = args[:3]
    given = [(weight, weight.numel())] if isinstance(weight, Tensor) else []
    return [(x, target.numel()), (target, target.numel()), *given, (out, out.numel())]


def _alignment_work(args: Arguments, _out: Tensor) -> Work:
    """CTC: per step and state, of which there are two per label and one more, three paths in a log-sum-exp.

    The labels' lengths are values where they are tensors: then every target may be as long as the longest.
    """
    probabilities, targets, lengths = args[0], args[1], args[3]
    steps, batch = probabilities.shape[0], probabilities.shape[1] if probabilities.dim() == 3 else 1
    labels = sum(lengths) if isinstance(lengths, (list, tuple)) else targets.numel()
    return elements(steps * (2 * labels + batch) * (3 * 3 + 1))


# ------------------------------------------------------------------------------------------------------------ the table
def _elementwise(count: int, names: str, *, linear: bool = False) -> dict[str, Rule]:
    return named(names, lambda name: Rule(name=name.removesuffix("_kernel"), work=per_output(count), linear=linear))


def _reductions(count: int, names: str) -> dict[str, Rule]:
    return named(names, lambda name: Rule(name=name, work=per_input(count), role="reduction"))


def _norms(work: Arithmetic, names: str, name: str, affine: int, statistics: Any = _always) -> dict[str, Rule]:
    return table(Rule(name=name, work=work, affine=affine, statistics=statistics), names)


def _plain(work: Arithmetic, name: str, names: str, traffic: Traffic | None = None, role: Role = "") -> dict[str, Rule]:
    return table(Rule(name=name, work=work, traffic=traffic, role=role), names)


ELEMENTWISE: dict[str, Rule] = {
    # One fused multiply-add per output element.
    **named("add sub rsub", lambda name: Rule(name=name, work=per_output(1), linear=True)),
    **named("mul", lambda name: Rule(name=name, work=per_output(1), role="product")),
    **named("addcmul", lambda name: Rule(name=name, work=per_output(1, 2), role="product")),
    **named("div maximum minimum", lambda name: Rule(name=name, work=per_output(1))),
    **named(
        "relu sigmoid hardsigmoid hardtanh silu hardswish tanh gelu elu celu selu mish leaky_relu softplus "
        "log_sigmoid softsign threshold clamp clamp_min clamp_max exp log sqrt rsqrt reciprocal neg abs erf square",
        lambda name: Rule(name=name, work=per_output(1)),
    ),
    **_elementwise(
        1,
        "_prelu_kernel relu6 pow sin cos tan asin acos atan sinh cosh asinh acosh atanh exp2 expm1 log2 log1p log10 "
        "remainder fmod where masked_fill native_dropout sinc atan2 hypot fmax fmin hardshrink softshrink "
        "log_sigmoid_forward rrelu_with_noise rrelu_with_noise_functional erfc erfinv i0 lgamma digamma polygamma "
        "mvlgamma igamma igammac copysign ldexp nan_to_num deg2rad rad2deg float_power angle polar sgn xlogy frexp "
        "special_entr special_erfcx special_i0e special_i1 special_i1e special_log_ndtr special_ndtri special_xlog1py "
        "special_airy_ai special_chebyshev_polynomial_t special_chebyshev_polynomial_u special_chebyshev_polynomial_v "
        "special_chebyshev_polynomial_w special_hermite_polynomial_h special_hermite_polynomial_he "
        "special_laguerre_polynomial_l special_legendre_polynomial_p special_shifted_chebyshev_polynomial_t "
        "special_shifted_chebyshev_polynomial_u special_shifted_chebyshev_polynomial_v "
        "special_shifted_chebyshev_polynomial_w special_spherical_bessel_j0 special_modified_bessel_i0 "
        "special_modified_bessel_i1 special_modified_bessel_k0 special_modified_bessel_k1 "
        "special_scaled_modified_bessel_k0 special_scaled_modified_bessel_k1 "
        "special_zeta special_bessel_j0 special_bessel_j1 special_bessel_y0 special_bessel_y1",
    ),
    # The derivative is zero, or there is none.
    **_elementwise(
        1,
        "sign floor ceil round trunc fix frac floor_divide eq ne lt le gt ge logical_and logical_or logical_not "
        "logical_xor bitwise_and bitwise_or bitwise_not bitwise_xor bitwise_left_shift bitwise_right_shift __lshift__ "
        "__rshift__ isnan isinf isneginf isposinf isin signbit heaviside nextafter gcd lcm",
        linear=True,
    ),
    **_plain(per_output(1), "shift", "__ilshift__ __irshift__"),
    **_elementwise(2, "addcdiv lerp glu logit linalg_cross"),
    **_elementwise(3, "logaddexp logaddexp2"),
    **_elementwise(1, "cumsum cumprod cummax cummin"),
    **_elementwise(3, "logcumsumexp _logcumsumexp"),
    **named("_add_relu", lambda _: Rule(name="add_relu", work=per_output(2))),
    # One per element read.
    **_reductions(1, "mean sum amax amin"),
    **_reductions(1, "max min argmax argmin any all nansum count_nonzero prod trace"),
    **_reductions(1, "segment_reduce"),
    **_reductions(1, "norm native_norm linalg_vector_norm _is_all_true _is_any_true"),
    **_reductions(2, "var std var_mean std_mean dist aminmax _aminmax"),
    **_reductions(3, "logsumexp"),
    **_plain(per_input(1), "compare", "equal"),
    **_plain(per_input(2), "compare", "allclose"),
    **named("_softmax _safe_softmax", lambda _: Rule(name="softmax", work=per_output(3))),
    **named("_log_softmax", lambda name: Rule(name=name.strip("_"), work=per_output(3))),
    **named("_masked_softmax softmax", lambda _: Rule(name="softmax", work=per_output(3))),
    **named("log_softmax", lambda name: Rule(name=name, work=per_output(3))),
    # Selecting and counting reads every element once, sorting compares it log₂ n times.
    **_plain(per_input(1), "select", "topk kthvalue median nanmedian nonzero nonzero_static"),
    **_plain(per_input(1), "histogram", "bincount histc histogram _histogramdd_from_bin_cts"),
    **_plain(_sorted(1), "sort", "sort argsort mode"),
    **_plain(_sorted(None), "unique", "_unique _unique2 unique_dim"),
    **_plain(per_input(1), "unique", "unique_consecutive unique_dim_consecutive"),
    **_plain(_searched(0), "search", "searchsorted"),
    **_plain(_searched(1), "search", "bucketize"),
    **_plain(_distances, "cdist", "_cdist_forward _pdist_forward"),
    # Scale and shift per element, and the statistics where they are computed.
    **_norms(_batch_norm_work, "native_batch_norm", "batch_norm", 1, _in_train_mode),
    **_norms(
        _batch_norm_work,
        "_native_batch_norm_legit cudnn_batch_norm miopen_batch_norm",
        "batch_norm",
        1,
        _in_train_mode,
    ),
    **_norms(_normalisation(True), "_batch_norm_with_update", "batch_norm", 1),
    **_norms(
        _normalisation(False),
        "_native_batch_norm_legit_no_training _batch_norm_no_update batch_norm_elemt",
        "batch_norm",
        1,
        None,
    ),
    **_plain(per_input(2), "batch_norm_stats", "batch_norm_stats batch_norm_update_stats"),
    **_plain(per_input(2, 1), "batch_norm_stats", "batch_norm_gather_stats batch_norm_gather_stats_with_counts"),
    **_norms(_normalisation(True), "native_group_norm", "group_norm", 1),
    **_norms(_normalisation(True), "native_layer_norm", "layer_norm", 2),
    # One statistic, and no shift.
    **_norms(per_output(2), "_fused_rms_norm", "rms_norm", 2),
    **_plain(per_output(2), "weight_norm", "_weight_norm_interface renorm renorm_"),
    # Losses, per element: a difference and a power, or two logarithms with their weights.
    **_plain(_loss(2), "loss", "mse_loss soft_margin_loss"),
    **_plain(_loss(3), "loss", "smooth_l1_loss huber_loss multi_margin_loss multilabel_margin_loss_forward"),
    **_plain(_loss(4), "loss", "binary_cross_entropy"),
    **_plain(_loss(5), "loss", "binary_cross_entropy_with_logits"),
    **_plain(_picked_work, "loss", "nll_loss_forward nll_loss2d_forward", _picked_traffic),
    **_plain(_alignment_work, "loss", "_ctc_loss _cudnn_ctc_loss"),
    # Quantisation: scale, round.
    **_plain(
        per_output(2),
        "quantize",
        "quantize_per_tensor quantize_per_tensor_dynamic quantize_per_channel "
        "fake_quantize_per_tensor_affine_cachemask fake_quantize_per_channel_affine_cachemask "
        "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams _fake_quantize_learnable_per_tensor_affine "
        "_fake_quantize_learnable_per_channel_affine quantized_decomposed::quantize_per_tensor "
        "quantized_decomposed::quantize_per_channel",
    ),
    **_plain(
        per_output(1),
        "dequantize",
        "dequantize int_repr quantized_decomposed::dequantize_per_tensor quantized_decomposed::dequantize_per_channel",
    ),
    **_plain(per_output(1), "add", "quantized::add quantized::add_scalar"),
    **_plain(per_output(2), "add_relu", "quantized::add_relu"),
    **_plain(per_output(1), "mul", "quantized::mul quantized::mul_scalar"),
    **_plain(per_output(1), "relu", "quantized::relu6 quantized::hardswish quantized::leaky_relu quantized::sigmoid"),
    **_plain(per_output(2), "batch_norm", "quantized::batch_norm1d quantized::batch_norm2d quantized::batch_norm3d"),
}
