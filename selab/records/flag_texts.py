"""Every flag of a measurement: what was seen, what it means, and what to do about it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from selab.records.types import Flag

Cause = Literal[
    "throttled", "busy", "oversubscribed", "unsteady", "gpu_clock", "allocator", "gpu_allocator", "order", "unwatched"
]


@dataclass(frozen=True, kw_only=True)
class FlagText:
    """The words of one flag.

    Attributes:
        cause: the key in `CAUSES`; flags of one cause are reported once.
        seen: the observation, a template for `str.format`.
        means: the consequence for the result.
        do: the next step, a template as well.
    """

    cause: Cause
    seen: str
    means: str
    do: str

    def detail(self, **values: object) -> str:
        """Return `seen; means; do` with the values filled in."""
        return f"{self.seen}; {self.means}; {self.do}".format(**values)


CAUSES: Mapping[Cause, str] = MappingProxyType(
    {
        "throttled": "GPU throttled: the affected blocks were measured again; let it cool down.",
        "busy": "Machine busy: times are indicative, ratios less exact; stop other programs and measure again.",
        "oversubscribed": "More threads than cores: the threads wait for each other; use fewer --threads.",
        "unsteady": "Timings not steady: the speed changed during the run; wait for a quiet machine and measure again.",
        "gpu_clock": "GPU clock below its maximum or not constant: compare ratios, not times.",
        "allocator": "Many page faults: part of the time is the memory allocator's; leave out --free-heap.",
        "gpu_allocator": "GPU memory grew while measuring: some samples include allocations; warm up longer.",
        "order": "The order of the samples mattered: the interval is wider; let the machine cool or measure longer.",
        "unwatched": "GPU clocks and throttling were not monitored: install NVML (nvidia-ml-py) to see them.",
    }
)
"""Cause → one sentence for a reader, the most important first."""

FLAGS: Mapping[str, FlagText] = MappingProxyType(
    {
        # Seen while sampling on a CPU.
        "contention": FlagText(
            cause="busy",
            seen="other processes used {others:.1f} of {cores} cores during the measurement",
            means="they took time from the {threads} measured thread(s)",
            do="stop them and measure again",
        ),
        "neighbours": FlagText(
            cause="busy",
            seen="other processes used {others:.1f} of {cores} cores, next to the {threads} measured",
            means="they shared caches and memory bandwidth",
            do="stop them for exact times",
        ),
        "stolen_time": FlagText(
            cause="busy",
            seen="the host took {stolen:.2f} cores away",
            means="the virtual machine was paused while its clock ran on",
            do="measure on a quieter host",
        ),
        "oversubscribed": FlagText(
            cause="oversubscribed",
            seen="{threads} threads ran on {cores} cores",
            means="they wait for each other",
            do="use --threads {cores} or fewer",
        ),
        "page_faults": FlagText(
            cause="allocator",
            seen="{faults:.0f} page faults per second",
            means="the allocator returns freed memory to the system and requests it again, more in some processes than "
            "in others",
            do="leave out --free-heap",
        ),
        # Seen while sampling on a GPU.
        "voided": FlagText(
            cause="throttled",
            seen="{reason}",
            means="the ABBA blocks concerned were discarded and measured again",
            do="let the device recover before the next run",
        ),
        "power_capped": FlagText(
            cause="gpu_clock",
            seen="the GPU ran at its power limit",
            means="its clock was below the maximum",
            do="compare ratios, or lock the clocks",
        ),
        "clock_asymmetry": FlagText(
            cause="gpu_clock",
            seen="the SM clock was {baseline:.0f} MHz for the baseline and {variant:.0f} MHz for the variant",
            means="part of the ratio is due to the clock",
            do="lock the clocks with `nvidia-smi --lock-gpu-clocks`",
        ),
        "allocator_growth": FlagText(
            cause="gpu_allocator",
            seen="the allocator reserved {grown} more bytes of GPU memory during sampling",
            means="some samples include the allocation",
            do="warm up longer",
        ),
        "unwatched": FlagText(
            cause="unwatched",
            seen="{problem}",
            means="clocks and throttling were not monitored",
            do="install NVML (nvidia-ml-py)",
        ),
        # Computed from the samples.
        "no_steady_state": FlagText(
            cause="unsteady",
            seen="after {seconds:.3g} s and {calls} calls of warm-up, two equal windows still differed by 1 % or more",
            means="the machine had not reached a steady speed",
            do="stop other programs and measure again",
        ),
        "dispersion": FlagText(
            cause="busy",
            seen="the {arm}'s samples have a robust deviation of {spread}",
            means="something disturbs single samples",
            do="stop other programs and measure again",
        ),
        "outliers": FlagText(
            cause="busy",
            seen="{far} of {total} samples lie more than {limit:.0f} robust deviations from their median",
            means="something on this machine runs intermittently",
            do="stop it and measure again",
        ),
        "drift": FlagText(
            cause="unsteady",
            seen="from the first third of the run to the last, {changes}",
            means="the machine's speed changed",
            do="wait until it is steady and measure again",
        ),
        "order_effect": FlagText(
            cause="order",
            seen="the second sample of a pair is {effect} {direction} than the first",
            means="both orders are balanced, but the interval is wider",
            do="let the machine cool, or measure longer",
        ),
    }
)
"""Name of a flag, as in records → its words."""


def flag(name: str, **values: object) -> Flag:
    """Return a flag with its sentence.

    Args:
        name: a key of `FLAGS`.
        values: the fields of its templates.
    """
    return Flag(name=name, detail=FLAGS[name].detail(**values))


def causes(flags: Iterable[Flag]) -> list[str]:
    """Return one sentence per cause, each once, the most important first.

    A flag that this version does not know contributes its own detail, at the end.
    """
    found = list(flags)
    known = {FLAGS[one.name].cause for one in found if one.name in FLAGS}
    others = dict.fromkeys(f"{one.name}: {one.detail}" for one in found if one.name not in FLAGS)
    return [sentence for cause, sentence in CAUSES.items() if cause in known] + list(others)
