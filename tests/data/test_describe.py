"""The description of a data set against figures computed by hand."""

import json

import numpy as np
import pandas as pd
import pytest

from dqrm.data.apply import apply
from dqrm.data.config import PrepareConfig
from dqrm.data.describe import describe, plot, render
from dqrm.data.manifest import read_manifest
from dqrm.data.prepare import prepare

SCHEMA = {
    "label": "y",
    "dense": ["x"],
    "categorical": ["c", {"name": "m", "multi_hot": True}, {"name": "h", "hash_buckets": 4}],
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("describe") / "out"
    frame = pd.DataFrame(
        {
            "y": [1, 0, 0, 0, 1, 1],
            "x": [1.0, None, 2, None, 3, 4],
            "c": ["a", "a", "a", "b", "b", "new"],
            "m": [["p", "q"], ["p"], [], ["p"], ["q"], ["r", "p"]],
            "h": ["u"] * 6,
        }
    )
    split = {"by": "rows", "test": 2}
    prepare(frame, folder, PrepareConfig(schema=SCHEMA, format="csv", split=split, workers=1))
    return folder


def test_figures(dataset):
    description = describe(dataset, embedding_dim=6)
    splits = {s.name: (s.num_rows, s.positive_rate) for s in description.splits}
    assert splits == {"train": (4, 0.25), "test": (2, 1.0)}
    assert description.dense_missing == {"x": pytest.approx(2 / 6)}
    c, m, h = description.tables
    assert (c.num_rows, c.used_rows, c.mean_length) == (3, 2, 1.0)
    assert c.coverage == {"train": 1.0, "test": 0.5}
    assert (c.top_id_share, c.top_percent_share) == (0.75, 0.75)
    assert (m.num_rows, m.used_rows, m.mean_length) == (3, 2, 1.0)
    assert m.coverage == {"train": 1.0, "test": pytest.approx(2 / 3)}
    assert m.top_id_share == 0.75
    assert m.missing_rate == pytest.approx(1 / 6)
    assert (h.num_rows, h.used_rows, h.hashed, h.top_id_share) == (4, 1, True, 1.0)
    assert h.coverage == {"train": 1.0, "test": 1.0}
    # Ten rows of six numbers: 24 bytes in FP32, 6 in INT8, 3 in INT4, and a scale a table.
    assert description.embedding_bytes == {32: 240, 8: 72, 4: 42}


def test_text_and_picture(dataset, tmp_path):
    description = describe(dataset)
    text = render(description)
    lines = text.splitlines()
    assert description.digest in lines[0]
    header = next(line for line in lines if line.startswith("categorical"))
    row = next(line for line in lines if line.startswith("c "))
    assert header.split("  ")[0] == "categorical column"
    assert row.split() == ["c", "3", "2", "1.00", "0.0%", "100.0%", "50.0%", "75.0%", "75.0%"]
    assert "h (hashed)" in text
    assert "10 embedding rows of 16: FP32 640 B, INT8 172 B, INT4 92 B" in text
    plot(description, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_damaged_data_sets(dataset, tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        describe(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="embedding_dim=0"):
        describe(dataset, embedding_dim=0)


def test_apply_reports_unknown_values(dataset, tmp_path):
    frame = pd.DataFrame(
        {
            "y": [0, 1], "x": [0, 1], "c": ["b", "zzz"], "m": [["p"], ["r", "s", "q"]],
            "h": ["u", "v"],
        }
    )  # fmt: skip
    report = apply(dataset, frame, tmp_path / "new", split="validation", changes={"workers": 1})
    assert report.split_rows == {"validation": 2}
    assert report.unknown_rates == {"c": 0.5, "m": 0.5}
    ours, theirs = read_manifest(tmp_path / "new"), read_manifest(dataset)
    assert ours.features_digest == theirs.features_digest
    assert ours.digest != theirs.digest
    assert [table.num_rows for table in ours.tables] == [table.num_rows for table in theirs.tables]
    assert [s.name for s in describe(tmp_path / "new").splits] == ["validation"]


def test_apply_takes_another_format(dataset, tmp_path):
    source = tmp_path / "rows.tsv"
    source.write_text("x\tc\tm\th\ty\n1\ta\tp|q\tu\t1\n")
    report = apply(dataset, [source], tmp_path / "new", changes={"format": "tsv", "workers": 1})
    assert report.split_rows == {"test": 1}
    assert report.unknown_rates == {"c": 0.0, "m": 0.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_frequency": 2}, "min_frequency: the data set decides it"),
        ({"split": {"by": "rows"}}, "split: the data set decides it"),
        ({"formt": "tsv"}, "formt"),
    ],
)
def test_apply_refuses_other_vocabularies(changes, message, dataset, tmp_path):
    with pytest.raises(ValueError, match=message):
        apply(dataset, [tmp_path / "rows"], tmp_path / "new", changes=changes)


def test_apply_into_the_data_set_itself(dataset):
    before = json.loads((dataset / "dataset.json").read_text())
    with pytest.raises(ValueError, match="is the data set itself"):
        apply(dataset, pd.DataFrame(), dataset, overwrite=True)
    assert json.loads((dataset / "dataset.json").read_text()) == before


def test_skew_of_a_larger_table(tmp_path):
    """1 % of 1,000 ids is ten of them."""
    rng = np.random.default_rng(0)
    values = np.concatenate([np.arange(1000), rng.integers(0, 10, 4000)])
    frame = pd.DataFrame({"y": values % 2, "c": values})
    config = PrepareConfig(
        schema={"label": "y", "categorical": ["c"]}, format="csv", workers=1,
        split={"by": "fraction", "validation": 0, "test": 0},
    )  # fmt: skip
    prepare(frame, tmp_path / "out", config)
    (table,) = describe(tmp_path / "out").tables
    assert table.num_rows == 1001
    assert table.top_percent_share == pytest.approx(4010 / 5000)
