"""A new day prepared with the ids of an earlier one."""

from collections import Counter

import numpy as np
import pandas as pd
import pytest

from dqrm.data.base import base_of, inherited
from dqrm.data.config import PrepareConfig
from dqrm.data.dataset import PreparedDataset
from dqrm.data.encode import RowEncoder
from dqrm.data.manifest import read_manifest
from dqrm.data.prepare import prepare
from dqrm.data.vocabulary import load_keys

CATEGORICAL = ["user", {"name": "tags", "multi_hot": True}, {"name": "page", "hash_buckets": 7}]
SCHEMA = {"label": "clicked", "dense": ["price"], "categorical": CATEGORICAL}


def day(number, rows=300):
    """Users and tags of this day and of the ones before."""
    rng = np.random.default_rng(number)
    return pd.DataFrame(
        {
            "clicked": rng.integers(0, 2, rows),
            "price": rng.lognormal(2, 1, rows),
            "user": [f"u{u}" for u in rng.integers(0, 20 * (1 + number), rows)],
            "tags": [[f"t{t}" for t in rng.integers(0, 4 + number, 3)] for _ in range(rows)],
            "page": [f"p{p}" for p in rng.integers(0, 50, rows)],
        }
    )


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """The files of three days."""
    folder = tmp_path_factory.mktemp("raw")
    files = [folder / f"day{number}.parquet" for number in range(3)]
    for number, file in enumerate(files):
        day(number).to_parquet(file)
    return files


def settings(**changes):
    schema = {"schema": SCHEMA, "format": "parquet", "workers": 1, "shard_rows": 64}
    return PrepareConfig.model_validate({**schema, "split": {"by": "file"}, **changes})


@pytest.fixture(scope="module")
def first(raw, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "first"
    prepare(raw[:1], folder, settings())
    return folder


def keys_of(folder, name):
    return load_keys(folder / "vocabulary" / f"{name}.npy").tolist()


def following(first, raw, output, *, grows=True, files=None, **changes):
    base, _ = base_of(first, grows=grows)
    split = {"by": "file", "test": ["day2*"]}
    return prepare(files or raw[1:], output, settings(split=split, **changes), base=base)


@pytest.mark.parametrize("memory", [2**30, 2**20], ids=["one-part", "parts"])
def test_new_values_follow_the_old_ones(memory, first, raw, tmp_path, tree, monkeypatch):
    if memory == 2**20:
        monkeypatch.setattr("dqrm.data.vocabulary._ENTRY_BYTES", 2**14)
    report = following(first, raw, tmp_path / "next", min_frequency=3, merge_bytes=memory)
    seen = Counter(day(1)["user"])
    encoder = RowEncoder.from_dataset(tmp_path / "next")
    before, after = keys_of(first, "user"), keys_of(tmp_path / "next", "user")
    assert after[: len(before)] == before, "no id is renumbered"
    assert report.new_ids["user"] == len(after) - len(before) > 5
    assert report.new_ids.keys() == {"user", "tags"}
    known = set(day(0)["user"])
    wanted = {user for user, count in seen.items() if count >= 3 and user not in known}
    assert len(wanted) == report.new_ids["user"]
    # Rows of both days carry the ids that both encoders give.
    frame = day(2)
    ids = encoder.encode(frame).indices.numpy()[: len(frame)]
    old_ids = RowEncoder.from_dataset(first).encode(frame).indices.numpy()[: len(frame)]
    assert (ids[old_ids > 0] == old_ids[old_ids > 0]).all()
    assert {frame["user"][i] for i in np.flatnonzero(ids > len(before))} <= wanted
    assert (ids[~frame["user"].isin(known | wanted)] == 0).all()
    rows = PreparedDataset.open(tmp_path / "next").split("test").rows()
    assert (rows.one_hot[0] == ids).all()

    manifest = read_manifest(tmp_path / "next")
    base = read_manifest(first).features_digest
    assert manifest.settings["base"] == {"features_digest": base, "grows": True}
    following(first, raw, tmp_path / "again", min_frequency=3)
    assert tree(tmp_path / "again") == tree(tmp_path / "next")
    # The next day takes up what this one added.
    third, _ = base_of(tmp_path / "next")
    prepare(raw[2:], tmp_path / "third", settings(), base=third)
    assert keys_of(tmp_path / "third", "user")[: len(after)] == after


def test_without_growth_a_model_of_the_base_reads_the_rows(first, raw, tmp_path):
    report = following(first, raw, tmp_path / "fixed", grows=False)
    assert set(report.new_ids.values()) == {0}
    assert report.unknown_rates["user"] > 0.3
    fixed, base = read_manifest(tmp_path / "fixed"), read_manifest(first)
    assert fixed.features_digest == base.features_digest
    assert fixed.digest != base.digest


def test_no_more_than_max_size(first, raw, tmp_path):
    known = len(keys_of(first, "user"))
    report = following(first, raw, tmp_path / "some", max_size=known + 4)
    counts = Counter(day(1)["user"])
    for user in set(day(0)["user"]):
        del counts[user]
    assert report.new_ids["user"] == 4
    encoder = RowEncoder.from_dataset(tmp_path / "some")
    ids = encoder.encode(day(1)).indices.numpy()[:300]
    got = {user for user, value in zip(day(1)["user"], ids, strict=True) if value > known}
    assert sorted(counts[user] for user in got) == sorted(c for _, c in counts.most_common(4))
    report = following(first, raw, tmp_path / "none", max_size=3)
    assert report.new_ids["user"] == 0


def test_the_command_takes_columns_from_the_base(first, raw, tmp_path, monkeypatch):
    from click.testing import CliRunner

    from dqrm.cli import cli

    monkeypatch.chdir(tmp_path)
    call = ["data", "prepare", str(raw[1]), "--base", str(first), "workers=1"]
    done = CliRunner().invoke(cli, [*call, "-o", "next", "min_frequency=2"])
    assert done.exit_code == 0, done.stderr
    assert "values not in the base" in done.stdout
    manifest = read_manifest(tmp_path / "next")
    assert manifest.schema_.categorical[0].min_frequency == 2
    assert inherited(manifest)["min_frequency"] == 2
    assert inherited(manifest)["format"] == "parquet"
    for changed, message in [
        ([{**SCHEMA, "dense": []}], "schema: 0 dense columns, but 1 in"),
        ([{**SCHEMA, "categorical": CATEGORICAL[::-1]}], "column 1 is 'page', but 'user' in"),
        (
            [{**SCHEMA, "categorical": [*CATEGORICAL[:2], {"name": "page", "hash_buckets": 9}]}],
            "column 'page' has multi_hot=False and hash_buckets=9",
        ),
    ]:
        refused = CliRunner().invoke(cli, [*call, "-o", "other", f"schema={changed[0]}"])
        assert refused.exit_code == 2
        assert message in refused.stderr
    refused = CliRunner().invoke(cli, [*call[:3], "--base", "absent", "-o", "other"])
    assert refused.exit_code == 2
    assert "absent: no such folder" in refused.stderr
