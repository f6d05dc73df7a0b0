"""Check the counted and described values of a record: what no count gives is refused when a record is read.

Latencies are computed again from their samples (`selab.records.verdict.check`); costs cannot be, without the network.
So every value must be in its range, and what is a sum must be the sum of its parts.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from selab.records.energy import mistaken_energy
from selab.records.exported import mistaken_exported
from selab.records.types import (
    Cost,
    Counter,
    Insertion,
    Latency,
    Machine,
    Memory,
    OperatorCost,
    Record,
    SECost,
    StageCost,
    Workload,
)

# No count of one pass is as large; a larger one would overflow other programs.
_MOST = 2**63 - 1


def mistaken_record(record: Record) -> Iterator[str]:
    """Yield what is impossible in a profile, apart from its latencies' figures: field and reason."""
    yield from mistaken_workload(record.workload)
    yield from mistaken_machine(record.machine)
    yield from mistaken_cost(record.cost, "cost")
    if record.baseline_cost is not None:
        yield from mistaken_cost(record.baseline_cost, "baseline_cost")
        if record.baseline is None:
            yield "baseline_cost: is there without a baseline"
    yield from mistaken_insertions(record.insertions, "insertions")
    added = sum(each.params for each in record.insertions)
    if added > record.cost.params:
        yield f"insertions: have {added} parameters, the whole network has {record.cost.params}"
    for name in ("memory", "baseline_memory"):
        memory = getattr(record, name)
        if memory is not None:
            yield from _mistaken_memory(memory, name)
    if record.exported is not None:
        yield from mistaken_exported(record.exported, "exported")
    for phase, energy in record.energy.items():
        yield from mistaken_energy(energy, record.workload.batch, f"energy.{phase}")
    for name in ("latency", "latency_all_cores"):
        for phase, latency in getattr(record, name).items():
            yield from mistaken_runs(latency, f"{name}.{phase}")
    for phase, methods in record.gpu_methods.items():
        for method, latency in methods.items():
            yield from mistaken_runs(latency, f"gpu_methods.{phase}.{method}")


# ----------------------------------------------------------------------------------------------------------------- cost
def mistaken_cost(cost: Cost, where: str) -> Iterator[str]:
    """Yield what no count of a network gives: field and reason.

    Args:
        cost: as stored.
        where: its place in the record.
    """
    counts = {name: value for name, value in cost.values().items() if not 0 <= value <= _MOST}
    if counts:
        name, value = next(iter(counts.items()))
        yield f"{where}.{name}: is {_shown(value)}, expected 0 or more"
        return
    for name, macs in (("macs", cost.macs), ("macs_backward", cost.macs_backward)):
        if not macs.conv_linear <= macs.all:
            yield f"{where}.{name}.conv_linear: is {macs.conv_linear}, more than all operations, {macs.all}"
        if not macs.conv_linear <= macs.paper:
            yield f"{where}.{name}.paper: is {macs.paper}, less than conv_linear, {macs.conv_linear}"
    yield from _mistaken_se(cost, f"{where}.se")
    totals = {"macs": cost.macs.all, "flops": cost.flops, "bytes": cost.bytes}
    for name in ("by_operator", "by_module"):
        yield from _mistaken_shares(getattr(cost, name), totals, f"{where}.{name}")
    yield from _mistaken_calls(cost.unknown, f"{where}.unknown")
    for name, counter in cost.counters.items():
        yield from _mistaken_counter(counter, cost, f"{where}.counters.{name}")


def _mistaken_se(cost: Cost, where: str) -> Iterator[str]:
    se: SECost = cost.se
    stages: dict[str, StageCost] = {name: getattr(se, name) for name in ("squeeze", "excitation", "scale")}
    values: dict[str, int] = {"blocks": se.blocks, "params": se.params}
    for name, stage in stages.items():
        values |= {f"{name}.macs": stage.macs, f"{name}.bytes": stage.bytes}
    for name, value in values.items():
        if not 0 <= value <= _MOST:
            yield f"{where}.{name}: is {_shown(value)}, expected 0 or more"
            return
        if not se.blocks and value:
            yield f"{where}.{name}: is {value}, without a block"
    if se.params > cost.params:
        yield f"{where}.params: is {se.params}, the whole network has {cost.params}"
    for name, whole in (("macs", cost.macs.all), ("bytes", cost.bytes)):
        part = sum(getattr(stage, name) for stage in stages.values())
        if part > whole:
            yield f"{where}: its stages have {part} {name}, the whole network has {whole}"


def _mistaken_shares(shares: Mapping[str, OperatorCost], totals: Mapping[str, int], where: str) -> Iterator[str]:
    for key, share in shares.items():
        for name in ("calls", *totals):
            if not 0 <= getattr(share, name) <= _MOST:
                yield f"{where}.{key}.{name}: is {_shown(getattr(share, name))}, expected 0 or more"
                return
    for name, total in totals.items():
        found = sum(getattr(share, name) for share in shares.values())
        if shares and found != total:
            yield f"{where}: its {name} are {found} together, the total is {total}"


def _mistaken_calls(calls: Mapping[str, int], where: str) -> Iterator[str]:
    for name, count in calls.items():
        if not 1 <= count <= _MOST:
            yield f"{where}.{name}: is {_shown(count)}, expected at least 1 call"


def _mistaken_counter(counter: Counter, cost: Cost, where: str) -> Iterator[str]:
    yield from _mistaken_calls(counter.uncounted, f"{where}.uncounted")
    ours = cost.macs.conv_linear
    if counter.direction == "forward_backward":
        ours += cost.macs_backward.conv_linear
    ours *= 2 if counter.unit == "flops" else 1
    if counter.ours != ours:
        yield f"{where}.ours: is {_shown(counter.ours)}, the cost gives {ours}"
    if counter.total is None:
        return
    if not 0 <= counter.total <= _MOST:
        yield f"{where}.total: is {_shown(counter.total)}, expected 0 or more"
        return
    explained = counter.ours + sum(each.amount for each in counter.differences) + (counter.remainder or 0)
    if counter.total != explained:
        yield f"{where}.total: is {counter.total}, ours with all differences and the remainder is {_shown(explained)}"


# -------------------------------------------------------------------------------------------------------- circumstances
def mistaken_workload(workload: Workload) -> Iterator[str]:
    """Yield what is impossible in a workload: field and reason."""
    for name, value in (("batch", workload.batch), ("threads", workload.threads)):
        if not 1 <= value <= _MOST:
            yield f"workload.{name}: is {_shown(value)}, expected at least 1"
    if not all(1 <= size <= _MOST for size in workload.input_chw):
        yield f"workload.input_chw: is {_shown(workload.input_chw)}, expected sizes of at least 1"


def mistaken_machine(machine: Machine) -> Iterator[str]:
    """Yield what is impossible in a machine: field and reason."""
    if not 1 <= machine.cores <= _MOST:
        yield f"machine.cores: is {_shown(machine.cores)}, expected at least 1"
    for name in ("memory_bytes", "gpu_memory_bytes", "quota_cores"):
        value = getattr(machine, name)
        if value is not None and not 0 <= value <= _MOST:
            yield f"machine.{name}: is {_shown(value)}, expected 0 or more"


def mistaken_insertions(insertions: tuple[Insertion, ...], where: str) -> Iterator[str]:
    """Yield what is impossible in a list of blocks: field and reason.

    Args:
        insertions: the blocks.
        where: their place in the record.
    """
    for index, block in enumerate(insertions):
        for name, least in (("channels", 1), ("height", 1), ("width", 1), ("params", 0), ("macs", 0)):
            if not least <= getattr(block, name) <= _MOST:
                yield f"{where}[{index}].{name}: is {_shown(getattr(block, name))}, expected at least {least}"
        if block.squeeze_channels is not None and not 1 <= block.squeeze_channels <= _MOST:
            yield f"{where}[{index}].squeeze_channels: is {_shown(block.squeeze_channels)}, expected at least 1"


def _mistaken_memory(memory: Memory, where: str) -> Iterator[str]:
    for name in ("peak_forward_bytes", "peak_forward_backward_bytes", "saved_for_backward_bytes"):
        value = getattr(memory, name)
        if value is not None and not 0 <= value <= _MOST:
            yield f"{where}.{name}: is {_shown(value)}, expected 0 or more"


def mistaken_runs(latency: Latency, where: str) -> Iterator[str]:
    """Yield what is impossible in the circumstances of raw runs, beside their samples: field and reason.

    Args:
        latency: with its runs.
        where: its place in the record.
    """
    if latency.threads < 1:
        yield f"{where}.threads: is {_shown(latency.threads)}, expected at least 1"
    if not 0 < latency.target_half_width < math.inf:
        yield f"{where}.target_half_width: is {_shown(latency.target_half_width)}, expected a number above 0"
    for name in ("runs", "controls"):
        for index, run in enumerate(getattr(latency, name)):
            place = f"{where}.{name}[{index}]"
            if run.calls_per_sample < 1:
                yield f"{place}.calls_per_sample: is {_shown(run.calls_per_sample)}, expected at least 1"
            if run.warmup_calls < 0:
                yield f"{place}.warmup_calls: is {_shown(run.warmup_calls)}, expected 0 or more"
            for key in ("warmup_s", "elapsed_s"):
                if not 0 <= getattr(run, key) < math.inf:
                    yield f"{place}.{key}: is {_shown(getattr(run, key))}, expected 0 or more"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
