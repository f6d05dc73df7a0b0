"""Find the ends of blocks in the values of a pass; `selab.attention.auto_sites` says which."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from selab.attention import levels
from selab.attention.base import Attention
from selab.attention.convolution_groups import ConvolutionGroups
from selab.attention.dataflow import INPUT, DataflowTrace, Value, bits, common_ancestors, union_ancestors
from selab.attention.gated_site import BLOCK, named_sites
from selab.attention.module_paths import common, holds, named, shared_paths

RESIDUAL, PARALLEL, SEPARABLE, CONCATENATION, STAGE = (
    "residual",
    "parallel",
    "depthwise-separable",
    "concatenation",
    "stage",
)
# A shortcut has no convolution or is a projection: a convolution, or a depthwise and a pointwise one.
_PROJECTION = 2
# Operations on two feature maps that end no block: products gate, and the others are attention or bookkeeping.
_NOT_SUMS = {*levels.JOINS, "mul", "div", "copy", "where", "index_put", "convolution", "eq"} - {"stack"}
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_SHUFFLES = {"view", "_unsafe_view", "reshape", "transpose", "permute", "clone", "pixel_shuffle", "channel_shuffle"}


@dataclass(frozen=True, kw_only=True)
class BlockEnd:
    """A module after which a block ends: its path, the kind of block, and how it was found."""

    path: str
    reason: str
    kind: str = RESIDUAL


@dataclass(frozen=True, kw_only=True)
class Ends:
    """The ends of blocks, in the order of the network.

    Attributes:
        found: modules that can be sites.
        left_out: descriptions of ends that cannot be sites, with reasons.
    """

    found: tuple[BlockEnd, ...]
    left_out: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Join:
    """An addition or concatenation of feature maps.

    Attributes:
        total: the result.
        branch: the value at which the block ends.
        inside: a bit for each value of the block that its other operands do not come from.
    """

    total: Value
    branch: Value
    inside: int


@dataclass(frozen=True, kw_only=True)
class _Separable:
    """A depthwise-separable block: its convolutions, the values after them, and the module that contains it."""

    depthwise: Value
    pointwise: Value
    chain: tuple[Value, ...]
    block: str


class Finder:
    """Find block ends in the values of a pass."""

    def __init__(self, trace: DataflowTrace) -> None:
        self.values = trace.values
        self.outputs = trace.outputs
        self.modules: Mapping[str, nn.Module] = dict(named_sites(trace.fakes.model))
        self.calls = trace.calls
        self.shared = shared_paths(trace.fakes.model)
        self.groups = ConvolutionGroups(self.values, self.modules)
        self.convolutions = self.groups.convolutions
        self.maps = [one for one in self.values if one.is_image and one.ancestors & self.convolutions]
        self.found: dict[str, tuple[int, BlockEnd]] = {}
        self.left_out: dict[str, None] = {}
        self.separables: list[_Separable] = []
        self.is_plain = True

    def ends(self) -> Ends:
        """Return the ends of all kinds, in the order of preference."""
        concatenations, resampled = self._concatenations()
        blocks, cells = self._blocks(concatenations)
        for addition in blocks:
            self._end_branch(addition)
        self._name_unknown_joins()
        in_branches = 0
        for addition in blocks:
            in_branches |= addition.inside
        self._end_separables(in_branches, concatenations)
        self._end_merged_sums(in_branches, concatenations)
        preferred = bool(self.found) and not self._are_parts_of_concatenations(concatenations)
        # Blocks of the same class with and without a shortcut: with one they end in an addition, and without at theirs.
        classes = {self._class_of(one) for one in cells}
        classes |= {self._class_of(one) for one in concatenations for block in blocks if _is_inside(one.total, block)}
        for one in concatenations:
            alike = one.total.module != "" and self._class_of(one) in classes
            if not preferred or (alike and not in_branches >> one.total.index & 1):
                self._end_concatenation(one)
        if not self.found:
            for module in resampled:
                self._leave_out(f"the concatenation in {named(module)}", levels.RESAMPLED)
            if resampled:
                self._name_levels()
            self._end_stages()
        if not self.found:
            self._name_tokens()
        in_order = sorted(self.found.values(), key=lambda one: one[0])
        return Ends(found=tuple(end for _, end in in_order), left_out=tuple(self.left_out))

    def _leave_out(self, what: str, why: str) -> None:
        self.left_out[f"{what}: {why}"] = None

    # ------------------------------------------------------------------------------------------- residual additions

    def _blocks(self, concatenations: Sequence[_Join]) -> tuple[list[_Join], list[_Join]]:
        """Return the additions that end residual blocks, and the concatenations to whose blocks additions belong."""
        additions, cells = [], {}
        for addition in self._additions():
            module = addition.total.module
            cell = [
                one for one in concatenations if one.total.module == module != "" and _is_inside(addition.total, one)
            ]
            if cell:
                cells[cell[0].total.index] = cell[0]
            else:
                additions.append(addition)
        blocks = [one for one in additions if not any(self._is_part_of(one, other) for other in additions)]
        return blocks, list(cells.values())

    def _additions(self) -> Iterator[_Join]:
        for value in self.values:
            place = f"the addition in {named(value.module)}"
            if value in self.groups or self.groups.holds(value):
                continue
            if not self._joins(value):
                if len(value.terms) > 1 and value.is_map and self._differ(value.terms):
                    self._leave_out(place, "it adds the network's input")
                continue
            if len(value.terms) > 2:
                self._leave_out(place, f"{len(value.terms)} feature maps are added, so no one is the branch")
                continue
            one, other = value.terms
            ahead = self._convolutions_beyond(one, other) - self._convolutions_beyond(other, one)
            branch, shortcut = (one, other) if ahead > 0 else (other, one)
            inside = branch.ancestors & ~shortcut.ancestors
            why = self._why_not_residual(branch, shortcut, ahead)
            if why:
                self._leave_out(place, why)
            else:
                yield _Join(total=value, branch=branch, inside=inside)

    def _why_not_residual(self, branch: Value, shortcut: Value, ahead: int) -> str:
        """Return why an addition is not the end of a residual block; nothing if it is."""
        inside, beside = branch.ancestors & ~shortcut.ancestors, shortcut.ancestors & ~branch.ancestors
        resampled = self._is_resampled(branch, inside) or self._is_resampled(shortcut, beside)
        own = (beside & self.convolutions).bit_count()
        if ahead == 0:
            return "both sides have as many convolutions, so neither is the branch"
        if not branch.is_image:
            return "its feature maps are not (N, C, H, W)"
        if own and resampled:
            return "it adds feature maps of different resolutions"
        if own > _PROJECTION:
            return f"both sides have convolutions of their own ({own} and {own + abs(ahead)}), so neither is a shortcut"
        if self._is_positional(inside):
            return "its branch is one depthwise convolution alone (a positional encoding)"
        return ""

    def _joins(self, value: Value) -> bool:
        """Return whether a value adds feature maps of one shape, not the input, with convolutions between them."""
        if len(value.terms) < 2 or not value.is_map or any(term.operation == INPUT for term in value.terms):
            return False
        return self._differ(value.terms)

    def _differ(self, values: Sequence[Value]) -> bool:
        """Return whether there are convolutions that some of these values come from and others do not."""
        every, common = union_ancestors(values), common_ancestors(values)
        return bool(every & ~common & self.convolutions)

    def _convolutions_beyond(self, value: Value, other: Value) -> int:
        return (value.ancestors & ~other.ancestors & self.convolutions).bit_count()

    def _is_resampled(self, value: Value, inside: int) -> bool:
        """Return whether a value has a higher resolution than one that it comes from; gates do not matter."""
        seen, following = set(), [value]
        while following:
            one = following.pop()
            if one.index in seen or not inside >> one.index & 1:
                continue
            if one.upsamples:
                return True
            seen.add(one.index)
            trunk = self._trunk(one)
            if trunk is None and one.operation == "mul":
                # Which factor is the gate is not known: the map is the one of the input's resolution, if any is.
                if all(self._is_resampled(factor, inside) for factor in one.operands if factor.is_map):
                    return True
                continue
            following += one.operands if trunk is None else (trunk,)
        return False

    def _is_positional(self, inside: int) -> bool:
        made = [self.values[index] for index in bits(inside)]
        made = [one for one in made if one.operation not in _SHUFFLES]
        return len(made) == 1 and made[0].depthwise

    def _is_part_of(self, addition: _Join, other: _Join) -> bool:
        """Return whether an addition is inside the branch of another one and no block of its own."""
        if not _is_inside(addition.total, other):
            return False
        module = addition.total.module
        if module == other.total.module:
            return True
        value: Value | None = addition.total
        while value is not None:
            if any(one.path == module for one in value.returned_by):
                return False
            value = self._following(value)
        return True

    def _end_branch(self, addition: _Join) -> None:
        place = addition.total.module
        value: Value | None = addition.branch
        while value is not None and addition.inside >> value.index & 1:
            path = self._site(value)
            if path is not None:
                block = common(place, path.rpartition(".")[0])
                return self._add(value, path, RESIDUAL, f"before the addition in {named(block)}")
            value = self._trunk(value) or value.uncropped or self._branch_of_sum(value)
        return self._leave_out(
            f"the addition in {named(place)}", "no single module to attach to at the end of its branch"
        )

    def _branch_of_sum(self, value: Value) -> Value | None:
        """Return the branch of a sum at the end of another branch: `x + f(x) + 0.1 * x`."""
        if len(value.terms) != 2 or value in self.groups:
            return None
        one, other = value.terms
        ahead = self._convolutions_beyond(one, other) - self._convolutions_beyond(other, one)
        return None if ahead == 0 else (one if ahead > 0 else other)

    def _name_unknown_joins(self) -> None:
        """Leave out, with their operation, values that depend on two feature maps in a way that is not known."""
        summed = {operand.index for value in self.values if value.terms for operand in value.operands}
        for value in self.values:
            along = value.operation == "cat" and value.is_map and value.dim != 1
            known = value.terms or (value.operation in _NOT_SUMS and not along) or value.index in summed
            maps = [one for one in value.operands if one.is_image and one.shape == value.operands[0].shape]
            if known or len(maps) < 2 or any(reader.terms for reader in self._later(value)) or not self._differ(maps):
                continue
            self.is_plain = False
            how = f"`{value.operation}`" + (f" along dimension {value.dim}" if along else "")
            place = f"the joined feature maps in {named(value.module)}"
            self._leave_out(place, f"{how} is neither an addition nor a concatenation of channels")

    def _later(self, stack: Value) -> Iterator[Value]:
        """Return the values after a stack of feature maps, across elementwise operations."""
        if stack.is_map:
            return
        for reader in stack.readers:
            yield reader
            if reader.elementwise:
                yield from self._later(reader)

    # ------------------------------------------------------------------------------------------ sums that are merged

    def _end_merged_sums(self, in_branches: int, concatenations: Sequence[_Join]) -> None:
        ended = {index for index, _ in self.found.values()} | {one.depthwise.index for one in self.separables}
        for total in self.groups.merged:
            chain = self._chain(total)
            inner = in_branches >> total.index & 1 or _around(total, concatenations) is not None
            if inner or any(value.index in ended for value in chain):
                # Inside another block, or a part or the end of a depthwise-separable one.
                continue
            self._end_merged(total, chain)

    def _end_merged(self, total: Value, chain: Sequence[Value]) -> None:
        place = f"the sum of parallel convolutions in {named(total.module)}"
        if self.groups.source(total).operation == INPUT:
            return self._leave_out(place, "they read the network's input (a stem)")
        if not total.is_image:
            return self._leave_out(place, "its feature maps are not (N, C, H, W)")
        merger = self.groups.merger(total)
        for value in reversed(chain):
            path = self._site(value, within=total.module if merger is None else merger)
            # What is inside the module that merges them may go with it; one with an SE block keeps what follows.
            free = (
                merger is None
                or path == merger
                or not holds(merger, path or "")
                or hasattr(self.modules[merger], BLOCK)
            )
            if path is not None and free:
                return self._add(value, path, PARALLEL, f"after {place}")
        shortcut = " with a shortcut (a residual addition)" if self.groups.has_shortcut(total) else ""
        return self._leave_out(
            place + shortcut, "re-parameterisation merges them into one convolution, and no module ends after their sum"
        )

    # ------------------------------------------------------------------------------------ depthwise-separable blocks

    def _depthwise_before(self, pointwise: Value) -> Value | None:
        """Return the depthwise convolution before a pointwise one, across elementwise operations and gates."""
        value: Value | None = self.groups.source(pointwise)
        while value is not None and not self.groups.is_depthwise(value):
            value = self._trunk(value)
        return value

    def _end_separables(self, in_branches: int, concatenations: Sequence[_Join]) -> None:
        for value in self.values:
            whole = self.groups.is_pointwise(value) and not self.groups.holds(value)
            depthwise = self._depthwise_before(value) if whole else None
            if depthwise is not None and not in_branches >> value.index & 1:
                block, chain = common(depthwise.module, value.module), tuple(self._chain(value))
                self.separables.append(_Separable(depthwise=depthwise, pointwise=value, chain=chain, block=block))
        for index, one in enumerate(self.separables):
            outer = _around(one.pointwise, concatenations)
            if any(self._expands(one, other) for other in self.separables[index + 1 : index + 2]):
                continue
            if outer is not None and not any(reader is outer.total for reader in one.chain[-1].readers):
                self._leave_out(
                    f"the depthwise-separable block {named(one.block)}",
                    f"it is inside the concatenating block {named(outer.total.module)}",
                )
            else:
                self._end_separable(one)

    def _are_parts_of_concatenations(self, concatenations: Sequence[_Join]) -> bool:
        """Return whether only separable blocks were found, and most are parts of concatenating blocks (VoVNet)."""
        parts = sum(any(_is_inside(one.pointwise, join) for join in concatenations) for one in self.separables)
        return all(end.kind == SEPARABLE for _, end in self.found.values()) and 2 * parts > len(self.separables)

    def _expands(self, one: _Separable, other: _Separable) -> bool:
        """Return whether the first is the expansion of an inverted block of which the second is the end."""
        owner = self._owner(one.block)
        if not owner or owner != self._owner(other.block):
            return False
        value: Value | None = self.groups.source(other.depthwise)
        while value is not None and value not in one.chain:
            value = self._trunk(value)
        wider = one.pointwise.shape[1] > one.depthwise.shape[1]
        return value is not None and wider and other.pointwise.shape[1] < other.depthwise.shape[1]

    def _owner(self, path: str) -> str:
        """Return the innermost module around a path, or at it, that is no plain container."""
        while path and isinstance(self.modules[path], _CONTAINERS):
            path = path.rpartition(".")[0]
        return path

    def _is_in_one_block(self, path: str, other: str) -> bool:
        around = self.modules[common(path, other)]
        is_sequence = type(around).forward is nn.Sequential.forward
        return not (is_sequence or isinstance(around, nn.ModuleList | nn.ModuleDict))

    def _end_separable(self, one: _Separable) -> None:
        readers = one.chain[-1].readers
        place = f"the depthwise-separable block {named(one.block)}"
        if readers and all(self._joins(reader) for reader in readers):
            # A shortcut of this form is not a block.
            return None
        # The next block of a sequence may concatenate its input with what it makes of it.
        if any(reader.operation == "cat" and self._is_in_one_block(reader.module, one.block) for reader in readers):
            return self._leave_out(place, "its feature map is concatenated with others")
        if not one.pointwise.is_image:
            return self._leave_out(place, "its feature maps are not (N, C, H, W)")
        if one.pointwise.shape[1] == 1:
            return self._leave_out(place, "its output has one channel (a mask or an attention map)")
        for value in reversed(one.chain):
            path = self._site(value, outside=one.depthwise.module)
            if path is not None:
                return self._add(value, path, SEPARABLE, f"after {place}")
        return self._leave_out(place, "no single module to attach to")

    def _chain(self, value: Value) -> list[Value]:
        chain = [value]
        while (following := self._following(chain[-1])) is not None:
            chain.append(following)
        return chain

    def _following(self, value: Value) -> Value | None:
        """Return the next elementwise operation (or gate) on a feature map, if all its readers lead there."""
        for reader in reversed([*value.readers, *value.detours]):
            if self._trunk(reader) is value and all(reader.comes_from(other) for other in value.readers):
                return reader
        return None

    # ------------------------------------------------------------------------------------------------ concatenations

    def _concatenations(self) -> tuple[list[_Join], list[str]]:
        """Return the concatenations that end blocks, and the modules that concatenate different resolutions.

        One that is inside another's block or that another one continues (as in a dense block) ends none.
        """
        joins, resampled = [], []
        for value in self.values:
            if value.operation != "cat" or value.dim != 1 or not value.is_map or value in self.groups:
                continue
            maps = [one for one in value.operands if one.is_map]
            if len(maps) < 2 or not self._differ(maps):
                continue
            inside = union_ancestors(maps) & ~common_ancestors(maps)
            if any(self._is_resampled(one, inside) for one in maps):
                resampled.append(value.module)
            elif value.is_image:
                joins.append(_Join(total=value, branch=value, inside=inside))
        last = [
            one
            for one in joins
            if not any(self._is_nested(one, other) or one.total in other.total.operands for other in joins)
        ]
        return last, resampled

    @staticmethod
    def _is_nested(join: _Join, other: _Join) -> bool:
        """Return whether a concatenation is part of another's block.

        A cell that reads the two cells before it contains neither of them, although some of its branches do not come
        from them.
        """
        if join.total.module == other.total.module != "":
            return join is not other and other.total.comes_from(join.total)
        return _is_inside(join.total, other) and holds(other.total.module, join.total.module)

    def _class_of(self, join: _Join) -> type:
        return type(self.modules[self._owner(join.total.module)])

    def _end_concatenation(self, join: _Join) -> None:
        total = join.total
        place = f"the concatenation in {named(total.module)}"
        chain = [total]
        while (following := self._mixing(chain[-1])) is not None:
            chain.append(following)
        images = [value for value in chain if value.is_image]
        block = ""
        # A container that concatenates (a dense block) may be part of a block, or be the block.
        for path in filter(None, (self._owner(total.module), total.module)):
            own = [value for value in images if any(one.path == path for one in value.returned_by)]
            if own:
                block, images = path, own[:1]
                break
        else:
            # Without a module of its own the block ends before the second convolution.
            second = [value.index for value in images if self.groups.is_pointwise(value)][1:2]
            images = [value for value in images if not second or value.index < second[0]]
        goes_on = any(one.operation == "cat" and one.dim == 1 for one in total.operands)
        for value in reversed(images):
            site = self._site(value, within="" if goes_on else block)
            if site is not None:
                return self._add(value, site, CONCATENATION, f"after {place}")
        return self._leave_out(place, "no single module to attach to")

    def _mixing(self, value: Value) -> Value | None:
        """Return the next operation of a block after its concatenation, if it alone reads the value."""
        following = self._following(value)
        if following is not None or len(value.readers) != 1:
            return following
        reader = value.readers[0]
        shuffles = reader.operation in _SHUFFLES and len(reader.operands) == 1
        return reader if shuffles or reader.pointwise else None

    # -------------------------------------------------------------------------------------------------------- stages

    def _end_stages(self) -> None:
        """Find the ends of stages, if each operation up to the last feature map reads one."""
        maps = self.maps
        if not maps or (maps[-1].ancestors & self.convolutions).bit_count() == 1:
            return
        joins = [value for value in self.values if levels.reads_several(value)]
        blocking = [value for value in joins if not levels.is_in_head(value, maps[-1])]
        # Added tokens get a line of their own.
        if blocking and not self.left_out and not any(one.terms and not one.is_image for one in blocking):
            self._leave_out(f"`{blocking[0].operation}` in {named(blocking[0].module)}", levels.NOT_PLAIN)
        if blocking or not self.is_plain:
            return
        before, begin = 0, 0
        for end in levels.before_resampling(maps[-1]):
            convolutions = end.ancestors & self.convolutions & ~before
            if convolutions and min(end.shape[2:]) > 1:
                self._end_stage(end, convolutions, begin)
            before |= convolutions
            begin = end.index + 1

    def _name_levels(self) -> None:
        """Leave out, in one line, the ends of the levels of an encoder and decoder."""
        maps, before, begin, paths = self.maps, 0, 0, []
        for end in levels.level_ends(maps):
            value: Value | None = end
            last = self.values[(end.ancestors & self.convolutions & ~before).bit_length() - 1]
            if end is maps[-1] and levels.is_head(last, self.values, self.outputs):
                value = last.operands[0]
            while value is not None and (path := self._site(value, begin=begin)) is None:
                value = self._trunk(value)
            if value is not None and path and min(end.shape[2:]) > 1:
                paths.append(path)
            before |= end.ancestors
            begin = end.index + 1
        if paths:
            self._leave_out(", ".join(dict.fromkeys(paths)), levels.LEVELS)

    def _end_stage(self, end: Value, convolutions: int, begin: int) -> None:
        value: Value | None = end
        last = self.values[convolutions.bit_length() - 1]
        if levels.is_head(last, self.values, self.outputs):
            if convolutions == 1 << last.index:
                return None
            value = last.operands[0]
        while value is not None and value.operation != INPUT:
            path = self._site(value, begin=begin)
            if path is not None:
                stage = common(*(self.values[index].module for index in bits(convolutions)))
                return self._add(value, path, STAGE, f"the last layer of a stage in {named(stage)}")
            value = self._trunk(value)
        return self._leave_out(f"the stage that ends in {named(end.module)}", "no single module to attach to")

    # ------------------------------------------------------------------------------------------------------- of all

    def _name_tokens(self) -> None:
        """Leave out, in one line, additions of tensors that are not feature maps."""
        tokens = [one for one in self.values if len(one.shape) > 2 and not one.is_image]
        sums = [one for one in tokens if len(one.terms) > 1 and not self._joins(one)]
        if sums:
            module, shape = named(sums[0].module), "×".join(map(str, sums[0].shape))
            more = f" and {len(sums) - 1} more" if len(sums) > 1 else ""
            self._leave_out(f"the addition in {module}{more}", f"its tensors are {shape}, not feature maps")

    def _trunk(self, value: Value) -> Value | None:
        """Return the feature map that an elementwise operation changes; of a gate and its operand, the operand.

        None for an operation that is not elementwise, or that adds two feature maps.
        """
        if value.around is not None:
            return value.around
        if not value.elementwise or self._joins(value):
            return None
        maps = [operand for operand in value.operands if operand.shape == value.shape]
        return next((one for one in maps if all(other.comes_from(one) for other in maps)), None)

    def _site(self, value: Value, *, outside: str | None = None, within: str = "", begin: int = 0) -> str | None:
        """Return the outermost module that computed a value, returned it before it was read, and can hold a block.

        A module that only passes the value on (Identity, DropPath in eval mode) is used if no other computed it.

        Args:
            value: its output.
            outside: the path of a convolution that the module should not contain, if there is another module.
            within: the path of the module to prefer to those outside of it.
            begin: the number of values before which the module should not begin, if there is another module.
        """
        if self.groups.holds(value):
            return None
        before = value.readers[0].index if value.readers else len(self.values)
        returns = [one for one in value.returned_by if one.path and one.ended <= before and self._is_free(one.path)]
        made = [one.path for one in returns if one.began <= value.index]
        if outside is not None:
            made = [path for path in made if not holds(path, outside)] or made[:1]
        made = [one.path for one in returns if one.path in made and one.began >= begin] or made
        if within in made:
            return within
        handed = [one.path for one in returns if one.began > value.index]
        return made[-1] if made else (handed[0] if handed else None)

    def _is_free(self, path: str) -> bool:
        """Return whether a module can hold a block: it runs once, and the block's name is not taken."""
        return self.calls[path] == 1 and path not in self.shared and not hasattr(self.modules[path], BLOCK)

    def _add(self, value: Value, path: str, kind: str, reason: str) -> None:
        own = [one.path for one in value.returned_by if isinstance(self.modules[one.path], Attention)]
        if own:
            self._leave_out(path, f"ends in an attention block already ({own[0]})")
        else:
            self.found.setdefault(path, (value.index, BlockEnd(path=path, kind=kind, reason=reason)))


def _is_inside(value: Value, join: _Join) -> bool:
    return bool(join.inside >> value.index & 1)


def _around(value: Value, concatenations: Sequence[_Join]) -> _Join | None:
    """Return the concatenation of the module that contains a value in one of its branches."""
    around = [join for join in concatenations if join.total.module and holds(join.total.module, value.module)]
    return next((join for join in around if _is_inside(value, join)), None)
