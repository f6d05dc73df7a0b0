"""Which images one process takes of each global batch."""

from dataclasses import dataclass

from selab import units
from selab.errors import SelabError


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """The training batches of one process: which epoch, from which batch on, and which part of each.

    Attributes:
        batch: images of all processes together.
        seed: of order and augmentation, with `epoch`.
        epoch: from 0.
        first: number of the first global batch; earlier ones are skipped at no cost.
        rank: of this process.
        world: how many processes share a batch.
    """

    batch: int
    seed: int
    epoch: int
    first: int = 0
    rank: int = 0
    world: int = 1


def check_share(batch: int, rank: int, world: int, *, error: type[SelabError] = SelabError) -> None:
    """Check that `world` processes can share a batch equally, and that `rank` is one of them.

    Raises:
        SelabError: of the given kind, if not.
    """
    if batch < 1 or world < 1 or batch % world:
        raise error(
            f"batch: {units.counted(batch, 'image')} cannot be shared by "
            f"{units.counted(world, 'process', 'processes')}; give a multiple of {world}"
        )
    if not 0 <= rank < world:
        raise error(f"rank: {rank}; allowed are 0 to {world - 1}")
