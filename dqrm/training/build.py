"""The model and its sizes for a configuration and a prepared data set."""

from dqrm.config import RunConfig
from dqrm.data.dataset import PreparedDataset
from dqrm.models.dlrm import DLRM, build_dlrm
from dqrm.models.sizes import ModelSizes, model_sizes


def build_model(config: RunConfig, dataset: PreparedDataset) -> DLRM:
    """Return a freshly initialised model with the tables of ``dataset``."""
    return build_dlrm(
        config.model, config.quant, num_dense=dataset.num_dense, tables=_tables(dataset)
    )


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
