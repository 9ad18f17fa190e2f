"""A packed model on rows that carry the ids of another data set.

Ids are positions in a vocabulary, and vocabularies keep the keys of their values. So an id of the
data is looked up by its key in the model's own vocabulary, and is unknown where it is not there:
exactly what the model would have been given for the raw row, as long as the data knows every value
that the model knows.
"""

import numpy as np
import torch
from torch import Tensor, nn

from dqrm.data.dataset import PreparedDataset
from dqrm.data.manifest import VOCABULARY_FOLDER
from dqrm.data.vocabulary import load_keys
from dqrm.kernels.keys import KeyIndex
from dqrm.models.dlrm import DLRM
from dqrm.serving.artifact import Artifact


class TranslatedModel(nn.Module):
    """A model that takes the ids of another data set.

    Args:
        model: the model.
        ids: of each table, int64 [rows of the data's table], the model's id of each id.
    """

    def __init__(self, model: DLRM, ids: list[Tensor]) -> None:
        super().__init__()
        self.model = model
        counts = torch.tensor([len(table) for table in ids])
        self._starts = torch.cumsum(counts, 0) - counts
        self._ids = torch.cat(ids)

    def forward(self, dense: Tensor, indices: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Return logits [B]; arguments as of DLRM, with the data's ids."""
        num_tables = len(self._starts)
        if offsets is None:
            counts = torch.full((num_tables,), indices.numel() // num_tables)
        else:
            counts = offsets[:: len(dense)].diff()
        table = torch.repeat_interleave(torch.arange(num_tables), counts)
        translated = self._ids[indices.long() + self._starts[table]]
        logits: Tensor = self.model(dense, translated.to(indices.dtype), offsets)
        return logits


def fit_to(artifact: Artifact, dataset: PreparedDataset, name: str) -> nn.Module:
    """Return a packed model that reads ``dataset``, as it is or with its ids translated.

    Args:
        artifact: the packed model.
        dataset: whose ids its input has.
        name: what the model is called in messages.

    Raises:
        ValueError: it was trained on other columns, or knows values that the data does not.
    """
    if artifact.features_digest == dataset.manifest.features_digest:
        return artifact.model
    from dqrm.data.base import require_same_features

    schema = artifact.encoder.schema
    require_same_features(dataset.schema, schema, name)
    tables = []
    for column, info in zip(schema.categorical, dataset.tables, strict=True):
        if column.hash_buckets is not None:
            tables.append(torch.arange(info.num_rows))
            continue
        keys = load_keys(dataset.path / VOCABULARY_FOLDER / column.vocabulary_file)
        own = artifact.encoder.vocabularies[column.name]
        unseen = int(np.count_nonzero(KeyIndex(keys).lookup(own) == 0))
        if unseen:
            raise ValueError(
                f"{name} knows {unseen} values of {column.name!r} that {dataset.path} has no ids "
                "for, so it cannot be measured on those rows; prepare them with a base that does"
            )
        ids = KeyIndex(own).lookup(keys).astype(np.int64)
        tables.append(torch.from_numpy(np.concatenate([np.zeros(1, np.int64), ids])))
    return TranslatedModel(artifact.model, tables)
