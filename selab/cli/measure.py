"""Commands that measure: profile, tax, roofline, timeline, machine."""

import dataclasses
import io
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from selab import units
from selab.cli.console import (
    StoppedError,
    announce_sites,
    builtins,
    check_outputs,
    escape_markup,
    open_console,
    params_of,
    print_insertion_notes,
    print_tables,
    reporting,
    resolve_job,
    write_json,
)
from selab.cli.options import (
    OF_RUNTIMES,
    OUTPUT,
    TIME,
    WHAT,
    WORKLOAD,
    Arch,
    EffortOptions,
    Format,
    Json,
    Look,
    Out,
    Replace,
    Verbose,
    WorkloadOptions,
    natural,
    option,
    seconds,
    with_options,
)
from selab.cli.signals import held_back
from selab.errors import SelabError
from selab.models import catalog
from selab.records.bounds import MOST_PROCESSES
from selab.records.estimate import LEAST_PROCESSES
from selab.records.types import PHASE_NAMES, PHASES, Device, Phase

if TYPE_CHECKING:
    from rich.console import Console

    from selab.bench.progress import Progress, Report
    from selab.experiments.job import Job
    from selab.experiments.profiling import Profile
    from selab.records.types import Record

RESULTS = Path("results")
# The time of a command counts from here: about when the program started.
STARTED = time.monotonic()


@with_options
def profile(
    arch: Arch,
    options: WorkloadOptions,
    effort: EffortOptions,
    cold: Annotated[bool, option("--cold", TIME, "On a GPU: flush the L2 cache before each call.")] = False,
    out: Out = RESULTS,
    replace: Replace = False,
    json_to: Json = None,
    svg: Annotated[
        Path | None,
        option("--svg", OUTPUT, "Also draw the output as an SVG picture.", metavar="FILE"),
    ] = None,
    look: Format = "rich",
    verbose: Verbose = False,
) -> None:
    """Measure a network against its baseline: cost, latency, memory."""
    request = options.request(arch, cold=cold, **effort.fields_of_request())
    if cold and request.device == "cpu":
        raise typer.BadParameter("flushes a GPU's cache; add --device cuda, or leave --cold out", param_hint="--cold")
    if svg is not None and svg.suffix.lower() != ".svg":
        raise typer.BadParameter(f"{svg}: a picture of the terminal ends in .svg", param_hint="--svg")
    job = resolve_job(request)
    from selab.experiments import profiling
    from selab.records import files, store

    growing = profiling.Profile(job, began=STARTED)
    path = growing.path(out)
    files.check_writable(path, replace=replace)
    if svg is not None:
        files.check_writable(svg, replace=replace)
    check_outputs(json_to)
    announce_sites(job.variant, profiling.sites_of(job))
    shown = _Shown(path=path, json_to=json_to, svg=svg, look=look, verbose=verbose)
    try:
        console = open_console(stderr=True)
        with reporting(console) as report:
            growing.run(_showing_counts(growing, console, report))
    except KeyboardInterrupt:
        raise StoppedError(f"interrupted; {_keep_partial(growing, shown)}") from None
    except BaseException:
        if growing.latency:
            store.save(growing.record(), store.partial_path(path))
        raise
    store.save(growing.record(), path)
    record = store.read_record(path)
    print_insertion_notes(job.variant, record.insertions, params_of(record.baseline_cost))
    _show_profile(record, shown)


def _showing_counts(growing: "Profile", console: "Console", report: "Report") -> "Report":
    """Return a report that shows the counted costs on a terminal as soon as they are there; times take longer."""
    from selab.experiments.profiling import COUNTED
    from selab.report.profiles import profile_table

    def tell(label: str, state: "Progress | None") -> object:
        if label != COUNTED:
            return report(label, state)
        # A log gets the table once, at the end.
        if console.is_terminal:
            console.print(profile_table(growing.record()), highlight=False)
        if not growing.expectation:
            return None
        if not console.is_terminal:
            return report(growing.expectation, None)
        console.print(escape_markup(growing.expectation), highlight=False)
        return None

    return tell


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Shown:
    """Where a profile's record goes, and how it is shown."""

    path: Path
    json_to: Path | None
    svg: Path | None
    look: Look
    verbose: bool


def _keep_partial(growing: "Profile", shown: _Shown) -> str:
    """Save and show what there is of an interrupted profile; return where it is."""
    from selab.records import store

    with held_back():
        if growing.cost is None or growing.baseline_cost is None:
            return "nothing was measured yet, and nothing was written"
        partial = store.partial_path(shown.path)
        store.save(growing.record(), partial)
        if str(shown.json_to) != "-":
            _show_profile(store.read_record(partial), dataclasses.replace(shown, path=partial, json_to=None, svg=None))
    phases = [phase for phase in PHASES if growing.latency.get(phase) or growing.latency_all_cores.get(phase)]
    if not phases:
        return f"no time was measured yet; the counted costs are in {partial}"
    return f"what was measured until then ({', '.join(PHASE_NAMES[phase] for phase in phases)}) is in {partial}"


def _show_profile(record: "Record", shown: _Shown) -> None:
    """Show the file that was written, not the memory: everyone who reads it sees the same."""
    from rich.console import Console

    from selab.records.files import write_atomically
    from selab.records.types import to_json
    from selab.report import profiles

    alone = str(shown.json_to) == "-"
    if alone:
        sys.stdout.buffer.write(to_json(record))
    elif shown.json_to is not None:
        write_atomically(shown.json_to, to_json(record))
    tables = [profiles.profile_table(record)]
    if record.cost.se.blocks:
        tables.append(profiles.stage_table(record.cost))
    if shown.look != "rich" and not alone:
        print_tables(tables, shown.look)
    consoles = [] if alone or shown.look != "rich" else [open_console()]
    if shown.svg is not None:
        consoles.append(Console(record=True, width=88, file=io.StringIO(), force_terminal=True, emoji=False))
    for console in consoles:
        for table in tables:
            console.print(table, highlight=False)
            console.print()
        for line in profiles.verdict_lines(record, verbose=shown.verbose):
            console.print(escape_markup(line), highlight=False, soft_wrap=False)
        console.print(f"\nrecord: {escape_markup(str(shown.path))}", highlight=False, soft_wrap=True)
    if shown.svg is not None:
        write_atomically(shown.svg, consoles[-1].export_svg(title=record.command).encode())


# ----------------------------------------------------------------------------------------------------------------- tax
@with_options
def tax(
    arch: Arch,
    options: WorkloadOptions,
    effort: EffortOptions,
    impl: Annotated[
        list[str] | None,
        option(
            "--impl",
            WHAT,
            "reference, torchvision, timm or fused; without_squeeze, without_excitation or without_scale leave one "
            "step out. With --runtime: spellings such as pool-conv, or late. Repeatable; all by default.",
            metavar="NAME",
        ),
    ] = None,
    out: Out = RESULTS,
    replace: Replace = False,
    json_to: Json = None,
    look: Format = "rich",
) -> None:
    """Measure the overhead of SE in several implementations against one baseline."""
    options.reject("is what tax measures: compare --impl reference with --impl fused", "fused")
    options.reject("is what tax compares in a runtime: leave it out, or name some with --impl", "spelling")
    threads = None if options.device == "cuda" else 1
    phases = (_step_phase(options),)
    job = resolve_job(options.request(arch, threads=threads, phases=phases, **effort.fields_of_request()))
    from selab.experiments import tax as experiments_tax
    from selab.experiments import tax_record
    from selab.records import files, store
    from selab.report import tax as report_tax

    allowed = experiments_tax.implementations_in(job.workload.runtime, is_graph=job.is_graph)
    implementations = experiments_tax.chosen_implementations(impl or (), allowed)
    asked = experiments_tax.TaxRequest(request=job.request, implementations=implementations)
    comparison = experiments_tax.Tax(asked)
    path = comparison.path(out)
    files.check_writable(path, replace=replace)
    check_outputs(json_to)
    announce_sites(job.variant, comparison.blocks)
    try:
        with reporting(open_console(stderr=True)) as report:
            record = comparison.run(report)
    except KeyboardInterrupt:
        raise StoppedError(
            f"interrupted; nothing was written: an interval needs {LEAST_PROCESSES} processes, or one long run"
        ) from None
    if comparison.interrupted:
        path = store.partial_path(path)
    tax_record.save_tax_record(record, path)
    record = tax_record.read_tax_record(path)
    if str(json_to) == "-":
        sys.stdout.write(files.read_text(path))
        return
    if json_to is not None:
        files.write_atomically(json_to, files.read_text(path).encode())
    print_tables(report_tax.tax_tables(record), look, f"record: {path}")
    if comparison.interrupted:
        raise StoppedError(f"interrupted; what was measured until then is in {path}")


def _step_phase(options: WorkloadOptions) -> Phase:
    """The one phase of a command that measures inference or a whole training step."""
    phases = set(options.phase or ["forward"])
    if phases == {"forward"}:
        return "forward"
    if phases == {"forward_backward"}:
        return "forward_backward"
    raise typer.BadParameter("takes one of forward and forward_backward here", param_hint="--phase")


# ------------------------------------------------------------------------------------------------ timeline and roofline
@with_options
def timeline(
    arch: Arch,
    options: WorkloadOptions,
    steps: Annotated[
        int,
        natural("--steps", TIME, "Recorded steps, after a warm-up.", most=MOST_PROCESSES),
    ] = 5,
    out: Out = RESULTS,
    replace: Replace = False,
    json_to: Json = None,
    look: Format = "rich",
) -> None:
    """Record a trace for TensorBoard and Perfetto; show where time goes."""
    options.reject("has no part in a timeline: one network is recorded", "baseline")
    options.reject("has no part in a timeline, which is PyTorch's", *OF_RUNTIMES)
    phase = _step_phase(options)
    if options.phase is None and options.mode == "train":
        phase = "forward_backward"
    if options.phase is None:
        # The phase says it already: forward is inference, and both passes are a step of training.
        options.mode = None
    job = resolve_job(options.request(arch, threads=1, phases=(phase,)))
    from selab.bench.runner import check_device
    from selab.experiments import timeline as experiments_timeline
    from selab.experiments.profiling import sites_of
    from selab.records import files
    from selab.report import traces

    check_device(job.workload.device, job.workload.dtype)
    path = experiments_timeline.trace_path(job, phase, out)
    files.check_writable(path, replace=replace)
    check_outputs(json_to)
    announce_sites(job.variant, sites_of(job))
    with reporting(open_console(stderr=True)) as report, redirect_stdout(sys.stderr):
        report(f"recording {units.counted(steps, 'step')} of {job.request.arch}", None)
        found = experiments_timeline.recorded(job, phase, steps=steps)
    experiments_timeline.write_trace(found, path, replace=replace)
    if json_to is not None:
        write_json({"trace": str(path), **dataclasses.asdict(found.timeline)}, json_to)
    if str(json_to) != "-":
        print_tables(traces.timeline_tables(job.request.arch, found.timeline), look)
        typer.echo("\n".join(("", *traces.how_to_look(path))), err=look != "rich")


@with_options
def roofline(
    options: WorkloadOptions,
    arch: Annotated[str | None, option("--arch", WHAT, "A network, as for `profile`.", metavar="NAME")] = None,
    every: Annotated[bool, option("--all", WHAT, "All networks: how far each is from its roofline.")] = False,
    preset: Annotated[
        str | None,
        option("--as", WORKLOAD, "Predict for another device.", metavar="DEVICE"),
    ] = None,
    budget: Annotated[
        float | None,
        seconds("--budget", TIME, "Seconds of repetition; 5 by default.", least=0.0),
    ] = None,
    out: Annotated[
        Path | None,
        option("--out", OUTPUT, "Also draw a picture to this file.", metavar="FILE"),
    ] = None,
    replace: Replace = False,
    json_to: Json = None,
    look: Format = "rich",
) -> None:
    """Compare each operator with the limits of this device."""
    if every == (arch is not None):
        raise typer.BadParameter("name a network, or give --all", param_hint="--arch")
    if every:
        _check_alone(options, {"--as": preset, "--out": out, "--budget": budget, "--replace": replace})
        return _all_rooflines(json_to, look)
    _check_roofline(options, preset, out)
    job = resolve_job(options.request(str(arch), threads=1, phases=("forward",)))
    from selab.experiments import roofline as experiments_roofline
    from selab.experiments.profiling import sites_of
    from selab.records.files import check_writable
    from selab.report import traces
    from selab.report.figures import registry
    from selab.report.figures import roofline as figure

    if out is not None:
        registry.check_file(out)
        check_writable(out, replace=replace)
    check_outputs(json_to)
    name, workload = job.request.arch, job.workload
    announce_sites(job.variant, sites_of(job))
    with reporting(open_console(stderr=True)) as report, redirect_stdout(sys.stderr):
        peaks, place = _peaks(job, preset, report)
        report(f"timing {name}" if preset is None else f"counting {name}", None)
        budget_s = 5.0 if budget is None else budget
        under = experiments_roofline.roofline_of(job, peaks, measured=preset is None, budget_s=budget_s)
    if out is not None:
        registry.draw(figure.roof(under, arch=name, workload=workload, place=place), out)
    if json_to is not None:
        facts = dataclasses.asdict(under)
        facts |= {"arch": name, "place": place, "predicted": preset is not None, "workload": builtins(workload)}
        write_json(facts, json_to)
    if str(json_to) != "-":
        table = traces.roofline_table(under, arch=name, workload=workload, place=place)
        print_tables([table], look, *([f"picture: {out}"] if out is not None else []))
    return None


def _check_alone(options: WorkloadOptions, others: dict[str, object]) -> None:
    """Refuse other options next to --all, which has one workload for all networks."""
    given = list(options.words().values())
    wrong = given + [option for option, value in others.items() if value not in (None, False)]
    if wrong:
        text = f"is one image in fp32 on one thread of the CPU; leave out {', '.join(wrong)}"
        raise typer.BadParameter(text, param_hint="--all")


def _check_roofline(options: WorkloadOptions, preset: str | None, out: Path | None) -> None:
    """Refuse what a roofline has no use for."""
    options.reject("has no part in a roofline: one network is compared with the device", "baseline")
    options.reject("has no part in a roofline, which is made of PyTorch's operators", *OF_RUNTIMES)
    options.reject("hides the operators that a roofline is made of; leave it out", "compiled", "fused")
    options.reject("is fixed: a roofline is of inference", "mode")
    if options.phase not in (None, ["forward"]):
        raise typer.BadParameter("is forward: a roofline is of inference", param_hint="--phase")
    if preset is None:
        return
    options.reject("has no part in a prediction, where nothing runs", "device", "threads", "hold_heap", "seed")
    if out is not None:
        raise typer.BadParameter("is a prediction, which has no picture; drop --out", param_hint="--as")


def _peaks(job: "Job", preset: str | None, report: Any) -> Any:
    """The peaks that operators are compared with, and the name of the place that has them."""
    from selab.bench import devices
    from selab.bench.machine import machine
    from selab.bench.roofline import measure_peaks
    from selab.bench.runner import check_device
    from selab.experiments.roofline import published_peaks

    workload = job.workload
    if preset is not None:
        published = devices.find_device(preset, workload.dtype)
        return published_peaks(published, workload.dtype), published.title
    check_device(workload.device, workload.dtype)
    here, threads = machine(workload.device), workload.threads
    report("measuring the peaks", None)
    peaks = measure_peaks(workload.device, workload.dtype, threads=threads)
    return peaks, here.gpu or f"{here.cpu}, {units.counted(threads, 'thread')}"


def _all_rooflines(json_to: Path | None, look: Look) -> None:
    """Compare every network here with its roofline."""
    from selab.bench.machine import machine
    from selab.bench.roofline import measure_peaks
    from selab.experiments import roofline as experiments_roofline
    from selab.records.acceptance import RoofDistances
    from selab.report import traces

    check_outputs(json_to)
    here = machine("cpu")
    with reporting(open_console(stderr=True)) as report, redirect_stdout(sys.stderr):
        report("measuring the peaks", None)
        peaks = measure_peaks("cpu", "fp32", threads=1)
        each = list(experiments_roofline.distances(catalog.installed(), peaks, report))
    good = tuple(one for one in each if not isinstance(one, SelabError))
    distances = RoofDistances(
        machine=here,
        place=f"{here.cpu}, 1 thread",
        flops_per_s=peaks.flops_per_s,
        bandwidths=peaks.bandwidths,
        networks=good,
        failed=len(each) - len(good),
    )
    if json_to is not None:
        write_json(builtins(distances), json_to)
    if str(json_to) != "-":
        print_tables([traces.distances_table(distances)], look)


# ------------------------------------------------------------------------------------------------------------- machine
def show_machine(
    device: Annotated[Device, option("--device", WHAT, "cpu or cuda.", metavar="NAME")] = "cpu",
    json_to: Json = None,
    look: Format = "rich",
) -> None:
    """Check this machine: what disturbs measurements, and what helps."""
    from selab.bench.runner import check_device
    from selab.experiments import doctor
    from selab.report import checks

    check_outputs(json_to)
    check_device(device)
    found = doctor.inspect(device)
    if json_to is not None:
        listed = [dataclasses.asdict(one) for one in doctor.problems(found)]
        around = dataclasses.asdict(found.surroundings)
        return write_json({"machine": builtins(found.machine), "surroundings": around, "problems": listed}, json_to)
    return print_tables(checks.machine_tables(found), look)
