"""Commands that convert trained weights."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from selab import units
from selab.cli.console import check_outputs, print_note, print_tables, write_json
from selab.cli.options import OUTPUT, WHAT, Ema, Format, Json, Replace, examples, natural, option
from selab.cli.usage import Command, Group

weights_app = typer.Typer(
    cls=Group,
    help="Convert trained weights of other libraries.",
    no_args_is_help=True,
    epilog=examples("selab weights list", "selab weights convert --help"),
    context_settings={"help_option_names": ["-h", "--help"]},
)


@weights_app.command("list", cls=Command, epilog=examples("selab weights list"))
def weights_list(json_to: Json = None, look: Format = "rich") -> None:
    """List the networks whose weights can be converted."""
    from selab.models import key_maps
    from selab.report.table import Table

    check_outputs(json_to)
    rows = tuple((port.arch, port.source, port.model) for port in (*key_maps.PORTS, *key_maps.DETECTORS))
    if json_to is not None:
        return write_json([{"arch": arch, "source": source, "model": model} for arch, source, model in rows], json_to)
    columns = ("--arch", "--from", "name there")
    table = Table(title="Weights that can be converted", columns=columns, rows=rows, words=frozenset(range(3)))
    return print_tables([table], look)


@weights_app.command(
    "convert",
    cls=Command,
    epilog=examples("selab weights convert in.pth out.safetensors --from timm --arch mobilenet_v2"),
)
def weights_convert(
    source_path: Annotated[Path, typer.Argument(metavar="IN", help="A .safetensors, .pt, .pth or .ckpt file.")],
    target_path: Annotated[Path, typer.Argument(metavar="OUT", help="The .safetensors file to write.")],
    source: Annotated[str, option("--from", WHAT, "timm, torchvision or cadene.", metavar="NAME")],
    arch: Annotated[
        str,
        option("--arch", WHAT, "Name in selab; see `selab weights list`.", metavar="NAME"),
    ],
    ema: Ema = None,
    head: Annotated[
        Literal["keep", "drop"],
        option("--head", WHAT, "A classifier of another number of classes: keep (refuse) or drop.", metavar="NAME"),
    ] = "keep",
    num_classes: Annotated[
        int | None,
        natural("--num-classes", WHAT, "Of the classifier, if not the network's own: 365.", show_default=False),
    ] = None,
    replace: Replace = False,
    dry_run: Annotated[
        bool,
        option("--dry-run", OUTPUT, "Show how each tensor is mapped; write nothing."),
    ] = False,
) -> None:
    """Convert a library's weights for the network here that computes the same."""
    from selab.models import checkpoint
    from selab.report.table import Table

    done = checkpoint.convert(
        source_path,
        None if dry_run else target_path,
        source=source,
        arch=arch,
        replace=replace,
        ema=ema,
        head=head,
        num_classes=num_classes,
    )
    if done.taken:
        print_note(f"{source_path}: {done.taken}")
    if done.dropped:
        print_note(f"{source_path}: classifier dropped, initialised anew: {', '.join(done.dropped)}")
    if dry_run:
        rows = tuple(
            (step.theirs, f"{step.ours} (folded)" if step.folded else step.ours, str(step.shape))
            for step in done.renamed
        )
        columns = ("theirs", "ours", "shape")
        words = frozenset(range(3))
        print_tables([Table(title=f"{done.port.model} → {arch}", columns=columns, rows=rows, words=words)])
    verb = "would be read" if dry_run else "was read"
    starts = units.plural_of(len(done.filled), "starts", "start")
    started = f"; {units.counted(len(done.filled), 'counter')} of seen batches {starts} at zero" if done.filled else ""
    typer.echo(f"{source_path} {verb} as {source}'s {done.port.model}: {len(done.renamed)} tensors{started}")
    if not dry_run:
        typer.echo(f"weights: {target_path}")
