"""Commands about networks: archs, show, sites, count."""

import dataclasses
import fnmatch
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import typer

from selab.cli.console import (
    announce_sites,
    builtins,
    check_outputs,
    find,
    open_console,
    params_of,
    print_insertion_notes,
    print_parts,
    print_tables,
    reporting,
    resolve_job,
    write_json,
)
from selab.cli.options import (
    OUTPUT,
    WHAT,
    WORKLOAD,
    Arch,
    Archs,
    ChannelsLast,
    CountOptions,
    Format,
    Inputs,
    Insert,
    Json,
    Look,
    On,
    Replace,
    Se,
    natural,
    option,
    shapes_of,
    with_options,
)
from selab.errors import RecordError, UnknownNameError, nearest
from selab.experiments.job import network_address, with_inputs
from selab.models import catalog, composed
from selab.models.spec import ONNX_FAMILY
from selab.records.types import Device, Dtype

if TYPE_CHECKING:
    from collections.abc import Sequence

    from selab.models.spec import Variant
    from selab.records.types import Record
    from selab.report.table import Table

By = Literal["operator", "module"]


def archs(
    pattern: Annotated[str, typer.Argument(help="Part of a name, or a pattern such as 'se_res*'.")] = "",
    json_to: Json = None,
    look: Format = "rich",
) -> None:
    """List the architectures, each with its baseline."""
    from selab.models.spec import as_builtins
    from selab.report.table import Table

    check_outputs(json_to)
    every = catalog.installed()
    wanted = pattern if any(character in pattern for character in "*?[") else f"*{pattern}*"
    variants = [one for name, one in every.items() if fnmatch.fnmatchcase(name, wanted)]
    if not variants:
        raise UnknownNameError(f"archs {pattern}: no such architecture{nearest(pattern, every)}")
    if json_to is not None:
        return write_json([as_builtins(variant) for variant in variants], json_to)
    rows = tuple((one.name, one.baseline or "", one.title) for one in variants)
    columns = ("name", "baseline", "what it is")
    note = f"Any of them can be NETWORK in {', '.join(composed.patterns())} (docs/detection.md)."
    words = frozenset(range(3))
    table = Table(title=f"Architectures ({len(rows)})", columns=columns, rows=rows, notes=(note,), words=words)
    return print_tables([table], look)


def show(
    name: Annotated[str, typer.Argument(help="A network, as --arch of the other commands.")],
    runtime: Annotated[
        bool,
        option("--runtime", WHAT, "Show how each SE block runs after selab.fuse, and why."),
    ] = False,
    device: Annotated[Device, option("--device", WORKLOAD, "For --runtime: cpu or cuda.", metavar="NAME")] = "cpu",
    batch: Annotated[int, natural("--batch", WORKLOAD, "For --runtime: images.")] = 1,
    dtype: Annotated[
        Dtype,
        option("--dtype", WORKLOAD, "For --runtime: fp32, bf16, fp16.", metavar="NAME"),
    ] = "fp32",
    channels_last: ChannelsLast = False,
    input_size: Inputs = None,
    on: On = None,
    json_to: Json = None,
    look: Format = "rich",
) -> None:
    """Show one architecture: facts, SE sites, published numbers."""
    check_outputs(json_to)
    size, inputs = shapes_of(input_size)
    variant = with_inputs(find(name, option="show"), inputs, on or "fake")
    if size is not None:
        variant = msgspec.structs.replace(variant, input_chw=size)
    if runtime:
        return _show_runtime(variant, device, batch, dtype, channels_last=channels_last, json_to=json_to, look=look)
    wrong = [device != "cpu" and "--device", batch != 1 and "--batch", dtype != "fp32" and "--dtype"]
    for given in filter(None, [*wrong, channels_last and "--channels-last"]):
        raise typer.BadParameter("is a workload of --runtime; give both or neither", param_hint=str(given))
    from selab.cost.count import count as count_cost
    from selab.models.build import build
    from selab.models.inputs import example_of
    from selab.models.spec import as_builtins
    from selab.report.networks import facts_table, published_table, sites_table

    built = build(variant, device="meta")
    insertions = built.insertions
    if json_to is not None:
        return write_json({**as_builtins(variant), "insertions": [builtins(one) for one in insertions]}, json_to)
    example = example_of(built.model, inputs, batch=1) if inputs else (1, *variant.input_chw)
    total = count_cost(built.model, example, on=variant.on)
    published = [published_table(variant)] if variant.published else []
    sites = [sites_table(insertions)] if insertions else []
    return print_tables([facts_table(variant, total), *sites, *published], look)


def sites(
    arch: Arch,
    se: Se = None,
    insert: Insert = None,
    input_size: Inputs = None,
    on: On = None,
    depth: Annotated[
        int | None,
        natural("--depth", OUTPUT, "Levels of modules to show."),
    ] = None,
    json_to: Json = None,
) -> None:
    """Show where attention blocks stand, or could stand, in the module tree."""
    check_outputs(json_to)
    size, inputs = shapes_of(input_size)
    variant = with_inputs(find(network_address(arch, se, insert or ())), inputs, on or "fake")
    if variant.family == ONNX_FAMILY:
        return _graph_sites(msgspec.structs.replace(variant, input_chw=size or variant.input_chw), depth, json_to)
    from selab.attention.auto_sites import Ends, trace_ends
    from selab.attention.sites import declared_groups
    from selab.models.build import build
    from selab.models.inputs import example_of
    from selab.report.tree import site_tree, sites_as_builtins

    size = size or variant.input_chw
    shape: Any = (1, *size)
    with redirect_stdout(sys.stderr):
        bare = with_inputs(catalog.baseline_of(variant) or variant, inputs, variant.on)
        network = build(bare, device="meta", input_chw=size).model
        if inputs:
            shape = example_of(network, inputs, batch=1)
        insertions = build(variant, device="meta", input_chw=size).insertions
        groups = declared_groups(network)
        traced = not groups or "auto" in (insert or ())
        found = trace_ends(network, shape, on=variant.on) if traced else Ends(found=(), left_out=())
        known: dict[str, Any] = {"ends": found.found, "groups": groups, "input_nchw": shape, "on": variant.on}
        tree = site_tree(network, insertions, depth=depth, **known)
    announce_sites(variant, insertions)
    print_insertion_notes(variant, insertions, sum(one.numel() for one in network.parameters()))
    if json_to is not None:
        return write_json(sites_as_builtins(network, insertions, **known), json_to)
    lines = [f"auto: {end.path}: {end.reason} [{end.kind}]" for end in found.found]
    lines += [f"left out: {one}" for one in found.left_out]
    legend = [f"[{', '.join(groups)}]: site groups (--insert NAME)"] if groups else []
    legend += ["[auto]: end of a block, found by tracing (--insert auto)"] if found.found else []
    legend += ["←: the block that is inserted there"] if insertions else []
    return print_parts(tree, escape_lines(*legend, *lines))


def _graph_sites(variant: "Variant", depth: int | None, json_to: Path | None) -> None:
    """Show the SE blocks of an ONNX network, which has no tree of modules."""
    from selab.models.build import build
    from selab.report.networks import sites_table

    if depth is not None:
        raise typer.BadParameter("an ONNX network has no tree of modules; leave it out", param_hint="--depth")
    insertions = build(variant).insertions
    if json_to is not None:
        return write_json([builtins(one) for one in insertions], json_to)
    if not insertions:
        return print_parts(f"{variant.name}: has no SE block")
    return print_tables([sites_table(insertions)], "rich")


def escape_lines(*lines: str) -> str:
    """Return lines as one text for a terminal."""
    from selab.cli.console import escape_markup

    return "\n".join(map(escape_markup, lines))


@with_options
def count(
    options: CountOptions,
    arch: Archs = (),  # type: ignore[assignment]
    every: Annotated[bool, option("--all", WHAT, "All architectures of the catalog.")] = False,
    by: Annotated[
        By | None,
        option("--by", OUTPUT, "Break the cost down by operator or module.", metavar="KIND"),
    ] = None,
    explain: Annotated[
        bool,
        option("--explain", OUTPUT, "Explain each difference to fvcore, thop and torch."),
    ] = False,
    out: Annotated[
        Path | None,
        option("--out", OUTPUT, "Also write each record to FOLDER/NAME.json.", metavar="FOLDER"),
    ] = None,
    replace: Replace = False,
    json_to: Json = None,
    look: Format = "rich",
) -> None:
    """Count parameters, MACs (GFLOPs of papers), FLOPs and bytes; nothing is timed."""
    if every and (arch or options.se is not None or options.insert):
        raise typer.BadParameter("cannot be combined with --arch, --se or --insert", param_hint="--all")
    names = list(catalog.installed()) if every else list(arch)
    if not names:
        raise typer.BadParameter("name at least one network, or give --all", param_hint="--arch")
    jobs = [resolve_job(options.request(name)) for name in names]
    from selab.experiments import profiling
    from selab.records import files, store

    check_outputs(json_to)
    paths: list[Path] = []
    if out is not None:
        paths = [out / f"{store.file_name(job.variant.name)}.json" for job in jobs]
    if len(set(paths)) < len(paths):
        raise RecordError(f"--out {out}: two of these networks have the same name; count them into two folders")
    for path in paths:
        files.check_writable(path, replace=replace)
    records = []
    counters = explain or bool(paths) or json_to is not None
    with reporting(open_console(stderr=True)) as report:
        for index, job in enumerate(jobs):
            report(f"counting {job.request.arch}" if len(jobs) > 1 else "counting", None)
            one = profiling.count_job(job, by_module=by == "module", counters=counters)
            announce_sites(job.variant, one.insertions)
            print_insertion_notes(job.variant, one.insertions, params_of(one.baseline_cost))
            records.append(one)
            if paths:
                store.save(one, paths[index])
    if options.on == "cpu":
        open_console(stderr=True).print("counted on real tensors on the CPU; the kernels ran")
    if json_to is not None:
        write_json([builtins(one) for one in records] if len(records) > 1 else builtins(records[0]), json_to)
    if str(json_to) != "-":
        print_tables(_count_tables(records, by, explain=explain), look)


def _count_tables(records: "Sequence[Record]", by: By | None, *, explain: bool) -> "list[Table]":
    """The tables of `count`: one for several networks; for one network its own, with the blocks by part."""
    from selab.report import profiles

    if by is not None:
        return [profiles.share_table(record, by) for record in records]
    counters = [profiles.counters_table(record.cost) for record in records] if explain else []
    if len(records) > 1:
        return [profiles.count_table(records), *counters]
    cost = records[0].cost
    stages = [profiles.stage_table(cost)] if cost.se.blocks else []
    return [profiles.single_count_table(records[0]), *stages, *counters]


def _show_runtime(
    variant: "Variant",
    device: Device,
    batch: int,
    dtype: Dtype,
    *,
    channels_last: bool,
    json_to: Path | None,
    look: Look,
) -> None:
    import torch

    from selab.bench.runner import DTYPES, check_device
    from selab.fusion.fuse import runtimes
    from selab.models.build import build
    from selab.report.networks import runtime_table

    check_device(device)
    found = runtimes(
        build(variant).model,
        (batch, *variant.input_chw),
        device=device,
        dtype=DTYPES[dtype],
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
        on=variant.on,
    )
    if json_to is not None:
        return write_json([dataclasses.asdict(one) for one in found], json_to)
    if not found:
        other = "its blocks are of another kind, which run as they are written" if variant.se else "has no SE block"
        return print_parts(f"{variant.name}: {other}; there is nothing that selab.fuse would run otherwise")
    layout = "channels last" if channels_last else "contiguous"
    title = f"SE blocks of {variant.name} as they run: {device}, batch {batch}, {dtype}, {layout}"
    return print_tables([runtime_table(found, title=title)], look)
