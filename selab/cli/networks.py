"""Commands that look at networks: archs, show, sites, count."""

import dataclasses
import sys
from contextlib import redirect_stdout
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from selab.cli.console import (
    builtins,
    find,
    open_console,
    plain,
    print_parts,
    reporting,
    write_json,
)
from selab.cli.options import (
    Arch,
    Archs,
    Device,
    Dtype,
    Input,
    Insert,
    Json,
    Positive,
    Se,
    input_chw,
    network_address,
)
from selab.errors import RecordError
from selab.models import catalog

if TYPE_CHECKING:
    from collections.abc import Sequence

    from selab.models.spec import Variant
    from selab.records.types import Insertion


class By(StrEnum):
    """How to share a cost out."""

    operator = "operator"
    module = "module"


def tell_found_sites(word: str, insertions: "Sequence[Insertion]") -> None:
    """Nothing is guessed silently: where `--insert auto` put blocks is said before anything is said about them."""
    if "sites=auto" not in word or not insertions:
        return
    listed = ", ".join(one.path for one in insertions)
    open_console(stderr=True).print(
        f"auto: {len(insertions)} site{'s' if len(insertions) > 1 else ''} found: {plain(listed)}; "
        "`selab sites` shows them in the network",
        highlight=False,
        soft_wrap=True,
    )


def archs(json_to: Json = None) -> None:
    """List the architectures, each with its baseline."""
    from selab.models.spec import as_builtins
    from selab.report.table import Table

    variants = catalog.installed()
    if json_to is not None:
        return write_json([as_builtins(variant) for variant in variants.values()], json_to)
    rows = tuple((one.name, one.baseline or "", one.title) for one in variants.values())
    columns = ("name", "baseline", "what it is")
    return print_parts(Table(title="Architectures", columns=columns, rows=rows, words=frozenset(range(3))))


def show(
    name: Annotated[str, typer.Argument(help="As --arch.")],
    runtime: Annotated[
        bool, typer.Option("--runtime", help="Instead: how each SE block runs after selab.fuse, and why not faster.")
    ] = False,
    device: Device = Device.cpu,
    batch: Positive = 1,
    dtype: Dtype = Dtype.fp32,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="NHWC instead of NCHW.")] = False,
    json_to: Json = None,
) -> None:
    """Show one architecture: its facts, its SE sites and what others published about it."""
    variant = find(name, option="show")
    if runtime:
        return _show_runtime(variant, device, batch, dtype, channels_last=channels_last, json_to=json_to)
    from selab.models.build import build
    from selab.models.spec import as_builtins
    from selab.report.networks import facts_table, published_table, sites_table

    insertions = build(variant, device="meta").insertions
    if json_to is not None:
        return write_json({**as_builtins(variant), "insertions": [builtins(one) for one in insertions]}, json_to)
    published = [published_table(variant)] if variant.published else []
    return print_parts(facts_table(variant), *([sites_table(insertions)] if insertions else []), *published)


def sites(
    arch: Arch,
    se: Se = None,
    insert: Insert = None,
    input_size: Input = None,
    json_to: Json = None,
) -> None:
    """Show a network's module tree and where blocks stand or could stand; its forward runs once, without arithmetic."""
    variant = find(network_address(arch, se, insert))
    from selab.attention.auto_sites import Ends, trace_ends
    from selab.attention.sites import declared_groups
    from selab.models.build import build
    from selab.models.catalog import baseline_of
    from selab.report.tree import site_tree, sites_as_builtins

    size = input_chw(input_size) or variant.input_chw
    shape = (1, *size)
    with redirect_stdout(sys.stderr):
        network = build(baseline_of(variant) or variant, device="meta", input_chw=size).model
        insertions = build(variant, device="meta", input_chw=size).insertions
        groups = declared_groups(network)
        found = trace_ends(network, shape) if not groups or "auto" in (insert or ()) else Ends(found=(), left_out=())
        tree = site_tree(network, insertions, ends=found.found, groups=groups, input_nchw=shape)
    if json_to is not None:
        return write_json(
            sites_as_builtins(network, insertions, ends=found.found, groups=groups, input_nchw=shape), json_to
        )
    lines = [f"auto: {end.path}: {end.reason}" for end in found.found] + [f"left out: {one}" for one in found.left_out]
    legend = [f"[{', '.join(groups)}]: site groups (--insert NAME)"] if groups else []
    legend += ["[auto]: a block's end, found by tracing (--insert auto)"] if found.found else []
    legend += ["← what would stand there"] if insertions else []
    return print_parts(tree, "\n".join(map(plain, (*legend, *lines))))


def count(
    arch: Archs = (),  # type: ignore[assignment]
    every: Annotated[bool, typer.Option("--all", help="All architectures.")] = False,
    se: Se = None,
    insert: Insert = None,
    batch: Positive = 1,
    input_size: Input = None,
    resolution: Annotated[int | None, typer.Option(min=1, help="Height and width of the input.")] = None,
    by: Annotated[By | None, typer.Option(help="Share each network's cost out.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write each record to OUT/<arch>.json and show the table.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Write over existing records.")] = False,
    json_to: Json = None,
) -> None:
    """Count parameters, MACs, FLOPs, bytes and activations; no kernel runs, so batch and resolution cost nothing."""
    if every and (arch or se is not None or insert):
        raise typer.BadParameter(
            "counts the catalog as it is; leave --arch, --se and --insert away", param_hint="--all"
        )
    names = list(catalog.installed()) if every else [network_address(one, se, insert) for one in arch]
    if not names:
        raise typer.BadParameter("name at least one network, or give --all", param_hint="--arch")
    variants = [find(name) for name in names]
    size = input_chw(input_size)
    from selab.experiments import profiling
    from selab.records import store
    from selab.report import profiles as report_profiles

    paths: dict[str, Path] = {}
    if out is not None:
        paths = {name: out / f"{store.file_name(one.name)}.json" for name, one in zip(names, variants, strict=True)}
    if len(set(paths.values())) < len(paths):
        raise RecordError(f"--out {out}: two of these networks have the same name; count them into two folders")
    for path in paths.values():
        store.check_writable(path, replace=replace)
    counters = len(names) == 1 or bool(paths) or json_to is not None
    records = []
    with reporting(open_console(stderr=True)) as report:
        for name in names:
            report(f"counting {name}" if len(names) > 1 else "counting", None)
            one = profiling.count_record(
                name,
                batch=batch,
                input_chw=size,
                resolution=resolution,
                by_module=by is By.module,
                counters=counters,
            )
            tell_found_sites(name, one.insertions)
            records.append(one)
            if paths:
                store.save(one, paths[name])
    if json_to is not None:
        return write_json([builtins(one) for one in records] if len(records) > 1 else builtins(records[0]), json_to)
    if by is not None:
        return print_parts(*(report_profiles.share_table(record, by.value) for record in records))
    if len(records) > 1:
        return print_parts(report_profiles.count_table(records))
    cost = records[0].cost
    stages = [report_profiles.stage_table(cost)] if cost.se.blocks else []
    return print_parts(report_profiles.single_count_table(records[0]), *stages, report_profiles.counters_table(cost))


# -------------------------------------------------------------------------------------------------------------- output
def _show_runtime(
    variant: "Variant", device: Device, batch: int, dtype: Dtype, *, channels_last: bool, json_to: Path | None
) -> None:
    import torch

    from selab.bench.runner import DTYPES, check_device
    from selab.fusion.fuse import runtimes
    from selab.models.build import build
    from selab.report.networks import runtime_table

    check_device(device.value)
    found = runtimes(
        build(variant).model,
        (batch, *variant.input_chw),
        device=device.value,
        dtype=DTYPES[dtype.value],
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )
    if json_to is not None:
        return write_json([dataclasses.asdict(one) for one in found], json_to)
    if not found:
        other = "its blocks are of another kind, which run as they are written" if variant.se else "has no SE block"
        return print_parts(f"{variant.name}: {other}; there is nothing that selab.fuse would run otherwise")
    layout = "channels last" if channels_last else "contiguous"
    title = f"SE blocks of {variant.name} as they run: {device.value}, batch {batch}, {dtype.value}, {layout}"
    return print_parts(runtime_table(found, title=title))
