"""Tables about networks that were exported for another runtime."""

from collections.abc import Sequence

from selab import units
from selab.experiments.exporting import Export
from selab.records.exported import Agreement, Exported, ExportedFile
from selab.report.table import Table
from selab.units import NONE

_MOST_OPERATORS = 6


def export_tables(done: Export) -> list[Table]:
    """Return what was written, with and without SE, and how close it is to the network."""
    return [_files(done), _agreements(done)]


def _files(done: Export) -> Table:
    facts = done.exported
    pair = [facts.with_blocks, facts.without_blocks]
    rows = [("bytes", *(_bytes(one) for one in pair))]
    delegates = [_number(None if one is None else one.partitions.subgraphs) for one in pair]
    if any(cell != NONE for cell in delegates):
        rows.append(("subgraphs of the delegate", *delegates))
        rows += [
            (f"not delegated: {name}", *(str(one.partitions.outside.get(name, 0)) if one else NONE for one in pair))
            for name in _outside(pair)
        ]
    reorders = [_number(None if one is None else one.partitions.reorders) for one in pair]
    if any(cell != NONE for cell in reorders):
        rows.append(("changes of memory layout", *reorders))
    notes = [f"SE blocks: {units.counted(facts.blocks, 'block')} written as {facts.spelling}."] if facts.blocks else []
    if facts.left:
        notes.append(f"SE blocks: {units.counted(facts.left, 'block')} left in the operators that they are written in.")
    if facts.without_blocks is None and facts.blocks + facts.left:
        notes.append("No baseline is known; --baseline NAME shows what the blocks add.")
    extra = per_block(facts)
    return Table(
        title=f"{done.arch} for {done.runtime}, {done.dtype}{', SE in fp32' if done.float_blocks else ''}: {done.path}",
        columns=("", *((done.arch, done.baseline) if done.baseline else ("the network", "baseline"))),
        rows=tuple(rows),
        notes=(*notes, *([extra] if extra else []), *(f"Note: {remark}." for remark in done.remarks)),
    )


def _outside(pair: Sequence[ExportedFile | None]) -> list[str]:
    """Return the operators that no delegate runs, those that SE adds most of first."""
    first, other = (one.partitions.outside if one is not None else {} for one in pair)
    added = {name: first.get(name, 0) - other.get(name, 0) for name in {**first, **other}}
    return sorted(added, key=lambda name: (-added[name], name))[:_MOST_OPERATORS]


def per_block(facts: Exported) -> str:
    """Return how many subgraphs and changes of layout a block costs, in words; empty where nothing is known."""
    base = facts.without_blocks
    blocks = facts.blocks + facts.left
    if base is None or not blocks:
        return ""
    found = []
    for words, with_, without in (
        ("subgraphs", facts.with_blocks.partitions.subgraphs, base.partitions.subgraphs),
        ("changes of layout", facts.with_blocks.partitions.reorders, base.partitions.reorders),
    ):
        if with_ is not None and without is not None:
            found.append(f"{(with_ - without) / blocks:+.2g} {words}")
    return f"Each SE block: {', '.join(found)}." if found else ""


def exported_notes(facts: Exported) -> list[str]:
    """Return the facts of an exported pair as sentences: spelling, parts, and how close it is to the network."""
    found = facts.agreement
    words = f"exported: {units.counted(facts.blocks, 'SE block')} written as {facts.spelling}; " if facts.blocks else ""
    same = "" if found.same_top_1 is None else f", same top-1 {units.share(found.same_top_1)}"
    words += f"largest difference to the network in fp32 {found.max_relative:.2g} of its output{same} ({found.inputs})"
    parts = per_block(facts)
    return [words, *([parts[0].lower() + parts[1:].removesuffix(".")] if parts else [])]


def _agreements(done: Export) -> Table:
    rows = [(_type_words(done.dtype, done.float_blocks), *_cells(done.exported.agreement))]
    if done.agreement_otherwise is not None:
        rows.append((_type_words(done.dtype, not done.float_blocks), *_cells(done.agreement_otherwise)))
    return Table(
        title=f"Against the network in fp32, on {done.exported.agreement.inputs}",
        columns=("", "largest difference", "over the largest output", "same top-1"),
        rows=tuple(rows),
    )


def _type_words(dtype: str, float_blocks: bool) -> str:
    return dtype if dtype != "int8" else f"int8, SE in {'fp32' if float_blocks else 'int8'}"


def _cells(found: Agreement) -> tuple[str, str, str]:
    same = NONE if found.same_top_1 is None else units.share(found.same_top_1)
    return f"{found.max_absolute:.2g}", f"{found.max_relative:.2g}", same


def _bytes(one: ExportedFile | None) -> str:
    return NONE if one is None else units.size(one.bytes)


def _number(value: int | None) -> str:
    return NONE if value is None else str(value)
