"""Every reader gives the same rows the same ids."""

import csv
import gzip
import io
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from dqrm.data.apply import apply
from dqrm.data.config import PrepareConfig
from dqrm.data.prepare import prepare

SCHEMA = {
    "label": "click",
    "dense": ["price", {"name": "depth", "transform": "none"}],
    "categorical": [
        "user",
        {"name": "tags", "multi_hot": True},
        "city",
        {"name": "words", "multi_hot": True, "hash_buckets": 50},
        {"name": "zip", "hash_buckets": 20},
    ],
    "time": "when",
}
SPLIT = {"by": "time", "validation_from": "2024-02-01", "test_from": "2024-03-01"}
ROWS = 300


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    rng = np.random.default_rng(3)

    def gaps(values, share=0.15):
        empty = rng.random(ROWS) < share
        return [None if gap else value for gap, value in zip(empty, values, strict=True)]

    return pd.DataFrame(
        {
            "click": rng.integers(0, 2, ROWS),
            "price": gaps(rng.lognormal(1, 2, ROWS).round(3)),
            "depth": rng.integers(-5, 50, ROWS),
            "user": pd.array(gaps(rng.integers(-3, 40, ROWS).tolist()), dtype="Int64"),
            "tags": [rng.integers(0, 9, n).tolist() for n in rng.integers(0, 4, ROWS)],
            "city": pd.Categorical(gaps(rng.choice(["Köln", 'a "b", c', "x"], ROWS).tolist())),
            "words": [[f"w{i}" for i in range(n)] for n in rng.integers(0, 3, ROWS)],
            "zip": gaps(rng.choice(["01234", "1234"], ROWS).tolist()),
            "when": pd.Timestamp("2024-01-01")
            + pd.to_timedelta(rng.integers(0, 90 * 86400, ROWS), unit="s"),
            "unused": rng.random(ROWS),
        }
    )


def as_text(frame: pd.DataFrame, *, delimiter: str, header: bool, quote: bool, end="\n") -> bytes:
    flat = frame.copy()
    for name in ("tags", "words"):
        flat[name] = ["|".join(map(str, values)) for values in frame[name]]
    out = io.StringIO()
    quoting = csv.QUOTE_MINIMAL if quote else csv.QUOTE_NONE
    flat.to_csv(
        out, sep=delimiter, header=header, index=False, quoting=quoting, lineterminator=end,
        quotechar='"' if quote else "\0", date_format="%Y-%m-%d %H:%M:%S",
    )  # fmt: skip
    return out.getvalue().encode()


@pytest.fixture(scope="module")
def expected(frame, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("frame") / "out"
    config = PrepareConfig(schema=SCHEMA, format="csv", split=SPLIT, workers=1)
    prepare(frame, folder, config)
    return folder


def csv_header(frame, folder):
    return {"format": "csv"}, as_text(frame, delimiter=",", header=True, quote=True)


def csv_windows(frame, folder):
    text = as_text(frame, delimiter=",", header=True, quote=True, end="\r\n")
    return {"format": "csv"}, b"\xef\xbb\xbf" + text


def csv_other_order(frame, folder):
    order = [*reversed(frame.columns)]
    return {"format": "csv"}, as_text(frame[order], delimiter=",", header=True, quote=True)


def csv_semicolon_no_header(frame, folder):
    settings = {
        "format": "csv", "delimiter": ";", "header": False, "columns": list(frame.columns),
    }  # fmt: skip
    return settings, as_text(frame, delimiter=";", header=False, quote=True)


def tsv_header(frame, folder):
    return {"format": "tsv"}, as_text(frame, delimiter="\t", header=True, quote=False)


def tsv_no_header(frame, folder):
    names = ["click", "price", "depth", "user", "tags", "city", "words", "zip", "when"]
    text = as_text(frame[names], delimiter="\t", header=False, quote=False)
    return {"format": "tsv", "header": False}, text.rstrip(b"\n")


def csv_gzip(frame, folder):
    text = as_text(frame, delimiter=",", header=True, quote=True)
    # Two members, as `cat a.gz b.gz` makes them.
    return {"format": "csv"}, gzip.compress(text[:5000]) + gzip.compress(text[5000:])


def csv_zstd(frame, folder):
    text = as_text(frame, delimiter=",", header=True, quote=True)
    pack = zstandard.ZstdCompressor().compress
    return {"format": "csv"}, pack(text[:5000]) + pack(text[5000:])


def parquet(frame, folder):
    table = pa.Table.from_pandas(frame, preserve_index=False)
    assert pa.types.is_dictionary(table.schema.field("city").type)
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=70)
    return {"format": "parquet", "shard_rows": 64}, sink.getvalue()


def parquet_other_types(frame, folder):
    table = pa.table(
        {
            "click": pa.array(frame["click"] == 1),
            "price": pa.array(frame["price"], pa.float64()),
            "depth": pa.array(frame["depth"], pa.int16()),
            # What pandas makes of integers with gaps.
            "user": pa.array(frame["user"].astype("Float64"), pa.float32()),
            "tags": pa.array(frame["tags"], pa.large_list(pa.int8())),
            "city": pa.array(frame["city"].astype(object), pa.large_string(), from_pandas=True),
            "words": pa.array(frame["words"], pa.list_(pa.string())),
            "zip": pa.array(frame["zip"], pa.string()),
            "when": pa.array(frame["when"], pa.timestamp("ms", "UTC")),
        }
    )
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return {"format": "parquet"}, sink.getvalue()


READERS = [
    csv_header, csv_windows, csv_other_order, csv_semicolon_no_header, tsv_header, tsv_no_header,
    csv_gzip, csv_zstd, parquet, parquet_other_types,
]  # fmt: skip


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
def test_reader_agrees_with_the_frame(reader, frame, expected, tmp_path, split_table):
    settings, content = reader(frame, tmp_path)
    source = tmp_path / "rows"
    source.write_bytes(content)
    config = PrepareConfig(schema=SCHEMA, split=SPLIT, workers=1, **settings)
    report = prepare([source], tmp_path / "out", config)
    assert report.rows == ROWS
    for split in ("train", "validation", "test"):
        assert split_table(tmp_path / "out", split).equals(split_table(expected, split)), split
    for vocabulary in (expected / "vocabulary").iterdir():
        ours = tmp_path / "out" / "vocabulary" / vocabulary.name
        assert ours.read_bytes() == vocabulary.read_bytes()


def test_values_are_what_a_person_expects(frame, expected, split_table):
    """The frame's own reader against pandas, so that agreeing readers are not all wrong."""
    when = frame["when"]
    train = frame[when < "2024-02-01"]
    table = split_table(expected, "train")
    assert table.column_names == ["click", "price", "depth", "user", "city", "zip", "tags", "words"]
    np.testing.assert_array_equal(table["click"], train["click"])
    price = train["price"].fillna(0).to_numpy()
    np.testing.assert_array_equal(table["price"], np.log1p(price).astype(np.float32))
    np.testing.assert_array_equal(table["depth"], train["depth"])
    # Equal values have equal ids, different values different ones.
    pairs = set(zip(train["user"].astype(str), table["user"].to_pylist(), strict=True))
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})
    assert [len(ids) for ids in table["tags"].to_pylist()] == [len(t) for t in train["tags"]]
    tops = train["tags"].explode().dropna().astype(int).value_counts()
    most = tops.index[tops == tops.max()]
    firsts = {
        tag
        for tags, ids in zip(train["tags"], table["tags"].to_pylist(), strict=True)
        for tag, id_ in zip(tags, ids, strict=True)
        if id_ == 1
    }
    assert len(firsts) == 1
    assert firsts <= set(most)


def test_missing_rates(frame, expected):
    from dqrm.data.manifest import read_manifest

    manifest = read_manifest(expected)
    rates = {info.name: info.missing_rate for info in (*manifest.dense, *manifest.tables)}
    for name in ("price", "user", "city", "zip"):
        assert rates[name] == pytest.approx(frame[name].isna().mean())
    assert rates["tags"] == pytest.approx(np.mean([not tags for tags in frame["tags"]]))


@pytest.mark.parametrize(
    ("name", "columns"),
    [("criteo_kaggle_12k.tsv.gz", 12_000), ("criteo_terabyte_1k.tsv.gz", 1_000)],
)
def test_criteo_logs(name, columns, shared_ctr, tmp_path, tree):
    """Real logs, plain, gzip and zstd: the same data set but for the source's checksum."""
    text = gzip.decompress((shared_ctr / name).read_bytes())
    files = {
        "plain": text,
        "gzip": (shared_ctr / name).read_bytes(),
        "zstd": zstandard.ZstdCompressor().compress(text),
    }
    trees = []
    for kind, content in files.items():
        source = tmp_path / kind
        source.write_bytes(content)
        split = {"by": "rows", "test": columns // 6}
        report = prepare([source], tmp_path / f"{kind}.out", PrepareConfig(split=split, workers=1))
        assert report.split_rows == {"train": columns - columns // 6, "test": columns // 6}
        files_of = tree(tmp_path / f"{kind}.out")
        del files_of["dataset.json"]
        trees.append(files_of)
    assert trees[0] == trees[1] == trees[2]


def test_criteo_logs_by_pandas(shared_ctr, tmp_path, tree):
    from dqrm.data.schema import criteo_schema

    source = shared_ctr / "criteo_kaggle_12k.tsv.gz"
    frame = pd.read_csv(source, sep="\t", header=None, names=criteo_schema().names)
    config = PrepareConfig(split={"by": "rows", "test": 2000}, min_frequency=2, workers=1)
    prepare([source], tmp_path / "text", config)
    prepare(frame, tmp_path / "frame", config)
    text, ours = tree(tmp_path / "text"), tree(tmp_path / "frame")
    del text["dataset.json"], ours["dataset.json"]
    assert text == ours


def test_apply_gives_known_values_their_ids(frame, expected, tmp_path, split_table):
    new = frame[frame["when"] >= "2024-03-01"].drop(columns="when")
    report = apply(expected, new, tmp_path / "out", changes={"workers": 1})
    assert report.split_rows == {"test": len(new)}
    assert split_table(tmp_path / "out", "test").equals(split_table(expected, "test"))
