"""The frozen types of a measurement, and their conversion to and from JSON.

A record keeps raw samples. Values computed from them (ratio, interval, verdict) are stored as well, for other programs,
and checked against the samples whenever a record is read. Base units at full precision: seconds (`_s`), bytes
(`_bytes`), percent (`_pct`); rounding happens in `units` alone.
"""

import re
from typing import Any, Literal, TypeVar

import msgspec

from selab import units
from selab.errors import RecordError
from selab.records.bounds import fault_of, json_fault
from selab.records.display import DisplayedValues
from selab.records.exported import Exported
from selab.records.files import shown
from selab.records.frozen import Frozen as Frozen

SCHEMA = "selab.profile/1"
Device = Literal["cpu", "cuda"]
Dtype = Literal["fp32", "tf32", "bf16", "fp16", "int8"]
MemoryFormat = Literal["contiguous", "channels_last"]
Mode = Literal["auto", "train", "eval"]
On = Literal["fake", "cpu"]
Phase = Literal["forward", "backward", "forward_backward"]
Order = Literal["ABBA", "BAAB"]
Statistic = Literal["floor", "typical", "mean"]
Status = Literal["converged", "budget"]
Unit = Literal["pair", "process"]
VerdictKind = Literal["slower", "faster", "equal", "undecided", "no_result"]
TORCH, ONNX_RUNTIME = "torch", "onnxruntime"
RUNTIMES = (TORCH, ONNX_RUNTIME, "openvino", "executorch", "litert", "aoti")
"""What networks can be measured in."""
_T = TypeVar("_T")


# ---------------------------------------------------------------------------------------------------------------- cost
class Macs(Frozen, frozen=True, kw_only=True):
    """Multiply-accumulates of one forward pass (or one backward pass) under three named conventions.

    Attributes:
        conv_linear: convolutions, fully connected layers and matrix products, without biases.
        paper: `conv_linear` plus the additions of SE's global average pooling, as the tables of arXiv 1709.01507.
        all: every arithmetic operation, one per fused multiply-add that it needs (see `selab.cost.rules`).
    """

    conv_linear: int
    paper: int
    all: int


class StageCost(Frozen, frozen=True, kw_only=True):
    """What one stage of the SE blocks costs in a forward pass: MACs by the convention `all`, and bytes moved."""

    macs: int
    bytes: int


class SECost(Frozen, frozen=True, kw_only=True):
    """The forward cost of all SE blocks by stage (squeeze, excitation, scale), and their parameters."""

    blocks: int
    params: int
    squeeze: StageCost
    excitation: StageCost
    scale: StageCost


class OperatorCost(Frozen, frozen=True, kw_only=True):
    """One kind of operator (or one module): how often it ran and what that cost in a forward pass."""

    calls: int
    macs: int
    flops: int
    bytes: int


class Difference(Frozen, frozen=True, kw_only=True):
    """A difference between another counter's total and ours: the cause, and its amount in that counter's unit."""

    cause: str
    amount: int


class Counter(Frozen, frozen=True, kw_only=True):
    """Another counter compared with ours: `total = ours (in its unit) + sum(differences) + remainder`.

    Attributes:
        unit: what its total counts, `macs` or `flops` (2 per MAC).
        total: as its public interface reports it; None where it failed.
        ours: our `conv_linear` figure in the same unit.
        uncounted: operators that it does not count, with the number of calls.
        error: the reason why it failed, in one line; empty if it did not.
    """

    name: str
    version: str
    direction: Literal["forward", "forward_backward"]
    unit: Literal["macs", "flops"]
    total: int | None
    ours: int
    differences: tuple[Difference, ...] = ()
    remainder: int | None = None
    uncounted: dict[str, int] = msgspec.field(default_factory=dict)
    error: str = ""


class Cost(DisplayedValues, Frozen, frozen=True, kw_only=True):
    """The counted cost of a network; nothing in it was timed.

    Attributes:
        params: parameters, shared ones once; also weights and biases that quantised layers have packed.
        buffer_elements: elements of persistent buffers (the BN's running statistics and counters), shared ones once.
        macs: one forward pass.
        macs_backward: one backward pass (weight gradients and the input gradients that are needed).
        flops: one forward pass; 2 per MAC, 1 per other arithmetic operation.
        bytes: compulsory traffic of a forward pass: each operator's inputs read once, outputs written once.
        activations: elements of all convolution outputs (Radosavovic et al., arXiv 2003.13678).
        by_operator: operator name to its share.
        by_module: module path to its own share, without that of its children; empty unless it was asked for.
        unknown: operators without a counting rule, with the number of calls; their cost is not in the totals.
    """

    params: int
    buffer_elements: int
    macs: Macs
    macs_backward: Macs
    flops: int
    flops_backward: int
    bytes: int
    activations: int
    se: SECost
    by_operator: dict[str, OperatorCost]
    by_module: dict[str, OperatorCost]
    unknown: dict[str, int]
    counters: dict[str, Counter] = msgspec.field(default_factory=dict)

    def summary(self) -> str:
        """Return parameters, MACs, FLOPs and bytes in one line."""
        macs = f"{units.count(self.macs.paper)} MACs"
        line = f"{units.count(self.params)} parameters, {macs}, {units.count(self.flops)} FLOPs"
        unknown = f"; not counted: {', '.join(self.unknown)}" if self.unknown else ""
        return f"{line}, {units.size(self.bytes)} moved (forward pass){unknown}"

    def values(self) -> dict[str, Any]:
        """Return the totals; `macs` by each of the conventions."""
        return {
            "params": self.params,
            "buffer_elements": self.buffer_elements,
            **{f"macs_{name}": getattr(self.macs, name) for name in Macs.__struct_fields__},
            **{f"macs_backward_{name}": getattr(self.macs_backward, name) for name in Macs.__struct_fields__},
            "flops": self.flops,
            "flops_backward": self.flops_backward,
            "bytes": self.bytes,
            "activations": self.activations,
        }


# ------------------------------------------------------------------------------------------------------------- latency
class ABBABlock(Frozen, frozen=True, kw_only=True):
    """Four samples of two arms in the order ABBA or BAAB: two adjacent pairs of opposite order.

    Each statistic has four values in seconds per call, in the order in which they were taken. A sample is `k` calls:
    `floor` is its fastest call, `typical` its median call, `mean` its mean.
    """

    order: Order
    floor: tuple[float, float, float, float]
    typical: tuple[float, float, float, float]
    mean: tuple[float, float, float, float]


class Flag(Frozen, frozen=True, kw_only=True):
    """A remark on the quality of a measurement: it marks samples and never removes them."""

    name: str
    detail: str


class Run(Frozen, frozen=True, kw_only=True):
    """One paired measurement in one process, raw.

    Attributes:
        calls_per_sample: the same k in both arms.
        steady: True if the warm-up ended in two equal windows.
        status: `converged` if the interval reached the target width, `budget` if the time ran out first.
        flags: noted by the sampler while it ran: contention, throttling, allocator growth …
    """

    calls_per_sample: int
    warmup_calls: int
    warmup_s: float
    seed: int
    steady: bool
    status: Status
    elapsed_s: float
    quads: tuple[ABBABlock, ...]
    flags: tuple[Flag, ...] = ()


class Estimate(Frozen, frozen=True, kw_only=True):
    """The ratio variant / baseline with its exact 95 % interval, and the medians that it stands for."""

    baseline_s: float
    variant_s: float
    ratio: float
    ratio_low: float
    ratio_high: float
    pairs: int
    processes: int


class Latency(DisplayedValues, Frozen, frozen=True, kw_only=True):
    """One phase under one method, measured against the baseline.

    Attributes:
        method: `wall` on the CPU; `eager_wall`, `eager_event` or `graph` on a GPU. Never mixed.
        statistic: the sample statistic of the headline, `floor` (CPU) or `typical` (GPU).
        mode: of both networks in this phase.
        difference_s: the median of variant minus baseline over adjacent pairs, in seconds per call.
        noise_floor: the largest |ratio - 1| + half-width that a baseline showed against a second instance of itself.
        verdict: the conclusion in words.
        verdict_kind: the same for programs.
        runs: one per process, raw.
        controls: baseline against a second baseline, before and after each run, raw.
        error: the reason why there is no result, in one line; empty if there is one.
        unit: what the interval counts: pairs of samples of few long runs, or short runs, each in a fresh process.
    """

    phase: Phase
    method: str
    statistic: Statistic
    threads: int
    mode: Literal["train", "eval"]
    baseline_s: float | None = None
    variant_s: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    difference_s: float | None = None
    noise_floor: float | None = msgspec.field(default=None, name="control_floor")
    verdict: str = ""
    verdict_kind: VerdictKind = "no_result"
    flags: tuple[Flag, ...] = ()
    target_half_width: float = 0.005
    runs: tuple[Run, ...] = ()
    controls: tuple[Run, ...] = ()
    error: str = ""
    unit: Unit = "pair"

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the ratio; None where there is none."""
        return None if self.ratio_low is None or self.ratio_high is None else (self.ratio_low, self.ratio_high)

    def summary(self) -> str:
        """Return the phase and its verdict in one line."""
        return f"{PHASE_NAMES[self.phase]}: {self.verdict}"

    def values(self) -> dict[str, Any]:
        """Return the figures, without the raw samples."""
        raw = ("runs", "controls", "flags")
        kept = {name: getattr(self, name) for name in self.__struct_fields__ if name not in raw}
        return {**kept, "flags": ", ".join(dict.fromkeys(flag.name for flag in self.flags))}


# -------------------------------------------------------------------------------------------------------------- energy
class EnergyBlock(Frozen, frozen=True, kw_only=True):
    """Four samples in the order ABBA or BAAB: joules of one call."""

    order: Order
    joules: tuple[float, float, float, float]


class Energy(Frozen, frozen=True, kw_only=True):
    """Energy of one phase of a variant and its baseline.

    Attributes:
        counter: what counted it.
        blocks: raw.
        baseline_j: joules per image, the median of the blocks; `variant_j` likewise.
        ratio: variant over baseline.
        ratio_low: of the 95 % interval over blocks; `ratio_high` likewise.
        error: why there is no figure, or none from more blocks.
    """

    phase: Phase
    counter: str
    blocks: tuple[EnergyBlock, ...] = ()
    baseline_j: float | None = None
    variant_j: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    error: str = ""


# -------------------------------------------------------------------------------------------------------------- memory
class Memory(Frozen, frozen=True, kw_only=True):
    """Peak memory of one phase and the bytes kept for backward; `method` says how the peak is defined.

    Attributes:
        peak_forward_bytes: above what was allocated before the pass (weights and input not included).
        peak_forward_backward_bytes: the same for forward and backward, gradients included.
        saved_for_backward_bytes: distinct storages that autograd keeps between the two, parameters not included.
    """

    method: str
    peak_forward_bytes: int | None = None
    peak_forward_backward_bytes: int | None = None
    saved_for_backward_bytes: int | None = None
    error: str = ""


# ------------------------------------------------------------------------------------------------- circumstances, whole
class Workload(Frozen, frozen=True, kw_only=True, omit_defaults=True):
    """The conditions of a measurement; records of different workloads never share a column.

    Attributes:
        fused: True if both networks went through `selab.fuse`.
        held_heap: True if the C library kept freed memory, so that buffers are not returned and requested again.
        runtime: the runtime that ran the networks; omitted from JSON for `torch`, as in records that precede it.
        inputs: all inputs as `--input` takes them, of networks with several; omitted from JSON for others.
        spelling: of the SE blocks that were exported (`selab.deploy.spelling`), if it is not the runtime's own.
        float_blocks: True if the SE blocks of a quantised network stayed in fp32.
        frozen: True if torch.compile took the weights as constants.
    """

    batch: int
    input_chw: tuple[int, int, int]
    device: Device
    dtype: Dtype
    memory_format: MemoryFormat
    mode: Mode
    threads: int
    # Of a struct with omit_defaults only those of other runtimes may be omitted. A default from a factory is written.
    compiled: bool = msgspec.field(default_factory=bool)
    fused: bool = msgspec.field(default_factory=bool)
    held_heap: bool = msgspec.field(default_factory=bool)
    runtime: str = TORCH
    inputs: tuple[str, ...] = ()
    spelling: str = ""
    float_blocks: bool = False
    frozen: bool = False

    def __post_init__(self) -> None:
        # msgspec recognises a default by identity, and a name read from a file or an option is another object.
        if self.runtime == TORCH:
            msgspec.structs.force_setattr(self, "runtime", TORCH)

    @property
    def slug(self) -> str:
        """Return a name for files: only values that differ from the default workload are spelled out."""
        channels, height, width = self.input_chw
        size = f"{height}" if height == width else f"{height}x{width}"
        image = [f"c{channels}" if channels != 3 else "", size]
        # A name of an argument may hold anything; what a file's name cannot hold is left out.
        several = [re.sub(r"[^\w.]+", "_", one) for one in self.inputs]
        parts = [self.device, f"b{self.batch}", *(several or image), self.dtype]
        parts += ["nhwc" if self.memory_format == "channels_last" else ""]
        parts += [
            self.mode if self.mode != "auto" else "",
            ("frozen" if self.frozen else "compiled") if self.compiled else "",
        ]
        parts += ["fused" if self.fused else "", "held" if self.held_heap else ""]
        parts += [self.runtime if self.runtime != TORCH else "", self.spelling, "floatse" if self.float_blocks else ""]
        parts += [f"t{self.threads}" if self.device == "cpu" else ""]
        return "-".join(part for part in parts if part)

    def words(self, *, device: bool = True) -> list[str]:
        """Return the workload in words, for titles: batch, input, dtype, then what differs from the default.

        Args:
            device: whether to name device and threads, at the end.
        """
        shapes = self.inputs or ("x".join(map(str, self.input_chw)),)
        sizes = " and ".join(re.sub(r"(?<=\d)x(?=\d)", "×", one) for one in shapes)
        parts = [f"batch {self.batch}", sizes, self.dtype]
        parts += ["channels last" if self.memory_format == "channels_last" else ""]
        parts += ["compiled" if self.compiled else "", "frozen" if self.frozen else "", "fused" if self.fused else ""]
        parts += ["heap held" if self.held_heap else "", f"{self.mode} mode" if self.mode != "auto" else ""]
        parts += [self.runtime if self.runtime != TORCH else "", self.spelling]
        parts += ["SE in fp32" if self.float_blocks else ""]
        if device:
            parts += [self.device, f"{self.threads} threads" if self.device == "cpu" and self.threads > 1 else ""]
        return [part for part in parts if part]


class Machine(Frozen, frozen=True, kw_only=True):
    """The machine of a measurement; records of different machines never share a column.

    Attributes:
        name: a short name for folders, from the processor or the GPU.
        cores: logical processors that this process may use.
        quota_cores: processors' worth of time that a container may use; None where there is no limit.
    """

    name: str
    cpu: str
    cores: int
    memory_bytes: int
    gpu: str | None
    gpu_memory_bytes: int | None
    driver: str | None
    system: str
    python: str
    libraries: dict[str, str]
    governor: str | None = None
    quota_cores: float | None = None


class Insertion(Frozen, frozen=True, kw_only=True):
    """One attention block as it was inserted, or as it would be; `macs` by the convention `all`, of one image.

    Attributes:
        squeeze_channels: the width between its layers; None for a block that has none.
        block: its kind, as in the facts.
    """

    path: str
    placement: str
    channels: int
    squeeze_channels: int | None
    params: int
    height: int
    width: int
    macs: int
    block: str = "se"


class Record(Frozen, frozen=True, kw_only=True):
    """One profile: a variant and its baseline, counted and measured on one machine under one workload.

    Attributes:
        arch: the name that `--arch` takes, with its changes: `resnet50+reduction=8`.
        origin: the TOML of the variant if it is a user's own; empty for installed ones.
        baseline_origin: the same of the baseline.
        facts_hash: of both networks' specifications; if today's hash differs, the record is stale.
        command: the command line that measures the same again.
        complete: False if an interruption left something out.
        latency: the headline; on a CPU one thread, or as many as were asked for.
        latency_all_cores: on a CPU the second row, measured as with `--quick`.
        gpu_methods: on a GPU every method's figures, the headline's among them.
        energy: of forward, and of forward and backward.
        energy_left_out: why there is none.
        exported: of another runtime: what was written for it.
    """

    schema: str
    selab: str
    kind: Literal["profile", "count"]
    arch: str
    baseline: str | None
    origin: str
    baseline_origin: str
    facts_hash: str
    created: str
    command: str
    complete: bool
    workload: Workload
    machine: Machine
    seed: int
    cost: Cost
    baseline_cost: Cost | None = None
    insertions: tuple[Insertion, ...] = ()
    latency: dict[Phase, Latency] = msgspec.field(default_factory=dict)
    latency_all_cores: dict[Phase, Latency] = msgspec.field(default_factory=dict)
    gpu_methods: dict[Phase, dict[str, Latency]] = msgspec.field(default_factory=dict)
    memory: Memory | None = None
    baseline_memory: Memory | None = None
    energy: dict[Phase, Energy] = msgspec.field(default_factory=dict)
    energy_left_out: str = ""
    exported: Exported | None = None
    warnings: tuple[str, ...] = ()


_NUMBERS = re.compile(rb"\[\s*((?:-?\d[\d.eE+-]*,?\s*)+)\]")


def to_json(record: Record) -> bytes:
    """Return a record as UTF-8 JSON."""
    return lined_json(record)


def lined_json(value: Frozen) -> bytes:
    """Return indented UTF-8 JSON; a list of numbers stays on one line, so that raw samples can be read."""
    indented = msgspec.json.format(msgspec.json.encode(value), indent=1)
    return _NUMBERS.sub(lambda found: b"[" + b" ".join(found.group(1).split()) + b"]", indented) + b"\n"


def from_json(raw: bytes, *, where: str) -> Record:
    """Read a record strictly.

    Args:
        raw: UTF-8 JSON.
        where: the file's name, for the message.

    Raises:
        RecordError: not JSON, another schema, an unknown or missing field; names the file and the field.
    """
    return decoded(raw, Record, schema=SCHEMA, where=where, again="measure again")


_PROJECT = "selab."


def decoded(raw: bytes, kind: type[_T], *, schema: str, where: str, again: str) -> _T:
    """Decode JSON as one of the record types.

    Args:
        raw: UTF-8 JSON.
        kind: the record's type.
        schema: the required value of its field `schema`.
        where: the file's name, for the message.
        again: how to make such a record, for the message.

    Raises:
        RecordError: as `from_json`.
    """
    try:
        head: Any = msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError) as error:
        reason = json_fault(raw.decode(errors="replace"), error)
        raise RecordError(f"{where}: not a record: {reason}; {again} or restore the file") from None
    if fault := fault_of(head):
        raise RecordError(f"{where}: not a record: {fault}; {again} or restore the file")
    found = head.get("schema") if isinstance(head, dict) else None
    if not isinstance(found, str) or not found.startswith(_PROJECT):
        raise RecordError(
            f"{where}: schema is {shown(repr(found))}, which no record of selab has; name a file with {schema!r}"
        )
    if found.split("/")[0] != schema.split("/")[0]:
        raise RecordError(f"{where}: is a record of another kind, {shown(repr(found))}; expected {schema!r}")
    if found != schema:
        raise RecordError(f"{where}: schema is {shown(repr(found))}, this version reads {schema!r}; {again}")
    try:
        return msgspec.convert(head, kind)
    except msgspec.ValidationError as error:
        raise RecordError(f"{where}: {error}; {again} or restore the file") from None


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a record."""
    return msgspec.json.schema(Record)


PHASES: tuple[Phase, ...] = ("forward", "backward", "forward_backward")


PHASE_NAMES: dict[Phase, str] = {"forward": "forward", "backward": "backward", "forward_backward": "forward+backward"}


COST_ROWS: tuple[tuple[str, str, units.Format], ...] = (
    ("parameters", "params", units.count),
    ("MACs, conv+linear", "macs.conv_linear", units.count),
    ("MACs (paper's FLOPs)", "macs.paper", units.count),
    ("MACs, all operations", "macs.all", units.count),
    ("MACs backward, conv+linear", "macs_backward.conv_linear", units.count),
    ("bytes moved, forward", "bytes", units.size),
)
MEMORY_ROWS = (
    ("peak memory, forward", "peak_forward_bytes"),
    ("peak memory, fwd+bwd", "peak_forward_backward_bytes"),
    ("saved for backward", "saved_for_backward_bytes"),
)
