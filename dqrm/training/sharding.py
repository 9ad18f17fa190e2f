"""Whether a run's tables are sharded, how, and the line in the log that says so."""

import logging

from dqrm.config import RunConfig
from dqrm.data.dataset import PreparedDataset
from dqrm.models.placement import Placement, place_tables
from dqrm.models.sizes import ModelSizes
from dqrm.runtime import available_memory_bytes
from dqrm.training.world import World

log = logging.getLogger(__name__)


def choose_placement(
    config: RunConfig, dataset: PreparedDataset, sizes: ModelSizes, world: World
) -> Placement | None:
    """Return where the tables lie, the same on all ranks; None where every rank has all.

    Raises:
        ValueError: the tables cannot be shared out among so many ranks.
    """
    wanted = config.exchange.placement
    if world.size == 1 or wanted == "replicate" or (wanted == "auto" and _fits(sizes, world)):
        return None
    placement = plan(config, dataset, world.size)
    if not placement.pieces:
        log.info(
            "no table has more than %s rows: all are replicated",
            f"{config.exchange.shard_over_rows:,}",
        )
        return None
    if world.is_main:
        for line in describe(placement, dataset, sizes):
            log.info("%s", line)
    return placement


def plan(config: RunConfig, dataset: PreparedDataset, world_size: int) -> Placement:
    """Return the placement of sharded tables among so many ranks."""
    return place_tables(
        [table.num_rows for table in dataset.tables],
        [table.lookups for table in dataset.tables],
        world_size,
        config.exchange.shard_over_rows,
    )


def describe(placement: Placement, dataset: PreparedDataset, sizes: ModelSizes) -> list[str]:
    """Return, for every rank, what lies there alone and the memory it takes in all."""
    names = [table.name for table in dataset.tables]
    common = sum(dataset.tables[t].num_rows for t in placement.replicated)
    besides = sizes.training_bytes - sizes.embedding_rows * sizes.training_row_bytes
    lines = [f"tables on every rank: {len(placement.replicated)} with {common:,} rows"]
    for rank in range(placement.world_size):
        own = sum(piece.num_rows for piece in placement.of_rank(rank))
        needed = besides + (common + own) * sizes.training_row_bytes
        lines.append(
            f"rank {rank}: {own:,} rows of {placement.describe(names, rank)}; "
            f"{needed / 2**20:,.1f} MiB for weights and optimizer"
        )
    return lines


def _fits(sizes: ModelSizes, world: World) -> bool:
    """Whether every rank has the memory for all tables."""
    available = available_memory_bytes()
    share = None if available is None else available / world.place.local_world_size
    fits = share is None or sizes.training_bytes < share
    return all(answer == b"1" for answer in world.gather(b"1" if fits else b"0"))
