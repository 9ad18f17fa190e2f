"""Raw rows in memory to a batch, with the vocabularies a model was trained with."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dqrm.data.batch import Batch, make_batch
from dqrm.data.columnar import local_rows
from dqrm.data.local import Remap, table_columns, to_global
from dqrm.data.manifest import VOCABULARY_FOLDER, read_manifest
from dqrm.data.schema import Schema
from dqrm.data.vocabulary import load_keys
from dqrm.kernels.keys import KeyIndex

if TYPE_CHECKING:
    import pandas as pd


class RowEncoder:
    """Turns a frame of raw rows into a `Batch`, as preparation would have.

    Example::

        encoder = RowEncoder.from_dataset("prepared/criteo")
        batch = encoder.encode(frame)  # a frame with the raw columns, label optional
    """

    def __init__(self, schema: Schema, vocabularies: Mapping[str, npt.NDArray[np.uint64]]) -> None:
        """schema: with nothing left to defaults; vocabularies: keys of each column not hashed.

        Raises:
            ValueError: a column has neither hash buckets nor a vocabulary.
        """
        for column in schema.categorical:
            if column.hash_buckets is None and column.name not in vocabularies:
                raise ValueError(f"column {column.name!r}: its vocabulary is missing")
        self.schema = schema
        self.vocabularies = dict(vocabularies)
        self._indices = [
            None if column.hash_buckets is not None else KeyIndex(vocabularies[column.name])
            for column in table_columns(schema)
        ]

    @classmethod
    def from_dataset(cls, path: str | Path) -> "RowEncoder":
        """The encoder of a prepared data set.

        Raises:
            ValueError: there is no readable data set at `path`.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        return cls(manifest.schema_, _load_vocabularies(folder, manifest.schema_))

    def encode(self, frame: "pd.DataFrame") -> Batch:
        """Encode rows; values never seen in training get id 0, a missing label column zeros.

        Raises:
            ValueError: a column is missing or of a type its role does not allow, or a row holds a
                value that cannot be read; the message names the row from 0 and the column.
        """
        import pyarrow as pa

        schema = self.schema
        names = [name for name in schema.names if name != schema.time]
        if schema.label not in frame.columns:
            names.remove(schema.label)
        # The time column splits rows; it is no feature.
        wanted = schema.model_copy(update={"time": None})
        wanted.require_columns([*map(str, frame.columns), schema.label], "frame")
        try:
            table = pa.Table.from_pandas(frame[names], preserve_index=False)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            text = " ".join(str(error).split())
            raise ValueError(f"frame: {text}; convert the column to one type") from None
        local = local_rows(table, wanted, need_label=False)
        if local.malformed_count:
            first = local.malformed[0]
            raise ValueError(f"frame: row {first.line}: {first.reason}")
        remaps: list[Remap] = [
            None if index is None or keys is None else index.lookup(keys)
            for index, keys in zip(self._indices, local.keys, strict=True)
        ]
        return make_batch(to_global(local.rows, tuple(remaps)), schema)


def _load_vocabularies(folder: Path, schema: Schema) -> dict[str, npt.NDArray[np.uint64]]:
    return {
        column.name: load_keys(folder / VOCABULARY_FOLDER / column.vocabulary_file)
        for column in schema.categorical
        if column.hash_buckets is None
    }
