"""Rows in memory get the ids they had in preparation."""

import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from dqrm.data.config import PrepareConfig
from dqrm.data.dataset import PreparedDataset
from dqrm.data.encode import RowEncoder
from dqrm.data.prepare import prepare

SCHEMA = {
    "label": "y",
    "dense": ["x", {"name": "z", "transform": "none"}],
    "categorical": [{"name": "tags", "multi_hot": True}, "city", {"name": "h", "hash_buckets": 9}],
    "time": "t",
}


@pytest.fixture(scope="module")
def frame():
    rng = np.random.default_rng(0)
    n = 500
    return pd.DataFrame(
        {
            "y": rng.integers(0, 2, n),
            "x": np.where(rng.random(n) < 0.2, np.nan, rng.normal(3, 5, n)),
            "z": rng.integers(-9, 9, n),
            "tags": [[f"t{i}" for i in rng.integers(0, 30, k)] for k in rng.integers(0, 4, n)],
            "city": pd.Categorical(rng.choice(["a", "b", "c"], n)),
            "h": rng.integers(0, 1000, n),
            "t": np.arange(n),
        }
    )


@pytest.fixture(scope="module")
def dataset(frame, tmp_path_factory):
    folder = tmp_path_factory.mktemp("encode") / "out"
    split = {"by": "time", "test_from": 400}
    prepare(frame, folder, PrepareConfig(schema=SCHEMA, format="csv", split=split, workers=1))
    return folder


def same(a, b):
    fields = ("dense", "indices", "offsets", "label")
    return all(torch.equal(getattr(a, field), getattr(b, field)) for field in fields)


def test_encoder_agrees_with_preparation(frame, dataset):
    stored = PreparedDataset.open(dataset)
    encoder = RowEncoder.from_dataset(dataset)
    for split, rows in (("train", frame[:400]), ("test", frame[400:])):
        assert same(encoder.encode(rows), next(stored.split(split).batches(len(rows))))


def test_label_and_time_may_be_absent(frame, dataset):
    encoder = RowEncoder.from_dataset(dataset)
    batch = encoder.encode(frame.drop(columns=["y", "t"]))
    assert torch.equal(batch.label, torch.zeros(len(frame)))
    assert torch.equal(batch.indices, encoder.encode(frame).indices)


def test_unseen_values_get_id_zero(frame, dataset):
    rows = frame[:2].copy()
    rows["city"] = ["nowhere", None]
    rows["tags"] = [["t1", "never"], []]
    batch = RowEncoder.from_dataset(dataset).encode(rows)
    # Table by table: two tags of row 0, none of row 1, then the cities, then the hashes.
    assert batch.offsets.tolist() == [0, 2, 2, 3, 4, 5, 6]
    assert batch.indices[0] > 0
    assert batch.indices[1:4].tolist() == [0, 0, 0]


def test_one_row_and_no_row(frame, dataset):
    encoder = RowEncoder.from_dataset(dataset)
    assert encoder.encode(frame[:1]).dense.shape == (1, 2)
    empty = encoder.encode(frame[:0])
    assert empty.dense.shape == (0, 2)
    assert len(empty.indices) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.rename(columns={"city": "City"}), "frame: no column 'city'; did you mean"),
        (lambda f: f.assign(x=["1"] * 9 + ["one"]), "row 9: x: dense value 'one' is not a number"),
        (lambda f: f.assign(x=[np.inf] * 10), "row 0: x: dense value 'inf' is not finite"),
        (lambda f: f.assign(z=[1e39] * 10), "row 0: z: dense value '1e\\+39' is too large"),
        (lambda f: f.assign(y=5), "row 0: y: label '5' is not 0 or 1"),
        (lambda f: f.assign(city=[["a"]] * 10), "set multi_hot"),
    ],
)
def test_bad_rows_are_named(change, message, frame, dataset):
    with pytest.raises(ValueError, match=message):
        RowEncoder.from_dataset(dataset).encode(change(frame[:10]))


def test_incomplete_encoders_are_refused(dataset, tmp_path):
    encoder = RowEncoder.from_dataset(dataset)
    with pytest.raises(ValueError, match="column 'tags': its vocabulary is missing"):
        RowEncoder(encoder.schema, {})
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    (copy / "vocabulary" / "city.npy").unlink()
    with pytest.raises(ValueError, match=r"city\.npy: not a readable vocabulary"):
        RowEncoder.from_dataset(copy)


def test_text_lists_use_the_schemas_separator(tmp_path):
    schema = {"label": "y", "categorical": [{"name": "c", "multi_hot": True}]}
    frame = pd.DataFrame({"y": [0, 1, 0], "c": ["a;b", "", "b;;a"]})
    config = PrepareConfig(
        schema={**schema, "list_separator": ";"}, format="csv",
        split={"by": "fraction", "validation": 0, "test": 0}, workers=1,
    )  # fmt: skip
    prepare(frame, tmp_path / "out", config)
    batch = RowEncoder.from_dataset(tmp_path / "out").encode(frame)
    assert batch.offsets.tolist() == [0, 2, 2, 4]
    assert sorted(batch.indices.tolist()) == [1, 1, 2, 2]
