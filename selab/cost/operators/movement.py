"""Operators that move data or make it: bytes, no arithmetic, except for drawing random numbers and adding in place."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from selab.cost.operators.base import (
    Arguments,
    Arithmetic,
    Rule,
    Traffic,
    Work,
    argument,
    elements,
    nothing,
    per_input,
    per_output,
    table,
)

Moved = Sequence[tuple[Tensor, int]]


def _whole(*values: object) -> list[tuple[Tensor, int]]:
    """Return the tensors among these values, and in lists among them, each in full."""
    found: list[tuple[Tensor, int]] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append((value, value.numel()))
        elif isinstance(value, (list, tuple)):
            found.extend(_whole(*value))
    return found


def _gathered(table_at: int, *indices: int) -> Traffic:
    """Only the elements that are picked are read, each one once: as many as are written, at most the whole table."""

    def traffic(args: Arguments, out: Tensor) -> Moved:
        source = args[table_at]
        picked = (source, min(source.numel(), out.numel()))
        return [picked, *_whole(*(argument(args, at) for at in indices)), (out, out.numel())]

    return traffic


def _bag_traffic(args: Arguments, out: Tensor) -> Moved:
    weight, indices = args[0], args[1]
    rows = min(weight.numel(), indices.numel() * weight.shape[-1])
    return [(weight, rows), *_whole(indices, args[2], argument(args, 6)), (out, out.numel())]


def _written(_args: Arguments, out: Tensor) -> Moved:
    """Nothing is read, not even the tensor that is overwritten or that gives the shape."""
    return [(out, out.numel())]


def _copied_into(args: Arguments, out: Tensor) -> Moved:
    return [*_whole(args[1]), (out, out.numel())]


def _placed(value_at: int, index_at: int, *, adds: bool = False) -> Traffic:
    """In place: only the elements that are written move, and are read before if something is added to them."""

    def traffic(args: Arguments, out: Tensor) -> Moved:
        value, index = _whole(argument(args, value_at)), _whole(args[index_at])
        count = min(out.numel(), max((size for _, size in (*value, *index)), default=0))
        return [*value, *index, *[(out, count)] * (1 + adds)]

    return traffic


def _filled_rows(args: Arguments, out: Tensor) -> Moved:
    dim, index = args[1], args[2]
    length = out.shape[dim] if out.dim() else 1
    return [(index, index.numel()), (out, index.numel() * out.numel() // max(1, length))]


def _put_work(args: Arguments, _out: Tensor) -> Work:
    """Values that are accumulated cost an addition each."""
    return elements(args[2].numel() if argument(args, 3, False) else 0)


def _bag_work(args: Arguments, _out: Tensor) -> Work:
    return elements(args[1].numel() * args[0].shape[-1])


def _moving(name: str, names: str, traffic: Traffic | None = None) -> dict[str, Rule]:
    return table(Rule(name=name, work=nothing, linear=True, traffic=traffic), names)


# The operators that put values at places or add them there, with the positions of values and indices.
_PLACING = {"scatter": (3, 2), "index_copy": (3, 2)}
_PUTTING = {"index_put": (2, 1), "_index_put_impl": (2, 1), "_unsafe_index_put": (2, 1), "put": (2, 1)}
_ADDING = {
    "scatter_add": (3, 2),
    "index_add": (3, 2),
    "scatter_reduce": (3, 2),
    "index_reduce": (3, 2),
    "_unsafe_masked_index_put_accumulate": (3, 2),
}


def _placing(
    operators: Mapping[str, tuple[int, int]], work: Callable[[int], Arithmetic], adds: bool
) -> dict[str, Rule]:
    return {
        f"aten::{operator}{place}": Rule(
            name="scatter",
            work=work(value_at),
            linear="reduce" not in operator,
            traffic=_placed(value_at, index_at, adds=adds) if place else None,
        )
        for operator, (value_at, index_at) in operators.items()
        for place in ("", "_")
    }


MOVEMENT: dict[str, Rule] = {
    "aten::cat": Rule(name="cat", work=nothing, linear=True),
    "aten::clone": Rule(name="copy", work=nothing, linear=True),
    "aten::_to_copy": Rule(name="copy", work=nothing, linear=True),
    **_moving("copy", "copy_", _copied_into),
    **_moving("cat", "_chunk_cat block_diag"),
    **_moving(
        "copy",
        "flip roll rot90 repeat stack _stack tril triu tril_ triu_ copy slice_scatter select_scatter diagonal_scatter "
        "as_strided_scatter alias_copy as_strided_copy detach_copy diagonal_copy expand_copy narrow_copy permute_copy "
        "_reshape_alias_copy _reshape_copy select_copy slice_copy split_copy split_with_sizes_copy squeeze_copy t_copy "
        "transpose_copy unbind_copy unfold_copy unsqueeze_copy view_copy view_as_complex_copy view_as_real_copy "
        "lift lift_fresh_copy _lazy_clone _pin_memory diag_embed complex to_padded_tensor _to_dense "
        "_pack_padded_sequence _jagged_to_padded_dense_forward _padded_dense_to_jagged_forward "
        "conj_physical conj_physical_ _mkldnn_reshape _mkldnn_transpose to_mkldnn _efficientzerotensor",
    ),
    **_moving(
        "pad",
        "pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d "
        "replication_pad1d replication_pad2d replication_pad3d",
    ),
    **_moving("shuffle", "pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle im2col"),
    **_moving("gather", "embedding", _gathered(0, 1)),
    **_moving("gather", "index _unsafe_index take masked_select", _gathered(0, 1)),
    **_moving("gather", "_unsafe_masked_index", _gathered(0, 1, 2)),
    **_moving("gather", "index_select gather", _gathered(0, 2)),
    **_moving("gather", "repeat_interleave"),
    # An element that is read is added to its bag.
    **table(
        Rule(name="embedding_bag", work=_bag_work, traffic=_bag_traffic),
        "_embedding_bag _embedding_bag_forward_only",
    ),
    **_placing(_PLACING, lambda _: nothing, False),
    **_placing(_PUTTING, lambda _: _put_work, False),
    **_placing(_ADDING, lambda value_at: per_input(1, value_at), True),
    **_moving("scatter", "index_fill masked_scatter"),
    **_moving("scatter", "index_fill_", _filled_rows),
    **_moving("scatter", "masked_scatter_", _placed(2, 1)),
    **_moving(
        "fill",
        "zeros ones full zeros_like ones_like full_like new_zeros new_ones new_full zero zero_ fill fill_ arange range "
        "linspace logspace eye scalar_tensor tril_indices triu_indices bartlett_window blackman_window hamming_window "
        "hann_window kaiser_window _new_zeros_with_same_feature_meta",
        _written,
    ),
    # One per number that is drawn.
    **table(
        Rule(name="random", work=per_output(1), linear=True, traffic=_written),
        "rand rand_like randn randn_like randint randint_like randperm normal_ uniform_ random random_ exponential "
        "exponential_ cauchy cauchy_ geometric geometric_ log_normal log_normal_ uniform normal normal_functional "
        "_philox_normal _philox_normal_ _philox_uniform _philox_uniform_ from_file",
    ),
    **table(
        Rule(name="random", work=per_output(1), linear=True),
        "bernoulli bernoulli_ multinomial poisson binomial _standard_gamma _sample_dirichlet",
    ),
}


# These touch no data: views, uninitialised memory, changes of a tensor's form, and reading a single weight.
FREE = {
    f"aten::{name}"
    for name in (
        *("_unsafe_view", "unsafe_split", "unsafe_chunk", "unsafe_split_with_sizes"),
        *("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted"),
        *("as_strided_", "detach_", "squeeze_", "t_", "transpose_", "unsqueeze_", "swapaxes_", "swapdims_"),
        *("resize", "resize_", "resize_as_", "_resize_output_", "set_", "_neg_view_copy"),
        *("_local_scalar_dense", "is_same_size", "is_set_to", "is_pinned", "_has_same_storage_numel"),
        *("_assert_async", "_assert_tensor_metadata", "_functional_assert_async", "_assert_scalar", "_print"),
        *("sym_size", "sym_stride", "sym_numel", "sym_storage_offset", "_nested_tensor_size", "_fused_sdp_choice"),
        *("sym_constrain_range", "sym_constrain_range_for_size", "_has_compatible_shallow_copy_type"),
        *("_cudnn_rnn_flatten_weight", "_use_cudnn_ctc_loss", "_use_miopen_ctc_loss", "record_stream"),
        *("qscheme", "q_scale", "q_zero_point", "q_per_channel_axis"),
        *("q_per_channel_scales", "q_per_channel_zero_points"),
    )
} | {"prim::device", "prim::layout"}
