"""The model and its sizes for a configuration and a prepared data set."""

import torch

from dqrm.config import RunConfig
from dqrm.data.dataset import PreparedDataset
from dqrm.models.dlrm import DLRM, build_dlrm
from dqrm.models.embedding import EmbeddingBagCollection
from dqrm.models.placement import Placement
from dqrm.models.sharded import ShardedEmbeddingBags
from dqrm.models.sizes import ModelSizes, model_sizes


def build_model(
    config: RunConfig,
    dataset: PreparedDataset,
    placement: Placement | None = None,
    rank: int = 0,
) -> DLRM:
    """Return a freshly initialised model with the tables of ``dataset``.

    Row 0 of a table with a vocabulary stands for every value left out of it and begins at zero:
    where no training row carries it, an unknown value then adds nothing, not noise.

    Args:
        config: of the run.
        dataset: whose tables the model gets.
        placement: of the tables, where ranks share them out; each builds its part.
        rank: of this process.
    """
    model = build_dlrm(
        config.model,
        config.quant,
        num_dense=dataset.num_dense,
        tables=_tables(dataset),
        placement=placement,
        rank=rank,
    )
    if isinstance(model.emb_l, ShardedEmbeddingBags):
        with_unknown = [t for t, table in enumerate(dataset.tables) if not table.hashed]
        model.emb_l.zero_first_rows(with_unknown)
        return model
    assert isinstance(model.emb_l, EmbeddingBagCollection)
    hashed = torch.tensor([table.hashed for table in dataset.tables])
    unknown = model.emb_l.table_start[~hashed]
    zeros = torch.zeros(unknown.numel(), model.emb_l.embedding_dim)
    model.emb_l.kernel.write_rows(unknown, zeros)
    model.emb_l.refresh_scales()
    return model


def sizes_of(config: RunConfig, dataset: PreparedDataset) -> ModelSizes:
    """Return the sizes of the model ``config`` builds for ``dataset``."""
    return model_sizes(
        config.model,
        config.quant,
        config.optim,
        num_dense=dataset.num_dense,
        tables=_tables(dataset),
    )


def _tables(dataset: PreparedDataset) -> list[tuple[str, int]]:
    return [(table.name, table.num_rows) for table in dataset.tables]
