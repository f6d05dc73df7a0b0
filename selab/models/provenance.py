"""Find the networks that a record was made from, and whether they changed since."""

from pathlib import Path
from typing import Protocol

from selab.errors import SelabError
from selab.models import catalog
from selab.models.spec import Variant, pair_hash


class Provenance(Protocol):
    """The fields of every kind of record that name its two networks."""

    @property
    def arch(self) -> str:
        """Name of the variant."""

    @property
    def baseline(self) -> str | None:
        """Name of the baseline."""

    @property
    def origin(self) -> str:
        """The TOML of the variant if it is a user's own, else empty."""

    @property
    def baseline_origin(self) -> str:
        """The TOML of the baseline if it is a user's own, else empty."""

    @property
    def facts_hash(self) -> str:
        """Hash of the configuration of the networks when the record was made."""


def bare_name(arch: str) -> str:
    """Return the name of an external network without the SE blocks that it has of its own; `find` does not know it."""
    return f"{arch} without its SE blocks"


def is_bare(record: Provenance) -> bool:
    """Return whether the baseline of a record is its variant without the SE blocks that it has of its own."""
    return record.baseline == bare_name(record.arch)


def address(name: str, origin: str) -> str:
    """Return what `--arch` takes for a record's network: its name, after its TOML if it is a user's own."""
    return f"{origin}:{name}" if origin else name


def fixed_address(variant: Variant) -> str:
    """Return what `--arch` takes for a network in any folder: a user's own file by its whole path."""
    if variant.file:
        return address(variant.name, str(Path(variant.file).resolve()))
    file, colon, name = variant.name.partition(".py:")
    return f"{Path(f'{file}.py').resolve()}:{name}" if colon else variant.name


def variants_of(record: Provenance) -> tuple[Variant | None, Variant | None]:
    """Return today's variants of a record's two networks; None for one that does not exist any more."""

    def variant_of(name: str | None, file: str) -> Variant | None:
        if name is None:
            return None
        try:
            return catalog.find(address(name, file))
        except SelabError:
            return None

    baseline = None if is_bare(record) else record.baseline
    return variant_of(record.arch, record.origin), variant_of(baseline, record.baseline_origin)


def is_own_baseline(record: Provenance) -> bool:
    """Return whether a record was measured against the baseline that its variant names."""
    if is_bare(record):
        return True
    variant, _ = variants_of(record)
    return variant is not None and record.baseline == variant.baseline


def is_stale(record: Provenance) -> bool:
    """Return whether the configuration of the networks has changed since the record was made."""
    variant, baseline = variants_of(record)
    return variant is not None and pair_hash(variant, baseline) != record.facts_hash


def name_of(record: Provenance) -> str:
    """Return a record's name in tables: with a baseline that is not its own, whether it is partial, whether stale."""
    against = "" if is_own_baseline(record) else f" against {record.baseline}"
    partial = "" if getattr(record, "complete", True) else " (partial)"
    return record.arch + against + partial + (" (stale)" if is_stale(record) else "")
