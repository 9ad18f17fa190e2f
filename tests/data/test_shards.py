"""Arrow shards and dataset.json: what is written is read back, and damage is named."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from dqrm.data.manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    DenseInfo,
    Manifest,
    ShardInfo,
    SourceInfo,
    SplitInfo,
    TableInfo,
    read_manifest,
)
from dqrm.data.rows import Lists, Rows
from dqrm.data.schema import CategoricalColumn, Schema
from dqrm.data.shards import Shard, ShardWriter, empty_rows, with_lists

SCHEMA = Schema(
    label="y",
    dense=("price", "age"),
    categorical=("user", CategoricalColumn(name="tags", multi_hot=True), "item"),
)


def make_rows(count: int, seed: int) -> Rows:
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(0, 4, count))])
    return Rows(
        rng.integers(0, 2, count).astype(np.float32),
        rng.random((2, count), dtype=np.float32),
        rng.integers(0, 100, (2, count)).astype(np.int32),
        (Lists(offsets, rng.integers(0, 50, offsets[-1]).astype(np.int32)),),
    )


def assert_equal(got: Rows, wanted: Rows) -> None:
    for name in ("label", "dense", "one_hot"):
        a, b = getattr(got, name), getattr(wanted, name)
        assert a.dtype == b.dtype, name
        np.testing.assert_array_equal(a, b, name)
    for a_list, b_list in zip(got.lists, wanted.lists, strict=True):
        np.testing.assert_array_equal(a_list.offsets, b_list.offsets)
        np.testing.assert_array_equal(a_list.ids, b_list.ids)


def write_shard(folder: Path, batches: list[Rows]) -> ShardInfo:
    with ShardWriter(folder, "train/00000.arrow", SCHEMA) as writer:
        for rows in batches:
            writer.write(rows)
        return writer.close()


def read(folder: Path, info: ShardInfo, start: int, stop: int) -> Rows:
    target = empty_rows(stop - start, SCHEMA)
    return with_lists(target, Shard(folder, info, SCHEMA).copy_rows(start, stop, target, 0), 1)


def test_rows_come_back_across_record_batches(tmp_path: Path) -> None:
    batches = [make_rows(count, count) for count in (5, 1, 30)]
    info = write_shard(tmp_path, batches)
    whole = Rows.concat(batches)
    assert (info.num_rows, info.bytes) == (36, (tmp_path / info.file).stat().st_size)
    for start, stop in [(0, 36), (0, 5), (3, 20), (5, 6), (35, 36)]:
        assert_equal(read(tmp_path, info, start, stop), whole.slice(start, stop))


def test_file_is_plain_arrow_with_one_column_each(tmp_path: Path) -> None:
    rows = make_rows(4, 0)
    info = write_shard(tmp_path, [rows])
    table = pa.ipc.open_file(str(tmp_path / info.file)).read_all()
    assert {f.name: str(f.type) for f in table.schema} == {
        "y": "float",
        "price": "float",
        "age": "float",
        "user": "int32",
        "item": "int32",
        "tags": "list<item: int32 not null>",
    }
    bags = rows.lists[0]
    assert table["tags"].to_pylist() == [
        bags.ids[bags.offsets[i] : bags.offsets[i + 1]].tolist() for i in range(4)
    ]


def test_reading_maps_the_file(tmp_path: Path) -> None:
    info = write_shard(tmp_path, [make_rows(100_000, 0)])
    before = pa.total_allocated_bytes()
    shard = Shard(tmp_path, info, SCHEMA)
    assert pa.total_allocated_bytes() == before
    target = empty_rows(1, SCHEMA)
    ids = shard.copy_rows(7, 8, target, 0)[0][0].ids
    assert not ids.flags.owndata
    assert not ids.flags.writeable


def test_a_failed_write_leaves_no_file(tmp_path: Path) -> None:
    def fail() -> None:
        with ShardWriter(tmp_path, "train/00000.arrow", SCHEMA) as writer:
            writer.write(make_rows(10, 0))
            raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        fail()
    assert list((tmp_path / "train").iterdir()) == []


def test_a_shard_is_unseen_until_it_is_complete(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "train/00000.arrow", SCHEMA)
    writer.write(make_rows(10, 0))
    assert not (tmp_path / "train/00000.arrow").exists()
    writer.close()
    assert [path.name for path in (tmp_path / "train").iterdir()] == ["00000.arrow"]


def test_damaged_shards_are_named(tmp_path: Path) -> None:
    info = write_shard(tmp_path, [make_rows(1000, 0)])
    path = tmp_path / info.file
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(ValueError, match=rf"{len(content) - 100} bytes, {len(content)} were"):
        Shard(tmp_path, info, SCHEMA)
    path.write_bytes(b"x" * len(content))
    with pytest.raises(ValueError, match="not a readable Arrow file"):
        Shard(tmp_path, info, SCHEMA)
    path.unlink()
    with pytest.raises(ValueError, match="missing"):
        Shard(tmp_path, info, SCHEMA)
    info = write_shard(tmp_path, [make_rows(1000, 0)])
    with pytest.raises(ValueError, match="columns are not those"):
        Shard(tmp_path, info, SCHEMA.model_copy(update={"label": "z"}))
    with pytest.raises(ValueError, match=r"holds 1000 rows, dataset\.json says 999"):
        Shard(tmp_path, info.model_copy(update={"num_rows": 999}), SCHEMA)


def test_take_and_concat_of_lists() -> None:
    lists = Lists(np.array([0, 2, 2, 3]), np.array([7, 2, 5], np.int32))
    taken = lists.take(np.array([2, 1, 0, 0]))
    assert taken.offsets.tolist() == [0, 1, 1, 3, 5]
    assert taken.ids.tolist() == [5, 7, 2, 7, 2]
    both = Lists.concat([lists.slice(1, 3), lists.slice(0, 1)])
    assert both.offsets.tolist() == [0, 0, 1, 3]
    assert both.ids.tolist() == [5, 7, 2]
    assert Lists.concat([]).offsets.tolist() == [0]


def manifest(**changes: object) -> Manifest:
    content: dict[str, object] = {
        "schema": SCHEMA,
        "dense": (DenseInfo(name="price"), DenseInfo(name="age")),
        "tables": (
            TableInfo(name="user", num_rows=100, vocabulary_digest="aa"),
            TableInfo(name="tags", num_rows=50, multi_hot=True, hashed=True),
            TableInfo(name="item", num_rows=100, vocabulary_digest="bb"),
        ),
        "splits": {
            "train": SplitInfo(
                num_rows=10, positives=3, shards=(ShardInfo(file="a", num_rows=10, bytes=9),)
            )
        },
        "sources": (SourceInfo(name="x.csv", checksum="sha256:ff", bytes=100, rows=10),),
        "settings": {"split": "time"},
    }
    return Manifest.model_validate(content | changes)


def test_manifest_comes_back(tmp_path: Path) -> None:
    manifest(report={"note": 1}).write(tmp_path)
    assert read_manifest(tmp_path) == manifest(report={"note": 1})
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST_FILE]


def test_digest_is_of_the_content_alone() -> None:
    digest = manifest().digest
    assert re.fullmatch("[0-9a-f]{32}", digest)
    shards = tuple(ShardInfo(file=name, num_rows=5, bytes=5) for name in "bc")
    same = [
        manifest(report={"note": 1}),
        manifest(splits={"train": SplitInfo(num_rows=10, positives=3, shards=shards)}),
        manifest(sources=(SourceInfo(name="y.csv", checksum="sha256:ff", bytes=100, rows=10),)),
    ]
    assert {other.digest for other in same} == {digest}
    shards = (ShardInfo(file="a", num_rows=10, bytes=9),)
    different = [
        manifest(settings={"split": "rows"}),
        manifest(splits={"train": SplitInfo(num_rows=10, positives=4, shards=shards)}),
        manifest(sources=(SourceInfo(name="x.csv", checksum="sha256:fe", bytes=100, rows=10),)),
        manifest(schema=SCHEMA.model_copy(update={"label": "z"})),
        manifest(
            tables=(
                manifest().tables[0].model_copy(update={"num_rows": 101}),
                *manifest().tables[1:],
            )
        ),
    ]
    assert len({digest, *(other.digest for other in different)}) == 6


def test_a_folder_that_is_no_data_set_says_why(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder; `dqrm data prepare` makes one"):
        read_manifest(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"no dataset\.json in it"):
        read_manifest(tmp_path)
    (tmp_path / ".work").mkdir()
    with pytest.raises(ValueError, match="run the same `dqrm data prepare` again to continue"):
        read_manifest(tmp_path)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match="is a file; give the folder"):
        read_manifest(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"version": FORMAT_VERSION + 1}, "newer dqrm", id="newer"),
        pytest.param({"version": None}, "not a prepared data set", id="no-version"),
        pytest.param({"splits": {"dev": {}}}, "splits.dev.num_rows", id="missing-field"),
        pytest.param({"tables": []}, "tables are not the categorical columns", id="no-tables"),
        pytest.param({"settings": {}}, "edited by hand", id="edited"),
    ],
)
def test_a_manifest_that_cannot_be_used_says_why(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    manifest().write(tmp_path)
    path = tmp_path / MANIFEST_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message) as raised:
        read_manifest(tmp_path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_manifest_cut_short_says_so(tmp_path: Path) -> None:
    manifest().write(tmp_path)
    path = tmp_path / MANIFEST_FILE
    path.write_text(path.read_text()[:100])
    with pytest.raises(ValueError, match="not valid JSON"):
        read_manifest(tmp_path)
