"""Commands that convert trained weights."""

from pathlib import Path
from typing import Annotated

import typer

from selab.cli.console import print_parts, write_json
from selab.cli.options import Json

weights_app = typer.Typer(
    help="Convert trained weights of other libraries.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@weights_app.command("list")
def weights_list(json_to: Json = None) -> None:
    """List which networks of other libraries equal ours."""
    from selab.models import key_maps
    from selab.report.table import Table

    rows = tuple((port.arch, port.source, port.model) for port in key_maps.PORTS)
    if json_to is not None:
        return write_json([{"arch": arch, "source": source, "model": model} for arch, source, model in rows], json_to)
    columns = ("--arch", "--from", "called there")
    grid = Table(title="Weights that can be converted", columns=columns, rows=rows, words=frozenset(range(3)))
    return print_parts(grid)


@weights_app.command("convert")
def weights_convert(
    source_path: Annotated[Path, typer.Argument(metavar="IN", help="A .safetensors, .pt or .pth file.")],
    target_path: Annotated[Path, typer.Argument(metavar="OUT", help="The .safetensors file to write.")],
    source: Annotated[str, typer.Option("--from", help="timm, torchvision or cadene.")],
    arch: Annotated[str, typer.Option("--arch", help="Ours; `selab weights list` has all.")],
    replace: Annotated[bool, typer.Option("--replace", help="Write over an existing file.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show every tensor's way; write nothing.")] = False,
) -> None:
    """Convert another library's weights into those of a network here that computes the same."""
    from selab.models import checkpoint
    from selab.report.table import Table

    done = checkpoint.convert(source_path, None if dry_run else target_path, source=source, arch=arch, replace=replace)
    if dry_run:
        rows = tuple(
            (step.theirs, f"{step.ours} (folded)" if step.folded else step.ours, str(step.shape))
            for step in done.renamed
        )
        columns = ("theirs", "ours", "shape")
        print_parts(Table(title=f"{done.port.model} → {arch}", columns=columns, rows=rows, words=frozenset(range(3))))
    verb = "would be read" if dry_run else "was read"
    started = f"; {len(done.filled)} counters of seen batches start at zero" if done.filled else ""
    typer.echo(f"{source_path} {verb} as {source}'s {done.port.model}: {len(done.renamed)} tensors{started}")
    if not dry_run:
        typer.echo(f"weights: {target_path}")
