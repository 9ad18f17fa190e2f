"""Sources that cannot be used, and text that is awkward to cut."""

import gzip
import os

import numpy as np
import pandas as pd
import pytest
import zstandard

from dqrm.data.config import PrepareConfig
from dqrm.data.prepare import prepare
from dqrm.data.schema import Schema, criteo_schema
from dqrm.data.sources import (
    BLOCK_BYTES,
    checksum,
    hash_file,
    map_text,
    open_source,
    plan_parts,
    read_compressed,
)

SCHEMA = {"label": "clicked", "dense": ["price"], "categorical": ["user_id"]}
TABLE = "clicked,price,user_id\n" + "1,2.5,a\n0,,b\n" * 40


def csv_config(**settings) -> PrepareConfig:
    return PrepareConfig(**{"schema": SCHEMA, "format": "csv", "workers": 1, **settings})


def refused(tmp_path, content: bytes, config: PrepareConfig, name: str = "rows") -> str:
    """The message for a source, with its path cut off; nothing may be left behind."""
    source = tmp_path / name
    source.write_bytes(content)
    with pytest.raises(ValueError) as caught:  # noqa: PT011, the message is the result
        prepare([source], tmp_path / "out", config)
    assert not (tmp_path / "out").exists()
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(str(source), "SOURCE")


def packed(kind: str, content: bytes) -> bytes:
    if kind == "gzip":
        return gzip.compress(content, mtime=0)
    return zstandard.ZstdCompressor().compress(content)


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.csv: No such file"):
        prepare([tmp_path / "nowhere.csv"], tmp_path / "out", csv_config())


def test_empty_file(tmp_path):
    assert refused(tmp_path, b"", csv_config()) == (
        "SOURCE: empty file; leave it out or copy it again"
    )


def test_header_alone(tmp_path):
    assert refused(tmp_path, b"clicked,price,user_id\n", csv_config()) == "SOURCE: no rows"


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_compressed_nothing(kind, tmp_path):
    assert refused(tmp_path, packed(kind, b""), PrepareConfig(workers=1)) == "SOURCE: no rows"


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
@pytest.mark.parametrize("workers", [1, 2])
def test_truncated(kind, workers, criteo_text, tmp_path):
    whole = packed(kind, criteo_text(3000, 1))
    config = PrepareConfig(workers=workers, shard_bytes=BLOCK_BYTES)
    message = refused(tmp_path, whole[: len(whole) * 2 // 3], config)
    assert message.startswith(f"SOURCE: the {kind} data end early, at byte {len(whole) * 2 // 3}")


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_damaged(kind, criteo_text, tmp_path):
    whole = bytearray(packed(kind, criteo_text(3000, 1)))
    for place in range(len(whole) // 2, len(whole) // 2 + 50):
        whole[place] ^= 0xFF
    message = refused(tmp_path, bytes(whole), PrepareConfig(workers=1))
    assert message.startswith(f"SOURCE: damaged {kind} data near byte")


def test_nearest_column_is_named(tmp_path):
    text = TABLE.replace("user_id", "userid").encode()
    assert refused(tmp_path, text, csv_config()) == (
        "SOURCE:1: no column 'user_id'; did you mean 'userid'?"
    )


def test_nearest_column_of_a_frame_and_of_parquet(tmp_path):
    frame = pd.DataFrame({"clicked": [0, 1], "prices": [1.0, 2.0], "user_id": ["a", "b"]})
    with pytest.raises(ValueError, match="DataFrame: no column 'price'; did you mean 'prices'"):
        prepare(frame, tmp_path / "out", csv_config())
    frame.to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"rows\.parquet: no column 'price'; did you mean"):
        prepare([tmp_path / "rows.parquet"], tmp_path / "out", csv_config(format="parquet"))


def test_column_named_twice(tmp_path):
    text = b"clicked,price,user_id,price\n1,2,a,3\n"
    assert refused(tmp_path, text, csv_config()) == "SOURCE:1: column 'price' appears 2 times"


def test_wrong_kind_of_file(tmp_path):
    frame = pd.DataFrame({"clicked": [0, 1], "price": [1.0, 2.0], "user_id": ["a", "b"]})
    frame.to_parquet(tmp_path / "p")
    message = refused(tmp_path, (tmp_path / "p").read_bytes(), csv_config())
    assert message == "SOURCE: is a Parquet file, but format is csv"
    message = refused(tmp_path, TABLE.encode(), csv_config(format="parquet"))
    assert message == "SOURCE: is not a Parquet file, but format is parquet"
    message = refused(tmp_path, b"PAR1" + bytes(100), csv_config(format="parquet"))
    assert message.startswith("SOURCE: not a readable Parquet file")
    message = refused(tmp_path, TABLE.encode("utf-16"), csv_config())
    assert message == "SOURCE: UTF-16 text; convert it to UTF-8"


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("price", [[1], [2]], "column 'price': dense value of type list"),
        ("user_id", [["a"], ["b"]], "column 'user_id': holds list.*set multi_hot to use lists"),
        ("user_id", ["a", 5], "convert the column to one type"),
    ],
)
def test_types_that_do_not_fit(column, values, message, tmp_path):
    frame = pd.DataFrame({"clicked": [0, 1], "price": [1.0, 2.0], "user_id": ["a", "b"]})
    frame[column] = pd.Series(values, dtype=object)
    with pytest.raises(ValueError, match=message):
        prepare(frame, tmp_path / "out", csv_config())
    assert not (tmp_path / "out").exists()


def test_multi_hot_needs_lists(tmp_path):
    schema = {"label": "y", "categorical": [{"name": "c", "multi_hot": True}]}
    frame = pd.DataFrame({"y": [0, 1], "c": [1, 2]})
    with pytest.raises(ValueError, match="column 'c': multi-hot, but of type int64"):
        prepare(frame, tmp_path / "out", csv_config(schema=schema))


def test_no_line_end(tmp_path):
    content = b"x" * (17 * 2**20) + b"\n"
    message = refused(tmp_path, content, PrepareConfig(workers=1, shard_bytes=BLOCK_BYTES))
    assert message.startswith("SOURCE: no line end in 16 MiB after byte")
    message = refused(tmp_path, gzip.compress(content), PrepareConfig(workers=1))
    assert "has" in message or "no line end" in message


@pytest.mark.parametrize("end", [b"\n", b""], ids=["line-end", "no-line-end"])
@pytest.mark.parametrize(
    "header", [0, 10, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 3 * BLOCK_BYTES + 5]
)
def test_every_line_lies_in_one_part(header, end, tmp_path):
    """Lines of all lengths, also longer than a part; a header that ends near a border."""
    rng = np.random.default_rng(header)
    lengths = np.concatenate([rng.integers(0, 300, 1500), [BLOCK_BYTES, 2 * BLOCK_BYTES + 3, 0]])
    lines = [b"%d:" % i + b"z" * int(n) for i, n in enumerate(lengths)]
    # Lines that begin exactly at a border.
    body = b"\n".join(lines)
    first = (
        b"clicked,price,user_id," + (b"h," * header)[: header - 23] + b"\n" if header > 23 else b""
    )
    source = tmp_path / "rows"
    source.write_bytes(first + body + end)
    config = csv_config(shard_bytes=BLOCK_BYTES, header=bool(first))
    opened = open_source(source, config)
    parts = plan_parts(0, opened, config)
    assert len(parts) == -(-opened.bytes // BLOCK_BYTES)
    pieces, blocks = [], []
    for part in parts:
        text = map_text(opened, part)
        with text.lines() as view:
            pieces.append(bytes(view))
        text.close()
        blocks.append(text.blocks)
    assert b"".join(pieces) == body + end
    assert all(piece.endswith(b"\n") or piece == b"" for piece in pieces[:-1])
    assert checksum(blocks) == checksum([hash_file(source)[1]])
    for kind in ("gzip", "zstd"):
        source.write_bytes(packed(kind, first + body + end))
        opened = open_source(source, config)
        found = list(read_compressed(opened, BLOCK_BYTES))
        assert b"".join(text for text, _, _ in found) == body + end
        assert sum(size for _, _, size in found) == opened.bytes
        assert checksum([blocks for _, blocks, _ in found]) == checksum([hash_file(source)[1]])


def test_line_that_begins_at_a_border(tmp_path):
    line = b"a" * 63 + b"\n"
    source = tmp_path / "rows"
    source.write_bytes(line * (3 * BLOCK_BYTES // 64))
    config = csv_config(shard_bytes=BLOCK_BYTES, header=False)
    opened = open_source(source, config)
    sizes = []
    for part in plan_parts(0, opened, config):
        text = map_text(opened, part)
        sizes.append(text.stop - text.start)
        text.close()
    assert sizes == [BLOCK_BYTES] * 3


def test_gzip_padded_with_zeros(criteo_text, tmp_path):
    source = tmp_path / "rows"
    source.write_bytes(gzip.compress(criteo_text(50, 0)) + bytes(1000))
    assert prepare([source], tmp_path / "out", PrepareConfig(workers=1)).rows == 50


def test_fifo_and_folder_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Is a directory"):
        prepare([tmp_path], tmp_path / "out", PrepareConfig(workers=1))


def test_unreadable_file(tmp_path):
    source = tmp_path / "rows"
    source.write_text("x")
    source.chmod(0)
    if os.access(source, os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(ValueError, match="Permission denied"):
        prepare([source], tmp_path / "out", PrepareConfig(workers=1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shard_bytes": 1000}, "shard_bytes"),
        ({"max_malformed": 1.5}, "share below 1 or whole lines"),
        ({"hash_buckets": 10, "min_frequency": 2}, "give one or the other"),
        ({"delimiter": ","}, "format criteo fixes it"),
        ({"format": "parquet", "header": True}, "a Parquet file has none"),
        ({"format": "csv", "columns": ["label"]}, "only for files without header"),
        (
            {"format": "tsv", "header": False, "columns": ["label"]},
            "columns: no column 'I1'; it has label",
        ),
        ({"schema": {"label": "labels", "dense": ["I1"]}}, "did you mean 'label'"),
        ({"schema": {"label": "a", "dense": ["b", "a"]}}, "used twice"),
        ({"schema": {"label": "a"}}, "no feature"),
        (
            {"schema": {"label": "a", "categorical": [
                {"name": "c", "hash_buckets": 5, "max_size": 3}]}},
            "give one or the other",
        ),
        ({"colums": ["a"]}, "colums"),
    ],
)  # fmt: skip
def test_contradictory_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PrepareConfig(**settings)


def test_settings_survive_json():
    config = PrepareConfig(schema="criteo", min_frequency=4, split={"by": "rows", "test": 5})
    again = PrepareConfig.model_validate_json(config.model_dump_json(by_alias=True))
    assert again == config
    assert again.resolved_schema.categorical[0].min_frequency == 4


def test_column_settings_win_over_defaults():
    schema = Schema.model_validate(
        {"label": "y", "categorical": ["a", {"name": "b", "hash_buckets": 7}]}
    )
    resolved = schema.with_defaults(min_frequency=3)
    assert [c.min_frequency for c in resolved.categorical] == [3, None]
    assert [c.hash_buckets for c in resolved.categorical] == [None, 7]


def test_any_column_name_makes_a_file_name():
    schema = Schema.model_validate({"label": "y", "categorical": ["../a/b", ".", "Größe %"]})
    files = [column.vocabulary_file for column in schema.categorical]
    assert files == ["..%2Fa%2Fb.npy", "..npy", "Gr%C3%B6%C3%9Fe %25.npy"]
    assert len(criteo_schema().names) == 40
