"""Measure one phase of any two modules against each other, in this process."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from selab.bench.latency import measure_phase, networks
from selab.bench.runner import mode_of
from selab.bench.sampler import Plan
from selab.models.inputs import Input, arguments
from selab.records import verdict
from selab.records.types import Latency, Phase, Workload

if TYPE_CHECKING:
    from selab.models.inputs import Drawn


def plan_for(workload: Workload, *, quick: bool, budget_s: float | None) -> Plan:
    """Return how long to measure.

    Args:
        workload: its device decides the method.
        quick: stop at ±1 %, after 15 s at most.
        budget_s: seconds of sampling, as `Plan.sampling`.
    """
    plan = Plan.for_gpu(quick=quick) if workload.device == "cuda" else Plan.for_cpu(quick=quick)
    return plan if budget_s is None else plan.sampling(budget_s)


def measure_pair(
    model: nn.Module,
    baseline: nn.Module,
    workload: Workload,
    plan: Plan,
    *,
    phase: Phase = "forward",
    seed: int = 0,
    names: tuple[str, str] = ("baseline", "model"),
) -> Latency:
    """Measure a module against another: control, comparison, control.

    Args:
        model: the variant; not changed.
        baseline: what it is compared with; not changed.
        workload: of both.
        plan: durations, target and budget.
        phase: what one call is.
        seed: of the input, and of the order of the samples.
        names: of baseline and model, for messages.

    Raises:
        DeviceError: the device is not there.
        ModelError: a network fails, or its output is not finite.
        OutOfMemoryError: the workload does not fit.
    """
    with networks(baseline, model, workload, seed=seed, names=names) as nets:
        raws = measure_phase(nets, phase, plan, seed=seed)
    headline = "wall" if workload.device == "cpu" else "eager_wall"
    raw = raws[headline]
    return verdict.summarise(
        phase=phase,
        method=headline,
        statistic=plan.statistic,
        threads=workload.threads,
        mode=mode_of(phase, workload),
        runs=[raw.run],
        controls=list(raw.controls),
        target_half_width=plan.target_half_width,
    )


class Fed(nn.Module):
    """Take one image, and call a network with all its inputs. It holds the network itself: whoever runs it copies it.

    Args:
        network: not changed.
        inputs: all inputs of the network; one is an image.
    """

    def __init__(self, network: nn.Module, inputs: Sequence[Input]) -> None:
        super().__init__()
        self.network = network
        self.training = network.training
        self._inputs = tuple(inputs)
        self._drawn: Drawn = {}

    def forward(self, image: Tensor) -> object:
        """Return what the network returns; the other inputs are drawn once."""
        args, kwargs = arguments(self.network, self._inputs, image, self._drawn)
        return self.network(*args, **kwargs)
