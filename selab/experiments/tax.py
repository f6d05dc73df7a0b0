"""Measure the SE overhead of several implementations (torchvision, timm, reference, fused) in one run."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import torch
from torch import nn

from selab._version import __version__
from selab.attention.se import SqueezeExcitation
from selab.bench.interleaved import Pair, measure_networks
from selab.bench.machine import machine, read_cpu
from selab.bench.profiler import STAGES, WHOLE, record_steps
from selab.bench.progress import Progress, Report
from selab.bench.roofline import measure_peaks
from selab.bench.runner import DTYPES, FULL_PRECISION, check_device, mode_of
from selab.bench.sampler import Plan
from selab.deploy.target import scratch
from selab.errors import InsertionError, SelabError, UnknownNameError, nearest
from selab.experiments.children import Found, Started, Turn, child, in_processes
from selab.experiments.job import Job, Request, resolve
from selab.experiments.schedule import Schedule, effort_of, expectation
from selab.experiments.tax_exported import OF_FILES, SPELLED, network_of, pairs_of, write_arms
from selab.experiments.tax_gathered import Gathered, TaxFound
from selab.experiments.tax_implementations import is_plain, reimplement
from selab.experiments.tax_record import (
    AGAIN,
    ALL,
    BASELINE,
    BUILT_IN,
    FUSED,
    PLAIN,
    REFERENCE,
    SCHEMA,
    WITHOUT,
    StageTimes,
    TaxRecord,
    tax_path,
    words_of,
)
from selab.fusion.external import external_blocks, external_insertions, remove_external_blocks
from selab.fusion.fuse import fuse
from selab.models import catalog
from selab.models.build import Built, build
from selab.models.provenance import bare_name
from selab.models.spec import Variant, pair_hash
from selab.records.estimate import LEAST_PROCESSES
from selab.records.types import TORCH, Frozen, Insertion, On, Phase, Workload

_OTHERS = "other implementations"
_NOT_COMPILED = "without_scale was skipped: torch.compile would remove the unused squeeze and excitation"


class TaxRequest(Frozen, frozen=True, kw_only=True):
    """The arguments of `selab tax`.

    Attributes:
        request: networks and workload, with exactly one phase.
        implementations: a subset of `ALL`.
    """

    request: Request
    implementations: tuple[str, ...] = ALL

    @property
    def allowed(self) -> tuple[str, ...]:
        """Return what can be compared in the runtime of the request."""
        return implementations_in(self.request.runtime)

    @property
    def phase(self) -> Phase:
        """Return what is timed as one call."""
        return self.request.phases[0]

    @property
    def command(self) -> str:
        """Return the command line of this request."""
        words = self.request.command("tax")
        chosen = () if self.implementations == self.allowed else self.implementations
        return words + "".join(f" --impl {_option(name)}" for name in chosen)


def implementations_in(runtime: str, *, is_graph: bool = False) -> tuple[str, ...]:
    """Return what can be compared in a runtime: implementations in PyTorch, spellings elsewhere.

    Args:
        runtime: of both networks.
        is_graph: whether the network is an ONNX file.
    """
    if is_graph:
        return OF_FILES
    return ALL if runtime == TORCH else SPELLED


def chosen_implementations(options: Sequence[str], allowed: tuple[str, ...] = ALL) -> tuple[str, ...]:
    """Return the implementations of `--impl` in their own order, each once; all of them without any option.

    Args:
        options: names as in `allowed`, or `fused` for the fused one.
        allowed: of `implementations_in`.

    Raises:
        UnknownNameError: there is no such implementation.
        InsertionError: a stage is left out of the reference, which is not measured itself.
    """
    known = {**{name: name for name in allowed}, **{_option(name): name for name in allowed}}
    for option in options:
        if option not in known:
            listed = f"{nearest(option, map(_option, allowed))}; allowed here: {', '.join(map(_option, allowed))}"
            raise UnknownNameError(f"--impl {option}: no such implementation{listed}")
    names = [known[option] for option in options]
    without = [name for name in names if name in WITHOUT.values()]
    if without and REFERENCE not in names:
        raise InsertionError(f"--impl {without[0]}: is compared with the reference; add --impl {REFERENCE}")
    return tuple(name for name in allowed if name in names) if names else allowed


def _option(name: str) -> str:
    """Return the value of `--impl` for an implementation's name in records."""
    return words_of(name) if name == FUSED else name


# ------------------------------------------------------------------------------------------------------------- running
class Tax:
    """One measurement of the SE overhead: the constructor validates the request, `run` measures.

    A network with built-in SE blocks is compared with itself without them; any other, with the baseline of its catalog
    entry or of the request.

    Attributes:
        baseline: None for the network without its built-in blocks.
        interrupted: whether the record that `run` returned was cut short by an interruption.

    Raises:
        SpecError: there is no baseline, or its input has another shape.
        InsertionError: the network has no SE block, or one of another kind; or its built-in blocks are unknown to
            `fuse`, or do not have the requested implementation.
        ModelError: the network fails on its input.
    """

    variant: Variant
    baseline: Variant | None
    blocks: tuple[Insertion, ...]

    def __init__(self, asked: TaxRequest, *, job: Job | None = None, files: Mapping[str, str] | None = None) -> None:
        """Look up the networks of a request, unless they are at hand in its job, or in files for its runtime."""
        request = asked.request
        self.asked = asked
        self.job = resolve(request) if job is None else job
        runtime = self.job.workload.runtime
        check_device(request.device, request.dtype, runtime=runtime)
        self._files: Mapping[str, str] = {} if files is None else files
        self._failed: Mapping[str, str] = {}
        self.variant, self.baseline = self.job.variant, None
        self.workload = self.job.workload
        with redirect_stdout(sys.stderr):
            built = build(self.variant, device="meta", input_chw=self.workload.input_chw)
        self.implementations = asked.implementations
        self._remarks: dict[str, str] = {}
        self._left_in = ""
        if self.job.is_graph:
            self.baseline = self.job.pair[1]
            self.blocks = built.insertions
        elif built.native and not built.insertions and request.baseline is None:
            self.implementations = asked.implementations if self._is_exported else _built_in_implementations(asked)
            self.blocks = _built_in_blocks(built, request.arch, self.workload, request.on)
            self._left_in = _left_in(built)
        else:
            _check_any(built, self.variant, request.arch)
            self.variant, self.baseline = self.job.pair
            self.blocks = built.insertions
            _check_blocks(built, request.arch)
            if self.baseline is not None and self.baseline.se is not None:
                raise InsertionError(
                    f"--baseline {self.baseline.name}: has SE blocks itself; the overhead is measured against a "
                    "network without them; compare these two with `selab profile`"
                )
        self.machine = machine(request.device)
        self.clock = time.monotonic
        self.began, self._cpu = self.clock(), read_cpu()
        self.interrupted = False

    def path(self, out: Path) -> Path:
        """Return the path of its record under this folder."""
        return tax_path(
            out,
            machine=self.machine.name,
            arch=self.variant.name,
            against=self.job.against,
            workload=self.workload.slug,
            phase=self.asked.phase,
        )

    def run(self, report: Report) -> TaxRecord:
        """Measure the bandwidth of copies, then all networks in one run, then profile the reference.

        Raises:
            SelabError: the baseline fails. The failure of another network is recorded in its pair.
            KeyboardInterrupt: before as many processes have ended as an interval needs; later it ends the measurement.
        """
        # The output of a user's network must not mix with ours.
        with redirect_stdout(sys.stderr):
            return self._run(report)

    @property
    def _is_exported(self) -> bool:
        return self.job.workload.runtime != TORCH

    def _run(self, report: Report) -> TaxRecord:
        with ExitStack() as files:
            if self._is_exported:
                self._write(files.enter_context(scratch()), report)
            return self._record(report)

    def _write(self, folder: Path, report: Report) -> None:
        """Write every network for the runtime; what cannot be written is left out with its reason."""
        self._files, self._failed, said = write_arms(
            self.job, self.implementations, self.blocks, self._made(variant=False), folder, report
        )
        self._remarks |= {str(place): text for place, text in enumerate(said)}
        # Some runtimes compile for minutes; that is not time to measure.
        self.began = self.clock()

    def _record(self, report: Report) -> TaxRecord:
        request, workload, phase = self.asked.request, self.workload, self.asked.phase
        report("measuring the bandwidth of copies", None)
        dtype = "fp32" if workload.dtype == "int8" else workload.dtype
        peaks = measure_peaks(workload.device, dtype, threads=workload.threads)
        measured = self._implementations()
        gathered = Gathered(job=self.job, pairs=self._pairs(measured))
        if request.in_this_process:
            gathered.add(0, self.measured(self._plan(len(gathered.pairs)), report, seed=request.seed))
        else:
            try:
                self._measure_in_processes(gathered, report)
            except KeyboardInterrupt:
                if gathered.processes < LEAST_PROCESSES:
                    raise
                self.interrupted = True
        profiled = None
        if (
            not self.interrupted
            and REFERENCE in measured
            and not workload.compiled
            and not gathered.has_failed(REFERENCE)
        ):
            report("profiling the reference", None)
            profiled = self._profiled(self._networks(measured)[REFERENCE]())
        return TaxRecord(
            schema=SCHEMA,
            selab=__version__,
            arch=self.variant.name,
            baseline=bare_name(self.variant.name) if self.baseline is None else self.baseline.name,
            origin=self.variant.file,
            baseline_origin="" if self.baseline is None else self.baseline.file,
            facts_hash=pair_hash(self.variant, self.baseline),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            command=self.asked.command,
            workload=workload,
            phase=phase,
            machine=self.machine,
            seed=request.seed,
            implementations=self.implementations,
            blocks=self.blocks,
            bandwidths=peaks.bandwidths,
            pairs=tuple(gathered.summaries()),
            profiled=profiled,
            saved_for_backward_bytes={
                name: size for name, size in gathered.saved.items() if name not in (AGAIN, *WITHOUT.values())
            },
            remarks=(
                *([self._left_in] if self._left_in else []),
                *(gathered.remarks[name] for name in (BASELINE, _OTHERS, FUSED) if name in gathered.remarks),
                *(self._remarks.values() if self._is_exported else ()),
                *(f"{words_of(name)}: left out: {why}" for name, why in self._failed.items()),
                *((_NOT_COMPILED,) if workload.compiled and measured != self.implementations else ()),
                *gathered.deaths,
                *(("interrupted: fewer processes than planned",) if self.interrupted else ()),
            ),
        )

    def measured(self, plan: Plan, report: Report, *, seed: int, shuffle: bool = False) -> TaxFound:
        """Measure all networks in one interleaved run in this process.

        Args:
            plan: durations.
            report: called with the progress.
            seed: of the input and of the orders.
            shuffle: whether to make the networks in an order of the seed, which decides where they lie in memory.

        Raises:
            SelabError: the baseline fails.
        """
        names = self._implementations()
        networks, phase = self._networks(names), self.asked.phase
        if shuffle:
            others = [name for name in networks if name != BASELINE]
            order = [BASELINE, *Random(f"tax {seed}").sample(others, len(others))]
            networks = {name: networks[name] for name in order}
        found = measure_networks(
            networks, self._pairs(names), self.workload, phase, plan, report, seed=seed, words_of=words_of
        )
        return TaxFound(
            runs=tuple((method, *pair, run) for method, runs in found.runs.items() for pair, run in runs.items()),
            failed=tuple((*where, why) for where, why in found.failed.items()),
            saved=found.saved_for_backward,
            remarks=self._remarks,
        )

    def _measure_in_processes(self, gathered: Gathered, report: Report) -> None:
        request = self.asked.request
        methods = 2 if request.device == "cuda" else 1
        schedule = Schedule(
            began=self.began,
            effort=effort_of(request),
            runs=len(gathered.pairs) * methods,
            clock=self.clock,
            control_share=0.0,
        )
        report(expectation(schedule, self._cpu, device=request.device, cores=self.machine.cores), None)

        def order_of(turn: Turn) -> TaxOrder:
            return TaxOrder(
                job=self.job,
                implementations=self._implementations() if self._is_exported else self.asked.implementations,
                seed=request.seed + turn.number,
                seconds=turn.sampling_s,
                files=dict(self._files),
            )

        for event in in_processes(schedule, __name__, order_of, TaxFound):
            if isinstance(event, Started):
                report(f"{event.where}: {gathered.words()}", None)
            elif isinstance(event, Found):
                gathered.add(event.number, event.what)
                report(f"{event.where}: {gathered.words()}", None)
            elif event.died:
                gathered.drop(event.number, event.remark)
                report(event.remark, None)

    def _plan(self, pairs: int) -> Plan:
        """Return the plan of one long run; its budget is that of one pair."""
        request, plan = self.asked.request, self.job.plan
        if request.budget_s is None:
            return plan
        return plan.sampling(request.budget_s / pairs / (2 if request.device == "cuda" else 1))

    def _implementations(self) -> tuple[str, ...]:
        """Return the implementations without the one that a compiler would change."""
        left_out = {WITHOUT["scale"]} if self.workload.compiled else set(self._failed)
        return tuple(name for name in self.implementations if name not in left_out)

    def _networks(self, implementations: Sequence[str]) -> dict[str, Callable[[], nn.Module]]:
        """Return a function that builds each network; one seed gives all of them the same weights in common layers."""
        if self._is_exported:
            return {
                name: partial(network_of, self.job, self._files[name]) for name in (BASELINE, AGAIN, *implementations)
            }

        def made(variant: bool, change: Callable[[nn.Module], object] | None = None) -> Callable[[], nn.Module]:
            def make() -> nn.Module:
                model = self._made(variant=variant)
                self._place(model)
                if change is not None:
                    change(model)
                return model

            return make

        networks = {
            BASELINE: made(False, self._fused(BASELINE)),
            AGAIN: made(False, self._fused(AGAIN)),
            PLAIN: made(False),
        }
        for name in implementations:
            networks[name] = made(True, self._change(name))
        return networks

    def _made(self, *, variant: bool) -> nn.Module:
        """Return the network with its blocks, or the baseline."""
        facts = self.variant if variant or self.baseline is None else self.baseline
        model = build(facts, seed=self.asked.request.seed, input_chw=self.workload.input_chw).model
        if not variant and self.baseline is None:
            remove_external_blocks(model)
        return model

    def _pairs(self, implementations: Sequence[str]) -> list[Pair]:
        return pairs_of(implementations) if self._is_exported else _pairs(implementations)

    def _place(self, model: nn.Module) -> None:
        """Move a network to its device and set its mode; what can be fused may depend on both."""
        model.to(self.workload.device).train(mode_of(self.asked.phase, self.workload) == "train")

    def _fused(self, name: str, *, blocks: bool = True) -> Callable[[nn.Module], None]:
        """Return a function that fuses a network, or only what surrounds its blocks, and records what was fused."""

        def change(model: nn.Module) -> None:
            done = fuse(model, input_nchw=(self.workload.batch, *self.workload.input_chw), blocks=blocks)
            chosen = self._runtime_words(model) if blocks else []
            self._remarks[name] = "; ".join([f"{words_of(name)}: {done}", *chosen])

        return change

    def _runtime_words(self, model: nn.Module) -> list[str]:
        """Return which implementations the blocks take; empty under torch.compile, where that is not known before."""
        if self.workload.compiled:
            return []
        found: Counter[tuple[str, str]] = Counter()
        workload, half = self.workload, self.workload.dtype not in FULL_PRECISION
        dtype = DTYPES[workload.dtype]
        layout = torch.channels_last if workload.memory_format == "channels_last" else torch.contiguous_format
        with torch.autocast(workload.device, dtype=dtype if half else torch.bfloat16, enabled=half):
            for block, where in self._choosing(model):
                shape = (workload.batch, where.channels, where.height, where.width)
                x = torch.empty(shape, device=workload.device, dtype=dtype).contiguous(memory_format=layout)
                found[block.runtime(x)] += 1
        return [
            f"{count} run by {impl}" + (f" ({reason})" if reason else "") for (impl, reason), count in found.items()
        ]

    def _choosing(self, model: nn.Module) -> list[tuple[Any, Insertion]]:
        """Return each block that chooses its implementation, with its insertion; none in a baseline."""
        if self.baseline is None:
            there = external_blocks(model)
            # A block that was not fused has no choice.
            return [(there[one.path], one) for one in self.blocks if hasattr(there.get(one.path), "runtime")]
        blocks = [module for module in model.modules() if isinstance(module, SqueezeExcitation)]
        return list(zip(blocks, self.blocks, strict=True)) if len(blocks) == len(self.blocks) else []

    def _profiled(self, model: nn.Module) -> StageTimes | None:
        workload, native = self.workload, [one.path for one in self.blocks] if self.baseline is None else []
        try:
            timeline = record_steps(
                model, workload, self.asked.phase, native=native, seed=self.asked.request.seed
            ).timeline
        except SelabError:
            return None  # it was timed, so it runs; the profiler's own memory may not be there
        names = (WHOLE,) if native else STAGES
        return StageTimes(total_s=timeline.total_s, stages={name: timeline.stages.get(name, 0.0) for name in names})

    def _change(self, name: str) -> Callable[[nn.Module], object]:
        """Return a function that applies the implementation; around the blocks, all are fused as the baseline is."""
        if name == FUSED:
            return self._fused(FUSED)

        def change(model: nn.Module) -> None:
            if name != REFERENCE:
                reimplement(model, name)
            self._fused(_OTHERS, blocks=False)(model)

        return change


def _check_any(built: Built, variant: Variant, arch: str) -> None:
    """Raise InsertionError for a network without SE blocks, with the command for one that has them."""
    if built.insertions or built.native:
        return
    others = [one.name for one in catalog.installed().values() if one.baseline == variant.name and one.se is not None]
    name = f"se_{variant.name}" if f"se_{variant.name}" in others else next(iter(others), "")
    step = f"--arch {name}" if name else f"--arch {arch} --insert auto"
    raise InsertionError(
        f"--arch {arch}: has no SE blocks to measure the overhead of; next: `selab tax {step}`, or insert some with "
        "--se or --insert"
    )


def _check_blocks(built: Built, arch: str) -> None:
    if built.native:
        raise InsertionError(
            f"--arch {arch}: has built-in SE blocks, which are compared with the same network without them; "
            "remove --baseline, --se and --insert"
        )
    kinds = [built.model.get_submodule(path) for path, module in built.model.named_modules() if is_plain(module)]
    if not kinds or len(kinds) < len(built.insertions):
        raise InsertionError(
            f"--arch {arch}: has blocks of other kinds; only the paper's block can be compared: with a mean as "
            "squeeze, as in se_resnet50, or inserted with --insert"
        )


def _built_in_implementations(asked: TaxRequest) -> tuple[str, ...]:
    """Return the implementations of built-in blocks; both of them by default.

    Raises:
        InsertionError: another one is requested.
    """
    others = [name for name in asked.implementations if name not in BUILT_IN]
    if others and asked.implementations != ALL:
        raise InsertionError(
            f"--impl {others[0]}: --arch {asked.request.arch} has built-in SE blocks, which are measured as "
            f"they are and fused: {' and '.join(f'--impl {_option(name)}' for name in BUILT_IN)}, or no --impl"
        )
    return tuple(name for name in BUILT_IN if name in asked.implementations)


def _built_in_blocks(built: Built, arch: str, workload: Workload, on: On) -> tuple[Insertion, ...]:
    """Return the built-in blocks that the baseline will lack.

    Raises:
        InsertionError: `fuse` knows none of them.
    """
    blocks = external_insertions(built.model, (1, *workload.input_chw), on=on)
    if not blocks:
        raise InsertionError(
            f"--arch {arch}: none of its built-in blocks is an SE block that selab.fuse knows "
            f"({_kinds(built, built.native)}); count them with `selab count`, or name a network with torchvision's or "
            "timm's SE"
        )
    return blocks


def _left_in(built: Built) -> str:
    """Return which built-in blocks are not SE, in words; empty if there are none."""
    known = external_blocks(built.model)
    others = [path for path in built.native if path not in known]
    return f"unknown to selab.fuse and left in every network: {_kinds(built, others)}" if others else ""


def _kinds(built: Built, paths: Sequence[str]) -> str:
    """Return the classes and their numbers: `16 EcaModule, 1 CbamModule`."""
    found = Counter(type(built.model.get_submodule(path)).__name__ for path in paths)
    return ", ".join(f"{count} {name}" for name, count in found.items())


def _pairs(implementations: Sequence[str]) -> list[Pair]:
    """Return the pairs to time: each over the baseline, and those without a stage over the reference."""
    pairs = [(BASELINE, AGAIN), (BASELINE, PLAIN)]
    pairs += [(REFERENCE if name in WITHOUT.values() else BASELINE, name) for name in implementations]
    both = {REFERENCE, FUSED} <= set(implementations)
    return [*pairs, *([(REFERENCE, FUSED)] if both else [])]


# ----------------------------------------------------------------------------------------------------- fresh processes
class TaxOrder(Frozen, frozen=True, kw_only=True):
    """The order of a fresh process.

    Attributes:
        seed: of its order of networks and samples.
        seconds: of sampling of each pair.
        files: of networks for another runtime: name → path.
    """

    job: Job
    implementations: tuple[str, ...]
    seed: int
    seconds: float
    files: dict[str, str] = msgspec.field(default_factory=dict)


def child_main() -> None:
    """Run the program of a process."""
    child(TaxOrder, _short_run)


def _short_run(order: TaxOrder, ready: Callable[[], object]) -> Iterator[TaxFound]:
    asked = TaxRequest(request=order.job.request, implementations=order.implementations)

    unsaid = [ready]

    def report(_label: str, state: Progress | None) -> None:
        # The first block says that all networks are ready; later ones must not write between samples.
        if state is not None and unsaid:
            unsaid.pop()()

    tax = Tax(asked, job=order.job, files=order.files)
    yield tax.measured(order.job.plan.short(order.seconds), report, seed=order.seed, shuffle=True)
