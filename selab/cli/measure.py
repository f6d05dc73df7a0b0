"""Commands that measure: profile, tax, roofline, timeline, machine."""

import dataclasses
import io
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from selab.cli.console import (
    builtins,
    check_outputs,
    find,
    open_console,
    plain,
    print_parts,
    reporting,
    write_json,
)
from selab.cli.networks import tell_found_sites
from selab.cli.options import (
    Arch,
    ChannelsLast,
    Compiled,
    Device,
    Dtype,
    HoldHeap,
    Input,
    Insert,
    Json,
    Mode,
    Phase,
    Positive,
    Se,
    StepMode,
    StepPhase,
    input_chw,
    network_address,
)
from selab.errors import SelabError
from selab.models import catalog

if TYPE_CHECKING:
    from selab.experiments.profiling import Profile
    from selab.records.types import Record


def profile(
    arch: Arch,
    se: Se = None,
    insert: Insert = None,
    baseline: Annotated[str | None, typer.Option(help="Compare with this instead of the variant's own.")] = None,
    device: Device = Device.cpu,
    batch: Positive = 1,
    input_size: Input = None,
    resolution: Annotated[int | None, typer.Option(min=1, help="Height and width of the input.")] = None,
    dtype: Dtype = Dtype.fp32,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="NHWC instead of NCHW.")] = False,
    mode: Mode = Mode.auto,
    compiled: Annotated[bool, typer.Option("--compile", help="Through torch.compile.")] = False,
    fused: Annotated[bool, typer.Option("--fused", help="Both networks through selab.fuse: SE made cheap.")] = False,
    hold_heap: HoldHeap = False,
    phase: Annotated[list[Phase] | None, typer.Option(help="Measure only this; repeat it for several.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Stop at ±1 % or after 15 s of sampling, instead of ±0.5 % or 60 s.")
    ] = False,
    budget: Annotated[
        float | None, typer.Option(min=0.1, help="Seconds of sampling for each phase; its two controls take half each.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; by default 1, and beside it a quick row on all cores.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Fresh processes per figure; 3 for what you publish.")] = 1,
    cold: Annotated[bool, typer.Option("--cold", help="On a GPU: flush the L2 cache before each call.")] = False,
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="The record goes to OUT/<machine>/<arch>.<workload>.json.")] = Path(
        "results"
    ),
    replace: Annotated[bool, typer.Option("--replace", help="Measure again where a record exists.")] = False,
    json_to: Json = None,
    svg: Annotated[Path | None, typer.Option(help="Also draw what was shown as an SVG picture.")] = None,
) -> None:
    """Count and measure a network against its baseline: cost, latency with its interval, memory."""
    if cold and device is Device.cpu:
        raise typer.BadParameter("flushes a GPU's cache; give --device cuda, or leave it away", param_hint="--cold")
    if svg is not None and svg.suffix.lower() != ".svg":
        raise typer.BadParameter(f"{svg}: a picture of the terminal ends in .svg", param_hint="--svg")
    arch = network_address(arch, se, insert)
    find(arch)
    if baseline is not None:
        find(baseline, option="--baseline")
    from selab.experiments import profiling
    from selab.experiments.job import Request, resolve
    from selab.records import store

    options: dict[str, Any] = {"phases": tuple(one.value for one in phase)} if phase else {}
    request = Request(
        arch=arch,
        baseline=baseline,
        device=device.value,
        batch=batch,
        input_chw=input_chw(input_size),
        resolution=resolution,
        dtype=dtype.value,
        memory_format="channels_last" if channels_last else "contiguous",
        mode=mode.value,
        compiled=compiled,
        fused=fused,
        held_heap=hold_heap,
        threads=threads,
        quick=quick,
        budget_s=budget,
        seed=seed,
        processes=processes,
        cold=cold,
        **options,
    )
    growing = profiling.Profile(resolve(request))
    path = growing.path(out)
    store.check_writable(path, replace=replace)
    check_outputs(svg, json_to)
    tell_found_sites(arch, growing.sites())
    try:
        with reporting(open_console(stderr=True)) as report:
            growing.run(report)
    except KeyboardInterrupt:
        raise SelabError(f"interrupted; {_keep_partial(growing, path)}") from None
    except Exception:
        if growing.latency:
            _keep_partial(growing, path)
        raise
    store.save(growing.record(), path)
    _show_profile(store.read_record(path), path, json_to=json_to, svg=svg)


def _keep_partial(growing: "Profile", path: Path) -> str:
    """Saves what there is of a profile that ended early; says what was done."""
    from selab.records import store

    if growing.cost is None:
        return "nothing was measured yet, and nothing was written"
    partial = store.partial_path(path)
    store.save(growing.record(), partial)
    return f"what was measured until then is in {partial}"


def timeline(
    arch: Arch,
    se: Se = None,
    insert: Insert = None,
    device: Device = Device.cpu,
    batch: Positive = 1,
    input_size: Input = None,
    resolution: Annotated[int | None, typer.Option(min=1, help="Height and width of the input.")] = None,
    dtype: Dtype = Dtype.fp32,
    channels_last: ChannelsLast = False,
    mode: Annotated[StepMode, typer.Option(help="eval: inference; train: forward and backward.")] = StepMode.eval,
    steps: Annotated[int, typer.Option(min=1, help="Recorded ones, after some that warm up.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    out: Annotated[Path, typer.Option(help="The trace goes to OUT/<machine>/timeline/….")] = Path("results"),
    replace: Annotated[bool, typer.Option("--replace", help="Record again where a trace exists.")] = False,
    json_to: Json = None,
) -> None:
    """Record a few steps for TensorBoard and Perfetto, SE's stages as named ranges; show where the time goes."""
    arch = network_address(arch, se, insert)
    find(arch)
    from selab.bench.runner import check_device
    from selab.experiments import timeline as experiments_timeline
    from selab.experiments.job import Request, resolve
    from selab.records import store
    from selab.report import traces

    check_device(device.value)
    request = Request(
        arch=arch,
        device=device.value,
        batch=batch,
        input_chw=input_chw(input_size),
        resolution=resolution,
        dtype=dtype.value,
        memory_format="channels_last" if channels_last else "contiguous",
        threads=threads,
    )
    phase: Any = "forward" if mode is StepMode.eval else "forward_backward"
    job = resolve(request)
    path = experiments_timeline.trace_path(job, phase, out)
    store.check_writable(path, replace=replace)
    check_outputs(json_to)
    with reporting(open_console(stderr=True)) as report, redirect_stdout(sys.stderr):
        report(f"recording {steps} step{'s' if steps > 1 else ''} of {arch}", None)
        found = experiments_timeline.recorded(job, phase, steps=steps)
    experiments_timeline.write_trace(found, path, replace=replace)
    if json_to is not None:
        write_json({"trace": str(path), **dataclasses.asdict(found.timeline)}, json_to)
    if str(json_to) != "-":
        print_parts(*traces.timeline_tables(arch, found.timeline))
        typer.echo("\n".join(("", *traces.how_to_look(path))))


def roofline(
    arch: Annotated[str | None, typer.Option("--arch", help="As in `profile`.")] = None,
    se: Se = None,
    insert: Insert = None,
    preset: Annotated[
        str | None, typer.Option("--as", help="Predict for a device that is not here, from its published peaks.")
    ] = None,
    device: Device = Device.cpu,
    batch: Positive = 1,
    input_size: Input = None,
    resolution: Annotated[int | None, typer.Option(min=1, help="Height and width of the input.")] = None,
    dtype: Dtype = Dtype.fp32,
    channels_last: ChannelsLast = False,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    budget: Annotated[float, typer.Option(min=0.0, help="Seconds to repeat the pass for; at least five times.")] = 5.0,
    every: Annotated[
        bool, typer.Option("--all", help="Hold every network here against its roof: what a prediction is worth.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Also draw it, .svg or .png.")] = None,
    json_to: Json = None,
) -> None:
    """Hold every operator against what this device could do at most; SE's operators apart."""
    if every == (arch is not None):
        raise typer.BadParameter("name a network, or give --all", param_hint="--arch")
    if every:
        beside: dict[str, object] = {"--as": preset, "--se": se, "--insert": insert, "--input": input_size}
        beside |= {"--resolution": resolution, "--out": out, "--channels-last": channels_last}
        beside |= {"--device": device is not Device.cpu, "--batch": batch != 1, "--dtype": dtype is not Dtype.fp32}
        beside |= {"--threads": threads != 1, "--budget": budget != 5.0}
        wrong = [option for option, value in beside.items() if value]
        if wrong:
            text = f"is one image in fp32 on one thread of the CPU; leave {', '.join(wrong)} away"
            raise typer.BadParameter(text, param_hint="--all")
        return _all_rooflines(json_to)
    if preset is not None and out is not None:
        raise typer.BadParameter("is a prediction, which has no picture; leave --out away", param_hint="--as")
    from selab.bench import devices
    from selab.bench.machine import machine
    from selab.bench.roofline import measure_peaks
    from selab.bench.runner import check_device
    from selab.experiments import roofline as experiments_roofline
    from selab.experiments.job import Request, resolve
    from selab.report import traces
    from selab.report.figures import registry
    from selab.report.figures import roofline as report_figures_roofline

    if out is not None:
        registry.check_file(out)
    check_outputs(out, json_to)
    name = network_address(str(arch), se, insert)
    find(name)
    request = Request(
        arch=name,
        device=device.value,
        batch=batch,
        input_chw=input_chw(input_size),
        resolution=resolution,
        dtype=dtype.value,
        memory_format="channels_last" if channels_last else "contiguous",
        threads=threads,
    )
    job = resolve(request)
    workload = job.workload
    with reporting(open_console(stderr=True)) as report, redirect_stdout(sys.stderr):
        if preset is not None:
            published = devices.find_device(preset, dtype.value)
            peaks, place = experiments_roofline.published_peaks(published, dtype.value), published.title
        else:
            check_device(device.value)
            here = machine(device.value)
            place = here.gpu or f"{here.cpu}, {threads} thread{'s' if threads > 1 else ''}"
            report("measuring the peaks", None)
            peaks = measure_peaks(device.value, dtype.value, threads=threads)
        report(f"timing {name}" if preset is None else f"counting {name}", None)
        under = experiments_roofline.roofline_of(job, peaks, measured=preset is None, budget_s=budget)
    if out is not None:
        registry.draw(report_figures_roofline.roof(under, arch=name, workload=workload, place=place), out)
    if json_to is not None:
        facts = dataclasses.asdict(under)
        facts |= {"arch": name, "place": place, "predicted": preset is not None, "workload": builtins(workload)}
        write_json(facts, json_to)
    if str(json_to) != "-":
        print_parts(traces.roofline_table(under, arch=name, workload=workload, place=place))
        if out is not None:
            typer.echo(f"picture: {out}")
    return None


def _all_rooflines(json_to: Path | None) -> None:
    """Every network here against its roof."""
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
        print_parts(traces.distances_table(distances))


def tax(
    arch: Arch,
    se: Se = None,
    insert: Insert = None,
    baseline: Annotated[str | None, typer.Option(help="Compare with this instead of the variant's own.")] = None,
    impl: Annotated[
        list[str] | None,
        typer.Option(
            help="reference, torchvision, timm, fast; without_squeeze, without_excitation, without_scale for the "
            "split; repeat it for several. By default all."
        ),
    ] = None,
    phase: Annotated[StepPhase, typer.Option(help="What one call is.")] = StepPhase.forward,
    device: Device = Device.cpu,
    batch: Positive = 1,
    input_size: Input = None,
    resolution: Annotated[int | None, typer.Option(min=1, help="Height and width of the input.")] = None,
    dtype: Dtype = Dtype.fp32,
    channels_last: ChannelsLast = False,
    compiled: Compiled = False,
    hold_heap: HoldHeap = False,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    quick: Annotated[
        bool, typer.Option("--quick", help="Stop at ±1 % or after 15 s for each pair, instead of ±0.5 % or 60 s.")
    ] = False,
    budget: Annotated[float | None, typer.Option(min=0.1, help="Seconds of sampling for each pair.")] = None,
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="The record goes to OUT/<machine>/tax/….json.")] = Path("results"),
    replace: Annotated[bool, typer.Option("--replace", help="Measure again where a record exists.")] = False,
    json_to: Json = None,
) -> None:
    """Measure SE as others write it and as it is fused, over one baseline in one run, beside the least it must cost."""
    arch = network_address(arch, se, insert)
    find(arch)
    if baseline is not None:
        find(baseline, option="--baseline")
    from selab.experiments import tax as experiments_tax
    from selab.experiments import tax_record
    from selab.experiments.job import Request
    from selab.records import store

    asked = experiments_tax.TaxRequest(
        request=Request(
            arch=arch,
            baseline=baseline,
            device=device.value,
            batch=batch,
            input_chw=input_chw(input_size),
            resolution=resolution,
            dtype=dtype.value,
            memory_format="channels_last" if channels_last else "contiguous",
            compiled=compiled,
            held_heap=hold_heap,
            threads=threads,
            quick=quick,
            budget_s=budget,
            seed=seed,
            phases=(phase.value,),
        ),
        implementations=experiments_tax.chosen_implementations(impl or ()),
    )
    comparison = experiments_tax.Tax(asked)
    path = comparison.path(out)
    store.check_writable(path, replace=replace)
    if json_to is not None and str(json_to) != "-":
        store.check_writable(json_to, replace=True)
    with reporting(open_console(stderr=True)) as report:
        record = comparison.run(report)
    tax_record.save_tax_record(record, path)
    _show_tax(path, json_to=json_to)


def _show_tax(path: Path, *, json_to: Path | None) -> None:
    """From the file that was written, as a profile is shown."""
    from selab.experiments import tax_record
    from selab.records import store
    from selab.report import tax as report_tax

    record = tax_record.read_tax_record(path)
    if str(json_to) == "-":
        sys.stdout.write(store.read_text(path))
        return
    if json_to is not None:
        store.write_atomically(json_to, store.read_text(path).encode())
    print_parts(*report_tax.tax_tables(record))
    open_console().print(f"\nrecord: {plain(str(path))}", highlight=False, soft_wrap=True)


def show_machine(device: Device = Device.cpu, json_to: Json = None) -> None:
    """Show what will be measured on, what is wrong with it for measuring, and what helps."""
    from selab.bench.runner import check_device
    from selab.experiments import doctor
    from selab.report import checks

    check_device(device.value)
    found = doctor.look(device.value)
    if json_to is not None:
        listed = [dataclasses.asdict(one) for one in doctor.problems(found)]
        around = dataclasses.asdict(found.surroundings)
        return write_json({"machine": builtins(found.machine), "surroundings": around, "problems": listed}, json_to)
    return print_parts(*checks.machine_tables(found))


def _show_profile(record: "Record", path: Path, *, json_to: Path | None, svg: Path | None) -> None:
    """From the file that was written, not from memory: what is shown is what anyone else would read."""
    from rich.console import Console

    from selab.records.store import write_atomically
    from selab.records.types import to_json
    from selab.report.profiles import profile_table, stage_table, verdict_lines

    alone = str(json_to) == "-"
    if alone:
        sys.stdout.buffer.write(to_json(record))
    consoles = [Console(file=io.StringIO(), emoji=False) if alone else open_console()]
    if svg is not None:
        consoles.append(Console(record=True, width=88, file=io.StringIO(), force_terminal=True, emoji=False))
    for console in consoles:
        console.print(profile_table(record), highlight=False)
        if record.cost.se.blocks:
            console.print()
            console.print(stage_table(record.cost), highlight=False)
        console.print()
        for line in verdict_lines(record):
            console.print(plain(line), highlight=False, soft_wrap=False)
        console.print(f"\nrecord: {plain(str(path))}", highlight=False, soft_wrap=True)
    if svg is not None:
        write_atomically(svg, consoles[1].export_svg(title=record.command).encode())
    if json_to is not None and not alone:
        write_atomically(json_to, to_json(record))
