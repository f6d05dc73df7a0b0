"""SimAM, an attention without parameters."""

from torch import Tensor

from selab.attention.base import MapBlock
from selab.attention.config import Init
from selab.errors import InsertionError


class SimAM(MapBlock):
    """x * sigmoid((x - mean)^2 / (4 (variance + e_lambda)) + 1/2), with a channel's mean and variance over positions.

    What differs from the rest of its map is kept, the rest is damped.

    Shapes: input and output (N, C, H, W) or (C, H, W).

    There are no parameters, so the block cannot start as the identity.

    Args:
        channels: C.
        e_lambda: added to the variance, above 0.
        init: `he` only.

    Raises:
        InsertionError: an e_lambda that is not above 0, or `init="identity"`.

    Source: Yang et al. 2021, SimAM, Proceedings of Machine Learning Research 139, Sec. 3; e_lambda 1e-4 is that of the
    release, ZjjConan/SimAM. The variance divides by one position less than there are.
    """

    def __init__(self, channels: int, *, e_lambda: float = 1e-4, init: Init = "he") -> None:
        super().__init__(channels, init)
        if init == "identity":
            raise InsertionError("init 'identity': simam has no parameters and cannot start as the identity; use 'he'")
        if isinstance(e_lambda, bool) or not isinstance(e_lambda, int | float) or not e_lambda > 0:
            raise InsertionError(f"e_lambda {e_lambda!r}: must be a number above 0")
        self.e_lambda = e_lambda

    def macs(self, height: int, width: int) -> int:
        """Return the MACs of mean, difference, square, variance, quotient, sum, gate and scale."""
        return (8 * height * width + 3) * self.channels

    def _gated(self, x: Tensor) -> Tensor:
        positions = x.shape[2] * x.shape[3]
        squares = (x - x.mean((2, 3), keepdim=True)).square()
        # A mean does not overflow in half precision where a sum does. Of one position the square is zero, and so must
        # be the variance; a condition would end a symbolic trace.
        variance = squares.mean((2, 3), keepdim=True) * (positions / (positions - 1 + 1e-9))
        return x * (squares / (4 * (variance + self.e_lambda)) + 0.5).sigmoid()

    def extra_repr(self) -> str:
        """Return channels and e_lambda, for printing."""
        return f"{self.channels}, e_lambda={self.e_lambda:g}"
