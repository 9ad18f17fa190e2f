"""`dqrm data synth --days`: raw clicks by day, for a rehearsal of daily retraining.

A quarter of the ids of every table are newcomers: each is born on some day after the first, and
until then the id before it is drawn in its place. The label follows the ids that a row holds, so
the teacher is the same on all days; what changes is that values come up that were never there.
"""

from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dqrm.data.files import new_folder, write_json
from dqrm.data.rows import I32, Rows
from dqrm.data.schema import Schema, criteo_schema
from dqrm.data.synth import SynthConfig, new_output
from dqrm.data.teacher import CHUNK_ROWS, bayes_metrics

_NEWCOMER = 4
"""Every fourth id is one, beginning with the fourth most frequent."""

BAYES_FILE = "teacher.json"


def synthesize_days(
    output: str | Path,
    config: SynthConfig,
    days: int,
    first_day: date,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, dict[str, float]]:
    """Write `first_day`.parquet and the following days into the new folder `output`.

    Each has an equal share of `config.num_rows` raw rows in Criteo's columns, as `dqrm data
    prepare format=parquet` reads them. Returns what the true probabilities score on each day;
    teacher.json holds it too. The folder appears complete or not at all.

    Raises:
        ValueError: `output` exists and is not an empty folder, or there is no row for a day.
    """
    import pyarrow.parquet as pq

    output = new_output(output)
    rows_of_day = config.num_rows // days
    if days < 1 or rows_of_day < 2:
        raise ValueError(f"rows={config.num_rows}: too few for {days} days")
    teacher, schema = config.teacher(), config.schema_
    chunks = -(-rows_of_day // CHUNK_ROWS)
    best = {}
    with new_folder(output) as folder:
        for day in range(days):
            name = (first_day + timedelta(days=day)).isoformat()
            born = _born_by(day, days)
            writer = None
            labels, probabilities = [], []
            for chunk in range(chunks):
                rows, probability = teacher.chunk(day * chunks + chunk, born)
                count = min(CHUNK_ROWS, rows_of_day - chunk * CHUNK_ROWS)
                rows, probability = rows.slice(0, count), probability[:count]
                table = _raw_table(rows, schema)
                if writer is None:
                    writer = pq.ParquetWriter(folder / f"{name}.parquet", table.schema)
                writer.write_table(table)
                labels.append(rows.label)
                probabilities.append(probability)
                progress(day * rows_of_day + chunk * CHUNK_ROWS + count, days * rows_of_day)
            assert writer is not None
            writer.close()
            best[name] = bayes_metrics(np.concatenate(labels), np.concatenate(probabilities))
        write_json(folder / BAYES_FILE, best)
    return best


def _born_by(day: int, days: int) -> Callable[[I32], I32]:
    """Ids that a day has, from ids of any day."""

    def present(ids: I32) -> I32:
        number, place = np.divmod(ids, _NEWCOMER)
        # One after the other: the most frequent newcomer comes on the second day.
        birth = np.where(place == _NEWCOMER - 1, 1 + number % max(days - 1, 1), 0)
        found: I32 = (ids - (birth > day)).astype(np.int32)
        return found

    return present


def _raw_table(rows: Rows, schema: Schema) -> Any:
    import pyarrow as pa

    columns: dict[str, Any] = {schema.label: pa.array(rows.label.astype(np.int8))}
    for at, dense in enumerate(schema.dense):
        columns[dense.name] = pa.array(np.rint(np.expm1(rows.dense[at])).astype(np.int64))
    one_hot, lists = iter(rows.one_hot), iter(rows.lists)
    for column in schema.categorical:
        if column.multi_hot:
            bags = next(lists)
            texts = _texts(column.name, bags.ids)
            columns[column.name] = pa.ListArray.from_arrays(bags.offsets.astype(np.int32), texts)
        else:
            columns[column.name] = _texts(column.name, next(one_hot))
    return pa.table({name: columns[name] for name in criteo_schema().names})


def _texts(column: str, ids: npt.NDArray[np.int32]) -> Any:
    import pyarrow as pa

    distinct, place = np.unique(ids, return_inverse=True)
    names = pa.array([f"{column}-{value:x}" for value in distinct.tolist()], pa.string())
    return names.take(pa.array(place.astype(np.int32)))
