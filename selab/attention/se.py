"""The Squeeze-and-Excitation block (Hu et al., arXiv 1709.01507), its variants, and residual joins with SE."""

import sys
from sys import getrefcount
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selab.attention.base import Attention, batch_of_one, check_whole, has_other_width, quantised_like
from selab.attention.config import LATENT, Init, is_latent
from selab.errors import InsertionError, ModelError
from selab.kernels import cpu
from selab.kernels.cpu import BlockParams
from selab.kernels.deferred_bn import consume_relu, is_deferred, materialize, pending_norm, run_block, supported
from selab.kernels.dispatch import IMPLS, CachedDispatch, Impl, choose, has_hooks, holds_weights
from selab.kernels.ownership import Arrival
from selab.kernels.residual import ADD_RELU, FusedJoin, formula_of

GATES: dict[str, type[nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "hardsigmoid": nn.Hardsigmoid,
}
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU}

# (scale, offset) that turn a gate's value at zero into one, exactly in binary floating point. ReLU reaches one by its
# bias instead, for its slope at zero is zero.
_IDENTITY_AFFINE = {"sigmoid": (2.0, 0.0), "tanh": (1.0, 1.0), "hardsigmoid": (2.0, 0.0)}


def squeeze_width(channels: int, reduction: int, divisor: int = 1) -> int:
    """Return the squeeze width: `channels / reduction`, rounded to a multiple of `divisor`.

    Without a divisor the width is rounded down. With one it is rounded to the nearest multiple, at least one. If that
    would lose more than a tenth, it is rounded up.

    Source: the rounding by a divisor is that of MobileNetV3, Howard et al., arXiv 1905.02244.

    Raises:
        InsertionError: an argument that is no whole number or below 1, or a reduction larger than the channels.
    """
    check_whole(channels=channels, reduction=reduction, divisor=divisor)
    if min(channels, reduction, divisor) < 1:
        raise InsertionError(f"channels {channels}, reduction {reduction}, divisor {divisor}: each must be at least 1")
    if reduction > channels:
        raise InsertionError(
            f"reduction {reduction} is larger than the {channels} channels, so no squeeze channel "
            f"would be left; use at most {channels}"
        )
    return _rounded(channels / reduction, divisor)


def latent_width(channels: int, latent_channels: float, divisor: int = 1) -> int:
    """Return the squeeze width that is given itself, or below 1 as a fraction of the channels, which is rounded down.

    Source: SqueezeExcite2d of mosaicml/composer, composer/algorithms/squeeze_excite.

    Raises:
        InsertionError: a width above 1 that is no whole number.
    """
    check_whole(channels=channels, divisor=divisor)
    if not is_latent(latent_channels):
        raise InsertionError(f"latent_channels {latent_channels!r}: must be {LATENT}")
    return _rounded(latent_channels if latent_channels >= 1 else latent_channels * channels, divisor)


def _rounded(width: float, divisor: int) -> int:
    if divisor == 1:
        return int(width)
    rounded = max(divisor, int(width + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * width else rounded


class Squeeze(nn.Module):
    """mean(x) or max(x) over height and width, or x itself.

    Shapes: (N, C, H, W) → (N, C); without a squeeze (N, C, H, W) → (N, C, H, W).

    The mean is a plain reduction instead of adaptive pooling, which returned NaN in half precision with channels last
    (pytorch issue 43992).

    Source: arXiv 1709.01507, eq. 2 (mean), Table 11 (max) and Table 16 (none).
    """

    def __init__(self, kind: Literal["avg", "max", "none"] = "avg") -> None:
        super().__init__()
        if kind not in ("avg", "max", "none"):
            raise InsertionError(f"squeeze {kind!r}: allowed: avg, max, none")
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C), or (N, C, H, W) without a squeeze."""
        # torch.jit.script compiles no match statement.
        if self.kind == "avg":
            return x.mean((2, 3))
        if self.kind == "max":
            return x.amax((2, 3))
        return x

    def extra_repr(self) -> str:
        """Return the kind, for printing."""
        return self.kind


class SqueezeExcitation(CachedDispatch, Attention):
    """x * gate(fc2(relu(fc1(squeeze(x))))), one factor per channel.

    Shapes: input and output (N, C, H, W) or (C, H, W); squeezed (N, C); between the layers (N, squeeze_channels). With
    squeeze `none` there is a factor per position, and the same layers run as 1x1 convolutions over the feature map.

    With `init="he"` the layers start as in the paper. With `init="identity"` the block starts as the identity, bit for
    bit, and still learns. The second layer starts at zero, and the gate is rescaled so that it is one there with a
    non-zero slope: sigmoid and hardsigmoid are doubled, tanh is shifted by one, all with the range 0 to 2; ReLU starts
    with a bias of one. (A saturated sigmoid would return one too, but without a gradient.) The scale and offset are a
    buffer, `gate_affine`, so that a checkpoint without them does not load unnoticed. As with every layer that starts at
    zero, the first step changes the second layer only; the first layer follows from the second step on.

    Args:
        channels: C.
        reduction: C / squeeze_channels, before rounding.
        squeeze: reduces the feature map by its mean (`avg`), by its maximum (`max`), or not at all (`none`).
        gate: `sigmoid`, `tanh`, `relu` or `hardsigmoid`.
        activation: between the layers, `relu` or `silu` (as in EfficientNet, arXiv 1905.11946).
        bias: whether the two layers have biases. The authors' released models have them, the paper's ablations do not.
        divisor: the squeeze width is rounded to a multiple of it.
        squeeze_channels: the squeeze width, instead of reduction and divisor.
        init: `he` or `identity`.
        impl: the implementation; parameters and their names are the same for all. `reference`: the formula above,
            operation by operation. `torch`: few torch operations. `native`: compiled CPU code. `operator`: one custom
            operator, a Triton kernel on a GPU. `auto`: the fastest that can run, else the reference; `runtime` says
            which, and why. An implementation other than `auto` raises ModelError where it cannot run.

    Attributes:
        relu_in: whether the block applies a ReLU to its input first.
        can_overwrite: whether nobody else needs the input, so that the output may take its place in inference.
        kinds: squeeze, activation and gate.

    Raises:
        InsertionError: an argument out of range; the message says what is allowed.

    Source: arXiv 1709.01507, eq. 2 (squeeze), eq. 3 (excitation), eq. 4 (scale), Tables 10-12 and 16 (alternatives).
    """

    gate_affine: Tensor | None
    # `impl` before `selab.fuse` changed it; empty if it did not.
    unfused_impl: str = ""

    def __init__(
        self,
        channels: int,
        reduction: int = 16,
        *,
        squeeze: Literal["avg", "max", "none"] = "avg",
        gate: Literal["sigmoid", "tanh", "relu", "hardsigmoid"] = "sigmoid",
        activation: Literal["relu", "silu"] = "relu",
        bias: bool = True,
        divisor: int = 1,
        squeeze_channels: int | None = None,
        init: Init = "he",
        impl: Impl = "auto",
    ) -> None:
        super().__init__(channels, init)
        if impl not in IMPLS:
            raise InsertionError(f"impl {impl!r}: allowed: {', '.join(IMPLS)}")
        if gate not in GATES:
            raise InsertionError(f"gate {gate!r}: allowed: {', '.join(GATES)}")
        if activation not in ACTIVATIONS:
            raise InsertionError(f"activation {activation!r}: allowed: {', '.join(ACTIVATIONS)}")
        if init == "identity" and gate == "relu" and not bias:
            raise InsertionError(
                "init 'identity' with gate 'relu' needs bias=True: a ReLU is one only through its bias"
            )
        width = squeeze_width(channels, reduction, divisor) if squeeze_channels is None else squeeze_channels
        check_whole(squeeze_channels=width)
        if width < 1:
            raise InsertionError(f"squeeze_channels {width}: must be at least 1")
        self.squeeze_channels = width
        self.squeeze = Squeeze(squeeze)
        linear = PositionLinear if squeeze == "none" else nn.Linear
        self.fc1 = linear(channels, width, bias=bias)
        self.activation = ACTIVATIONS[activation]()
        self.fc2 = linear(width, channels, bias=bias)
        self.gate = GATES[gate]()
        affine = _IDENTITY_AFFINE.get(gate) if init == "identity" else None
        self.register_buffer("gate_affine", None if affine is None else torch.tensor(affine))
        self.impl: Impl = impl
        self.relu_in = False
        self.can_overwrite = False
        self.kinds = (squeeze, activation, gate)
        # The classes of the children; a child of another class was replaced and must be called.
        self._plain = (Squeeze, nn.Linear, ACTIVATIONS[activation], nn.Linear, GATES[gate])
        self._initialise(init, gate)

    def _initialise(self, init: Init, gate: str) -> None:
        for layer in (self.fc1, self.fc2):
            nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        if init == "identity":
            nn.init.zeros_(self.fc2.weight)
            if gate == "relu":
                nn.init.ones_(self.fc2.bias)

    def exchange_gate(self, gate: str) -> None:
        """Replace the gate; a block that starts as the identity gets the new gate's scale and offset.

        Args:
            gate: one of `GATES`; not `relu` for a block that starts as the identity, because it needs another bias.
        """
        self.gate = GATES[gate]().train(self.training)
        kinds: Any = (*self.kinds[:2], gate)
        self.kinds = kinds
        self._plain = (*self._plain[:4], GATES[gate])
        if self.gate_affine is not None:
            self.gate_affine = self.gate_affine.new_tensor(_IDENTITY_AFFINE[gate])

    def macs(self, height: int, width: int) -> int:
        """Return the MACs of one image (convention `all`): squeeze, two layers, activation, gate, scale."""
        channels, hidden = self.channels, self.fc1.out_features
        layers = 2 * channels * hidden + hidden + channels
        layers += 0 if self.gate_affine is None else channels
        area = height * width
        if self.squeeze.kind == "none":
            return (layers + self.channels) * area
        return layers + 2 * self.channels * area

    def excite(self, squeezed: Tensor) -> Tensor:
        """Return the factor of each channel (eq. 3): (N, C) → (N, C), or (N, C, H, W) → (N, C, H, W)."""
        by_position = self.kinds[0] == "none"
        dtype = None
        if isinstance(squeezed, Tensor):
            # Neither of them of one dtype, as in a half-precision network with some layers in float32.
            like = next(self.fc1.parameters(), squeezed)
            if like.dtype != squeezed.dtype and not torch.is_autocast_enabled(squeezed.device.type):
                dtype, squeezed = squeezed.dtype, squeezed.to(like.dtype)
        hidden = self.activation(_layer(squeezed, self.fc1, by_position))
        factor: Tensor = self.gate(_layer(hidden, self.fc2, by_position))
        if self.gate_affine is not None:
            factor = torch.addcmul(self.gate_affine[1], factor, self.gate_affine[0]).to(factor.dtype)
        return factor if dtype is None else factor.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) or (C, H, W) → the same shape.

        Raises:
            ModelError: any other shape, or the implementation that `impl` names cannot run here.
        """
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            y = x.dequantize() if x.is_quantized else x
            if y.dim() != 4 or has_other_width(y, self.channels):
                y = self._scripted(batch_of_one(y, self.channels)).squeeze(0)
            else:
                y = self._scripted(y)
            return quantised_like(y, x) if x.is_quantized else y
        else:  # noqa: RET505 - the compiler skips this branch, not what follows the statement
            compiling = torch.compiler.is_compiling()
            references = 0 if compiling else getrefcount(x)
            out = self.replay(x, references=references)
            if out is not None:
                return out
            # The proxy of a symbolic trace has no dimensions.
            if isinstance(x, Tensor) and not is_deferred(x):
                if x.is_quantized:
                    return quantised_like(self.forward(x.dequantize()), x)
                if x.dim() != 4 or self._refuses_width(x):
                    return self.forward(batch_of_one(x, self.channels)).squeeze(0)
            arrival = None if compiling else Arrival(self, sys._getframe(1), references)
            relu = consume_relu(x)
            gated = self.fused(x, arrival=arrival, relu=relu)
            if gated is not None:
                return gated
            x = materialize(x)
            if relu is not None or self.relu_in:
                x = x.relu_() if relu is not None or self.may_overwrite(x, arrival) else x.relu()
            factor = self.excite(self.squeeze(x))
            return x * (factor if self.kinds[0] == "none" else factor[:, :, None, None])

    def _refuses_width(self, x: Tensor) -> bool:
        # Pruning of whole channels changes the layers, and does not know `channels`.
        return has_other_width(x, self.channels) and x.shape[1] != getattr(self.fc1, "in_features", self.channels)

    def _scripted(self, x: Tensor) -> Tensor:
        """Compute the reference in what torch.jit.script compiles."""
        if self.relu_in:
            x = x.relu()
        factor: Tensor = self.gate(self.fc2(self.activation(self.fc1(self.squeeze(x)))))
        affine = self.gate_affine
        if affine is not None:
            factor = torch.addcmul(affine[1], factor, affine[0]).to(factor.dtype)
        return x * factor if factor.dim() == 4 else x * factor[:, :, None, None]

    def fused(
        self,
        x: Tensor,
        shortcut: Tensor | None = None,
        *,
        join: nn.Module | None = None,
        relu_out: bool = False,
        arrival: Arrival | None = None,
        relu: nn.Module | None = None,
    ) -> Tensor | None:
        """Run the block, and with a shortcut the join after it, in fewer passes; return None if only the reference can.

        Args:
            x: (N, C, H, W).
            shortcut: (N, C, H, W), added to the scaled feature map.
            join: the module whose addition is part of this call.
            relu_out: whether a ReLU follows the addition.
            arrival: the call of the module that received x.
            relu: the ReLU before the block that left its work to it, or None.

        Returns:
            (N, C, H, W).

        Raises:
            ModelError: the implementation that `impl` names cannot run here.
        """
        if self.impl == "reference":
            return None
        # Before the weights are looked at: a layer that was replaced or pruned may hold none of that name.
        reason = self.refuses()
        if reason:
            self._check_reference_allowed(reason)
            return None
        if join is not None and not is_deferred(x) and self._refuses_width(x):
            batch_of_one(x, self.channels)
        params = self._params(relu_in=relu is not None, relu_out=relu_out)
        x = supported(x)
        impl, reason = self._choose(x, shortcut, params)
        if impl == "reference":
            self._check_reference_allowed(reason)
            return None
        return run_block(
            self, impl, x, shortcut, params, layers=(self.fc1, self.fc2), join=join, arrival=arrival, relu=relu
        )

    def runtime(self, x: Tensor, shortcut: Tensor | None = None) -> tuple[Impl, str]:
        """Return the implementation that these tensors would take now, and the reason against a faster one (or empty).

        Args:
            x: (N, C, H, W) or (C, H, W).
            shortcut: as in `fused`.
        """
        if x.dim() != 4:
            x = batch_of_one(x, self.channels)
        reason = "requested" if self.impl == "reference" else self.refuses()
        return ("reference", reason) if reason else self._choose(x, shortcut, self._params())

    def _choose(self, x: Tensor, shortcut: Tensor | None, params: BlockParams) -> tuple[Impl, str]:
        impl, reason = choose(self.impl, x, shortcut, params)
        if impl == "torch" and x.dtype != params.w1.dtype and not torch.is_autocast_enabled("cpu"):
            dtypes = (str(one.dtype).removeprefix("torch.") for one in (params.w1, x))
            return "reference", "the weights are {}, the feature map is {}".format(*dtypes)
        return impl, reason

    def _check_reference_allowed(self, reason: str) -> None:
        if self.impl != "auto":
            raise ModelError(f"impl {self.impl!r}: {reason}; use impl='auto', which takes what can run")

    def refuses(self) -> str:
        """Return why only the reference can run, whatever the feature map; empty if others can.

        The other implementations read the weights of the two layers and call neither. So a layer of another class (a
        quantised one, LoRA's), one with hooks or one whose weight is computed (pruning, weight norm) must be called.
        """
        squeeze, _, gate = self.kinds
        if squeeze != "avg":
            return f"unsupported squeeze: {squeeze}"
        if gate not in cpu.GATES:
            return f"unsupported gate: {gate}"
        return self.why_called()

    def why_called(self) -> str:
        """Return why the layers must be called instead of their weights read; empty if they need not be."""
        parts: Any = self._modules
        for (name, part), kind in zip(parts.items(), self._plain, strict=True):
            if type(part) is not kind:
                return f"unsupported {name}: {type(part).__name__}"
        if "excite" in self.__dict__ or has_hooks(*parts.values()):
            return "a hook is registered on one of its layers"
        for name in ("fc1", "fc2"):
            if not holds_weights(parts[name]):
                return f"unsupported {name}: its weight is computed, as by pruning"
        return ""

    def _params(self, *, relu_in: bool = False, relu_out: bool = False) -> BlockParams:
        _, activation, gate = self.kinds
        scale, offset = (1.0, 0.0) if self._buffers["gate_affine"] is None else _IDENTITY_AFFINE[gate]
        modules: Any = self._modules
        one, two = modules["fc1"]._parameters, modules["fc2"]._parameters
        w1, b1, w2, b2 = one["weight"], one["bias"], two["weight"], two["bias"]
        return BlockParams(w1, b1, w2, b2, activation, gate, scale, offset, relu_in or self.relu_in, relu_out)

    def extra_repr(self) -> str:
        """Return the two widths, for printing."""
        return f"{self.channels} → {self.squeeze_channels}"


class PositionLinear(nn.Linear):
    """A fully connected layer over the channels at every position, computed as a 1x1 convolution.

    Shapes: (N, C, H, W) to (N, C', H, W).
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C', H, W)."""
        return F.conv2d(x, self.weight[:, :, None, None], self.bias)


def _layer(x: Tensor, layer: nn.Module, by_position: bool) -> Tensor:
    """Call a layer on (N, C), or at every position of (N, C, H, W)."""
    if not by_position or isinstance(layer, PositionLinear):
        out: Tensor = layer(x)
        return out
    # A layer that replaced ours takes the channels last.
    moved: Tensor = layer(x.movedim(1, -1)).movedim(-1, 1)
    return moved


class GatedJoin(nn.Module):
    """A residual block's join with SE on one of its three edges.

    `edge="branch"`: inner(se(branch), shortcut), the paper's standard block. `edge="shortcut"`: inner(branch,
    se(shortcut)), its SE-Identity. `edge="output"`: se(inner(branch, shortcut)), its SE-POST.

    Shapes: both inputs and the output (N, C, H, W) or (C, H, W).

    Source: arXiv 1709.01507, Fig. 3 and Fig. 5.
    """

    def __init__(self, inner: nn.Module, se: Attention, edge: Literal["branch", "shortcut", "output"]) -> None:
        super().__init__()
        self.inner = inner
        self.se = se
        self.edge = edge

    def forward(self, branch: Tensor, shortcut: Tensor) -> Tensor:
        """(N, C, H, W) or (C, H, W) twice → the same shape."""
        if self.edge == "branch":
            references = 0 if torch.compiler.is_compiling() else getrefcount(branch)
            joined = self._in_one(branch, shortcut, references)
            if joined is not None:
                return joined
        if self.edge == "branch":
            branch = self.se(branch)
        elif self.edge == "shortcut":
            shortcut = self.se(shortcut)
        added: Tensor = self.inner(branch, shortcut)
        return self.se(added) if self.edge == "output" else added

    def _in_one(self, branch: Tensor, shortcut: Tensor, references: int) -> Tensor | None:
        """Run scale, addition and ReLU in one pass; None if the join is another one, or its parts have hooks."""
        modules: Any = self._modules
        outer, se = modules["inner"], modules["se"]
        inner = outer.inner if type(outer) is FusedJoin else outer
        if not isinstance(se, SqueezeExcitation) or se.impl == "reference":
            return None
        if isinstance(branch, Tensor) and not is_deferred(branch) and branch.dim() != 4:
            return None
        if not torch.compiler.is_compiling() and has_hooks(outer, inner, se):
            return None
        joined = se.replay(branch, shortcut, join=inner, references=references)
        if joined is not None:
            return joined
        formula = formula_of(inner)
        if not formula or (not torch.compiler.is_compiling() and has_hooks(*inner.children())):
            return None
        pending_norm(branch)
        if branch.shape != shortcut.shape:
            return None
        arrival = None if torch.compiler.is_compiling() else Arrival(self, sys._getframe(2), references, depth=3)
        return se.fused(branch, shortcut, join=inner, relu_out=formula == ADD_RELU, arrival=arrival)

    def extra_repr(self) -> str:
        """Return the gated edge, for printing."""
        return f"edge={self.edge}"
