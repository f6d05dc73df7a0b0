"""A finished comparison with the costs and latencies of its two networks; imports no torch."""

from dataclasses import dataclass, field

from selab.records.types import Cost, Latency, Phase, Record
from selab.training.record import AccuracyRecord


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A comparison's record, and what its two networks cost.

    Attributes:
        costs: of both networks, by name, for one image of the data's size; empty if a network is not available.
        forward: the profile of one image's forward pass, variant against baseline; None if there is none.
        step: the profile of one batch's forward and backward pass, as it was trained; None where there is none.
    """

    record: AccuracyRecord
    costs: dict[str, Cost] = field(default_factory=dict)
    forward: Record | None = None
    step: Record | None = None

    @property
    def forward_latency(self) -> Latency | None:
        """Latency of one image, forward."""
        return _latency(self.forward, "forward")

    @property
    def step_latency(self) -> Latency | None:
        """Latency of one training batch, forward and backward."""
        return _latency(self.step, "forward_backward")


def _latency(profile: Record | None, phase: Phase) -> Latency | None:
    return None if profile is None else profile.latency.get(phase)
