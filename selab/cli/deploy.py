"""Commands about other runtimes: export."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from selab.cli.console import (
    builtins,
    check_outputs,
    find,
    open_console,
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
    Baseline,
    ExportOptions,
    Format,
    Json,
    Out,
    Replace,
    natural,
    option,
    with_options,
)
from selab.errors import UnknownNameError
from selab.records.bounds import MOST_THREADS
from selab.records.types import Dtype

_FILE_NAME = "What --arch names, in the current folder, by default."


@with_options
def export(
    arch: Arch,
    options: ExportOptions,
    to: Annotated[
        str,
        option("--to", WHAT, "onnx (or onnxruntime), openvino, executorch, litert or aoti.", metavar="RUNTIME"),
    ],
    weights: Annotated[
        Path | None, option("--weights", WHAT, "Trained weights; random ones by default.", metavar="FILE")
    ] = None,
    out: Annotated[Path | None, option("--out", OUTPUT, f"The file. {_FILE_NAME}", metavar="FILE")] = None,
    replace: Replace = False,
    json_to: Json = None,
    look: Format = "rich",
) -> None:
    """Write a network for another runtime, and show what SE costs there."""
    if options.dtype not in (None, "fp32", "int8"):
        raise typer.BadParameter(f"{options.dtype}: exported are fp32 and int8", param_hint="--dtype")
    from selab.deploy.target import FIXED_THREADS, target
    from selab.records import files

    runtime = target(to, option="--to")
    if options.threads is not None and runtime.name not in FIXED_THREADS:
        why = f"a file for {runtime.name} runs on any number of threads; leave it out"
        raise typer.BadParameter(why, param_hint="--threads")
    job = resolve_job(options.request(arch, runtime=runtime.name))
    path = out or Path(_name_of(job.variant.name, options.dtype or "fp32") + runtime.suffix)
    if path.suffix != runtime.suffix:
        why = f"{path}: is no name for {runtime.name}; end it in {runtime.suffix}"
        raise typer.BadParameter(why, param_hint="--out")
    if job.is_graph and path.resolve() == Path(job.variant.name).resolve():
        raise typer.BadParameter(f"{path}: is the network itself; name another file", param_hint="--out")
    files.check_writable(path, replace=replace)
    check_outputs(json_to)
    from selab.experiments.exporting import export as export_one
    from selab.report.exports import export_tables

    with reporting(open_console(stderr=True)) as report:
        done = export_one(job, path, weights=weights, report=report)
    if json_to is not None:
        write_json(builtins(done), json_to)
        if str(json_to) == "-":
            return
    print_tables(export_tables(done), look)


def import_timings(
    arch: Arch,
    source: Annotated[
        str,
        option(
            "--from", WHAT, "litert, onnxruntime, openvino or executorch: whose tool printed it.", metavar="RUNTIME"
        ),
    ],
    base: Annotated[
        list[Path], option("--base", WHAT, "What the tool printed for the baseline. Repeatable.", metavar="FILE")
    ],
    variant: Annotated[
        list[Path], option("--variant", WHAT, "What it printed for the network, in the same order.", metavar="FILE")
    ],
    on: Annotated[str, option("--on-device", WHAT, "What the device is called, such as 'Pixel 8'.", metavar="NAME")],
    baseline: Baseline = None,
    dtype: Annotated[Dtype, option("--dtype", WORKLOAD, "Of the files: fp32 or int8.", metavar="NAME")] = "fp32",
    threads: Annotated[int, natural("--threads", WORKLOAD, "That the tool was told to use.", most=MOST_THREADS)] = 1,
    out: Out = Path("results"),
    replace: Replace = False,
    json_to: Json = None,
    look: Format = "rich",
) -> None:
    """Compare what a benchmark tool printed on a phone, run by run."""
    from selab._version import __version__
    from selab.models import catalog
    from selab.records import files, imported
    from selab.report.runtimes import imported_table

    if source not in imported.TOOLS:
        raise UnknownNameError(f"--from {source}: has no tool that is read; allowed: {', '.join(imported.TOOLS)}")
    named = find(arch)
    base_name = baseline or named.baseline
    if base_name is None:
        raise typer.BadParameter(f"{arch} has no baseline of its own; name what --base ran", param_hint="--baseline")
    if baseline is not None:
        catalog.find(baseline, option="--baseline")
    facts: dict[str, Any] = {"selab": __version__, "arch": named.name, "baseline": base_name}
    facts |= {"device": on, "dtype": dtype, "threads": threads}
    record = imported.record_of(base, variant, runtime=source, **facts)
    path = imported.imported_path(out, record)
    files.check_writable(path, replace=replace)
    check_outputs(json_to)
    imported.save_imported(record, path)
    if json_to is not None:
        write_json(builtins(record), json_to)
        if str(json_to) == "-":
            return
    print_tables([imported_table([record])], look, f"record: {path}")


def _name_of(arch: str, dtype: str) -> str:
    """Return a file's name without its end for a network: of a file its stem, of changes what a name can hold."""
    from selab.models.catalog import split_address

    network, changes = split_address(arch)
    stem = Path(network.partition(":")[2] or network).name.removesuffix(".onnx").removesuffix(".py")
    rest = re.sub(r"[^\w-]", "-", changes or "")
    named = f"{stem}-{rest}" if rest else stem
    return named if dtype == "fp32" else f"{named}.{dtype}"
