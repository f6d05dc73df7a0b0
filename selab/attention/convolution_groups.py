"""Several convolutions that work as one: sums that re-parameterisation merges, and convolutions of a map's parts.

RepVGG, MobileOne and FastViT train parallel convolutions with BatchNorms and sum them. For inference the sum becomes
one convolution, and whatever was attached to one side of it is gone.
"""

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from selab.attention.dataflow import BATCH_NORMS, Value, bits, common_ancestors, union_ancestors

# No branch of a sum that is merged into one convolution has as many operations.
_LONG = 64
# Methods with which a module replaces its branches by one convolution; timm calls the first three.
_MERGES = ("fuse", "reparameterize", "switch_to_deploy", "merge_kernel", "reparam")
_SCALES = {"mul", "div", "neg", "clone", "_to_copy", "alias", "detach"}
_SPLITS = {"split", "split_with_sizes", "chunk", "slice", "narrow", "unsafe_split", "unsafe_chunk"}


class ConvolutionGroups:
    """The groups of convolutions of a pass.

    Attributes:
        merged: sums that re-parameterisation will merge into one convolution.
        inside: a bit for each value inside a group; no block may stand there.
    """

    def __init__(self, values: Sequence[Value], modules: Mapping[str, nn.Module]) -> None:
        self.values, self.modules = values, modules
        self.convolutions = sum(1 << value.index for value in values if value.operation == "convolution")
        self.inside = 0
        self._sources: dict[int, Value] = {}
        self.merged: tuple[Value, ...] = tuple(self._merged_sums())
        self._mixed_convolutions()

    def __contains__(self, value: Value) -> bool:
        return value.index in self._sources

    def holds(self, value: Value) -> bool:
        """Return whether a value is inside a group."""
        return bool(self.inside >> value.index & 1)

    def source(self, value: Value) -> Value:
        """Return the feature map that a convolution or a group of convolutions reads."""
        return self._sources.get(value.index) or value.operands[0]

    def has_shortcut(self, total: Value) -> bool:
        """Return whether a merged sum also adds the feature map that its convolutions read."""
        source = self.source(total)
        return any(leaf is source for leaf in self._leaves(total))

    def is_depthwise(self, value: Value) -> bool:
        """Return whether a value is a depthwise convolution, or a group of those."""
        return value.depthwise or (value in self and all(one.depthwise for one in self._members(value)))

    def is_pointwise(self, value: Value) -> bool:
        """Return whether a value is a pointwise convolution, or a group of those."""
        return value.pointwise or (value in self and all(one.pointwise for one in self._members(value)))

    def _members(self, value: Value) -> list[Value]:
        inside = value.ancestors & ~self._sources[value.index].ancestors & self.convolutions
        return [self.values[index] for index in bits(inside)]

    def _merged_sums(self) -> list[Value]:
        merged: list[Value] = []
        # The outermost sum first: it contains the others of its block.
        for value in reversed(self.values):
            if self.holds(value) or not value.terms or not value.is_map:
                continue
            source = self._source_of_sum(value)
            if source is not None:
                merged.append(value)
                self._sources[value.index] = source
                self.inside |= value.ancestors & ~source.ancestors & ~(1 << value.index)
        return merged[::-1]

    def _source_of_sum(self, total: Value) -> Value | None:
        """Return the one feature map of which a sum is a linear function; None if it stays a sum."""
        leaves = list(self._leaves(total))
        common = common_ancestors(leaves)
        if not common:
            return None
        source = self.values[common.bit_length() - 1]
        weighted, operations = 0, set()
        for leaf in leaves:
            inside = leaf.ancestors & ~common
            if inside.bit_count() > _LONG:
                return None
            made = [self.values[index] for index in bits(inside)]
            if not all(one.linear and all(x is source or inside >> x.index & 1 for x in one.operands) for one in made):
                return None
            names = {one.operation for one in made}
            weighted += bool(names & {"convolution", *BATCH_NORMS})
            operations |= names
        if "convolution" not in operations:
            return None
        # A convolution beside an identity is an ordinary residual branch, unless its module says that it merges them.
        parallel = weighted > 1 and bool(operations & BATCH_NORMS)
        return source if parallel or self.merger(total) is not None else None

    def merger(self, total: Value) -> str | None:
        """Return the path of the outermost module, not the network itself, that merges the branches of a sum.

        It adds them itself, or returns what a module inside of it adds.
        """
        around = [one.path for one in total.returned_by if one.began <= total.index]
        paths = sorted({total.module, *around} - {""}, key=len)
        found = (path for path in paths if any(callable(getattr(self.modules[path], name, None)) for name in _MERGES))
        return next(found, None)

    def _leaves(self, total: Value) -> Iterator[Value]:
        """Return the terms of a sum; of a term that is a (scaled) sum itself and read only here, its terms."""
        for term in total.terms:
            value = term
            while value.operation in _SCALES and len(value.operands) == len(value.readers) == 1:
                value = value.operands[0]
            if value.terms and len(value.readers) == 1 and value.shape == total.shape:
                yield from self._leaves(value)
            else:
                yield term

    def _mixed_convolutions(self) -> None:
        """Note concatenations of convolutions of the parts of one feature map."""
        for value in self.values:
            if value.operation != "cat" or value.dim != 1 or not value.is_map or len(value.operands) < 2:
                continue
            parts = [_unpadded(one.operands[0]) for one in value.operands if one.operation == "convolution"]
            wholes = {part.operands[0] for part in parts if part.operation in _SPLITS}
            if len(wholes) == 1 and all(part.operation in _SPLITS for part in parts):
                (source,) = wholes
                if len(parts) == len(value.operands):
                    self._sources[value.index] = source
                    self.inside |= union_ancestors(value.operands) & ~source.ancestors


def _unpadded(value: Value) -> Value:
    return value.operands[0] if value.operation == "constant_pad_nd" else value
