"""What a prepared data set looks like: sizes, gaps, skew, and the memory a model would need."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dqrm.data.files import save_figure
from dqrm.data.manifest import Manifest, read_manifest
from dqrm.data.shards import check_size

I64 = npt.NDArray[np.int64]

_FP32_BYTES = 4
_BITS = (32, 8, 4)


@dataclass(frozen=True)
class SplitDescription:
    """One split."""

    name: str
    num_rows: int
    positive_rate: float


@dataclass(frozen=True)
class TableDescription:
    """One categorical column; look-ups are those of the training split unless told."""

    name: str
    num_rows: int
    """Embedding rows, id 0 included."""
    hashed: bool
    multi_hot: bool
    missing_rate: float
    used_rows: int
    """Embedding rows looked up at least once."""
    coverage: dict[str, float]
    """By split: share of look-ups of known values (not id 0); 1 when hashed."""
    mean_length: float
    """Ids per row: 1 for one-hot."""
    top_id_share: float
    """Share of look-ups that go to the most frequent id."""
    top_percent_share: float
    """Share of look-ups that go to the most frequent 1 % of ids (at least one)."""


@dataclass(frozen=True)
class DatasetDescription:
    """A prepared data set; `render` makes text of it, `plot` a picture."""

    path: Path
    digest: str
    splits: tuple[SplitDescription, ...]
    dense_missing: dict[str, float]
    tables: tuple[TableDescription, ...]
    embedding_dim: int
    embedding_bytes: dict[int, int]
    """Memory of all embedding rows by bits; with 8 and 4 bits a FP32 scale for each table."""

    @property
    def embedding_rows(self) -> int:
        """Rows of all tables together."""
        return sum(table.num_rows for table in self.tables)


def describe(dataset: Path | str, *, embedding_dim: int = 16) -> DatasetDescription:
    """Read the manifest and count the look-ups of every id.

    Memory: 8 bytes for each row of the largest table, and one shard's column.

    Raises:
        ValueError: there is no data set, or a shard is damaged.
    """
    folder = Path(dataset)
    if embedding_dim < 1:
        raise ValueError(f"embedding_dim={embedding_dim}: must be at least 1")
    manifest = read_manifest(folder)
    tables = tuple(_describe_table(folder, manifest, t) for t in range(len(manifest.tables)))
    rows = sum(table.num_rows for table in tables)
    return DatasetDescription(
        path=folder,
        digest=manifest.digest,
        splits=tuple(
            SplitDescription(name, info.num_rows, info.positives / max(info.num_rows, 1))
            for name, info in manifest.splits.items()
        ),
        dense_missing={info.name: info.missing_rate for info in manifest.dense},
        tables=tables,
        embedding_dim=embedding_dim,
        embedding_bytes={
            bits: rows * (-(-embedding_dim * bits // 8))
            + (_FP32_BYTES * len(tables) if bits < 32 else 0)
            for bits in _BITS
        },
    )


def _describe_table(folder: Path, manifest: Manifest, table: int) -> TableDescription:
    info = manifest.tables[table]
    counts = {name: _counts(folder, manifest, name, table) for name in manifest.splits}
    coverage = {
        name: 1.0 if info.hashed else 1.0 - float(found[0]) / max(int(found.sum()), 1)
        for name, found in counts.items()
    }
    # A data set made by `apply` may hold no training rows.
    first = "train" if "train" in counts else next(iter(counts))
    used = counts[first]
    lookups = max(int(used.sum()), 1)
    top = np.sort(used)[::-1][: max(1, len(used) // 100)]
    return TableDescription(
        name=info.name,
        num_rows=info.num_rows,
        hashed=info.hashed,
        multi_hot=info.multi_hot,
        missing_rate=info.missing_rate,
        used_rows=int(np.count_nonzero(used)),
        coverage=coverage,
        mean_length=int(used.sum()) / max(manifest.splits[first].num_rows, 1),
        top_id_share=int(top[0]) / lookups,
        top_percent_share=int(top.sum()) / lookups,
    )


def _counts(folder: Path, manifest: Manifest, split: str, table: int) -> I64:
    """Look-ups of every id of a table in a split, int64 [num_rows]."""
    column = manifest.schema_.categorical[table]
    total = np.zeros(manifest.tables[table].num_rows, np.int64)
    for info in manifest.splits[split].shards:
        check_size(folder, info)
        reader = pa.ipc.open_file(pa.memory_map(str(folder / info.file)))
        for number in range(reader.num_record_batches):
            array = reader.get_batch(number).column(column.name)
            ids = (array.flatten() if column.multi_hot else array).to_numpy()
            found = np.bincount(ids, minlength=len(total))
            if len(found) > len(total):
                raise ValueError(
                    f"{folder / info.file}: column {column.name!r} holds id {len(found) - 1}, its "
                    f"table has {len(total)} rows; prepare the data again"
                )
            total += found
    return total


def render(description: DatasetDescription) -> str:
    """Plain text, a table a section."""
    lines = [f"{description.path}  (digest {description.digest})", ""]
    lines += _table(
        ("split", "rows", "positive"),
        [(s.name, f"{s.num_rows:,}", f"{s.positive_rate:.2%}") for s in description.splits],
    )
    if description.dense_missing:
        lines += [
            "",
            *_table(
                ("dense column", "missing"),
                [(name, f"{rate:.1%}") for name, rate in description.dense_missing.items()],
            ),
        ]
    if description.tables:
        lines += ["", *_tables_section(description)]
        dim, rows = description.embedding_dim, description.embedding_rows
        sizes = ", ".join(
            f"{'FP32' if bits == 32 else f'INT{bits}'} {_size(count)}"
            for bits, count in description.embedding_bytes.items()
        )
        lines += ["", f"{rows:,} embedding rows of {dim}: {sizes}"]
    return "\n".join(lines)


def _tables_section(description: DatasetDescription) -> list[str]:
    names = [split.name for split in description.splits]
    header = (
        "categorical column", "rows", "used", "ids/row", "missing",
        *(f"known in {name}" for name in names), "top id", "top 1 %",
    )  # fmt: skip
    rows = [
        (
            table.name + (" (hashed)" if table.hashed else ""),
            f"{table.num_rows:,}",
            f"{table.used_rows:,}",
            f"{table.mean_length:.2f}",
            f"{table.missing_rate:.1%}",
            *(f"{table.coverage[name]:.1%}" for name in names),
            f"{table.top_id_share:.1%}",
            f"{table.top_percent_share:.1%}",
        )
        for table in description.tables
    ]
    return _table(header, rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns padded to one width, the first to the left, the others to the right."""
    widths = [max(len(row[at]) for row in (header, *rows)) for at in range(len(header))]
    return [
        "  ".join(
            text.rjust(width) if at else text.ljust(width)
            for at, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (header, *rows)
    ]


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def plot(description: DatasetDescription, path: Path | str) -> None:
    """Write a PNG: rows of every table, and how few of them take most look-ups."""
    from matplotlib.figure import Figure

    tables = sorted(description.tables, key=lambda table: table.num_rows)
    names = [table.name for table in tables]
    places = np.arange(len(tables))
    figure = Figure(figsize=(11, max(3.0, 0.28 * len(tables) + 1.5)), layout="constrained")
    sizes, skew = figure.subplots(1, 2, sharey=True)
    _bars(sizes, places, [("embedding rows", [table.num_rows for table in tables], "#4c78a8")])
    sizes.set_xscale("log")
    sizes.set_xlim(left=1)
    sizes.set_yticks(places, names)
    sizes.set_xlabel("embedding rows (log scale)")
    _bars(
        skew,
        places,
        [
            ("top 1 % of ids", [100 * table.top_percent_share for table in tables], "#f58518"),
            ("most frequent id", [100 * table.top_id_share for table in tables], "#b33c00"),
        ],
    )
    skew.set_xlim(0, 100)
    skew.set_xlabel("share of training look-ups (%)")
    skew.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    figure.suptitle(f"{description.path.name}: size and skew of {len(tables)} categorical columns")
    save_figure(figure, Path(path))


def _bars(axes: Any, places: I64, groups: Sequence[tuple[str, Sequence[float], str]]) -> None:
    for label, values, color in groups:
        axes.barh(places, values, label=label, color=color, height=0.7)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
