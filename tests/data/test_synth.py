"""Generated data: what is asked for, what is known about it, and that it repeats."""

from pathlib import Path

import numpy as np
import pytest

from dqrm.data import synth as synth_module
from dqrm.data.dataset import PreparedDataset
from dqrm.data.rows import Rows
from dqrm.data.synth import CRITEO_KAGGLE_CARDINALITIES, SynthConfig, synthesize
from dqrm.data.teacher import CHUNK_ROWS, Teacher, bayes_metrics, zipf_ids

SMALL = SynthConfig(scale=0.001, rows=80_000, workers=1)
"""Two chunks; the border of train and validation falls inside the second."""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    folder = tmp_path_factory.mktemp("synth") / "small"
    synthesize(folder, SMALL)
    return PreparedDataset.open(folder)


def all_rows(data: PreparedDataset) -> Rows:
    return Rows.concat([data.split(name).rows() for name in ("train", "validation", "test")])


def teacher(**changes: object) -> Teacher:
    settings: dict[str, object] = {
        "seed": 3,
        "zipf": 1.05,
        "bayes_auc": 0.8,
        "positive_rate": 0.25,
        "multi_hot": [False, True, False],
        "max_bag": 4,
    }
    return Teacher([50, 40, 2000], **(settings | changes))  # type: ignore[arg-type]


def test_shape_is_criteos(small: PreparedDataset) -> None:
    assert small.num_dense == 13
    assert len(small.tables) == 26
    assert CRITEO_KAGGLE_CARDINALITIES[2] == 10_131_227
    assert small.tables[2].num_rows == 10_131
    assert min(table.num_rows for table in small.tables) == 3
    splits = {name: info.num_rows for name, info in small.manifest.splits.items()}
    assert splits == {"train": 68_571, "validation": 5_715, "test": 5_714}
    rows = all_rows(small)
    for ids, table in zip(rows.one_hot, small.tables, strict=True):
        assert ids.min() >= 0
        assert ids.max() < table.num_rows
    assert rows.dense.min() == 0.0
    assert 2.0 < rows.dense.max() < 20.0


def test_scale_sets_the_number_of_rows() -> None:
    assert SynthConfig(scale=0.02).num_rows == 916_812
    assert sum(SynthConfig(scale=0.02).table_rows) == pytest.approx(0.02 * 33_762_577, rel=1e-4)


def test_same_rows_for_any_number_of_workers(small: PreparedDataset, tmp_path: Path) -> None:
    config = SMALL.model_copy(update={"workers": 3})
    assert synthesize(tmp_path / "again", config).digest == small.digest
    again = all_rows(PreparedDataset.open(tmp_path / "again"))
    for name in ("label", "dense", "one_hot"):
        np.testing.assert_array_equal(getattr(again, name), getattr(all_rows(small), name))
    assert (tmp_path / "again/train/00000.arrow").read_bytes() == (
        small.path / "train/00000.arrow"
    ).read_bytes()


def test_rows_do_not_change_between_versions(small: PreparedDataset) -> None:
    # Published figures rest on these rows; a change needs another GENERATOR_VERSION.
    rows = small.split("train").rows(0, 3)
    assert rows.one_hot[:4].tolist() == [[0, 1, 0], [2, 1, 0], [45, 26, 9328], [131, 44, 3]]
    assert rows.label.tolist() == [1.0, 0.0, 0.0]
    np.testing.assert_allclose(rows.dense[:2], [[0, 0, 0], [np.log(2), 0, 0]], rtol=1e-6)


def test_seed_changes_rows_and_teacher() -> None:
    first, second = teacher(seed=1).chunk(0), teacher(seed=2).chunk(0)
    assert np.mean(first[0].one_hot == second[0].one_hot) < 0.5
    assert abs(np.corrcoef(first[1], second[1])[0, 1]) < 0.05


def test_positive_rate_and_bayes_auc_are_those_asked_for(small: PreparedDataset) -> None:
    label = all_rows(small).label
    # Sampling error: sqrt(0.25 * 0.75 / 80,000) = 0.0015; the pilot's own is 0.0017.
    assert label.mean() == pytest.approx(0.256, abs=0.008)
    # Standard error of an AUC on 5,714 rows: about 0.007.
    assert small.manifest.report["bayes_test"]["auc"] == pytest.approx(0.80, abs=0.03)


@pytest.mark.parametrize(("auc", "rate"), [(0.6, 0.02), (0.95, 0.5), (0.8, 0.9)])
def test_logit_is_calibrated(auc: float, rate: float) -> None:
    rows, probability = teacher(bayes_auc=auc, positive_rate=rate).chunk(1)
    assert probability.mean() == pytest.approx(rate, rel=0.05)
    # Standard error with 1,300 positives: 0.008.
    assert bayes_metrics(rows.label, probability)["auc"] == pytest.approx(auc, abs=0.035)


def test_labels_follow_the_probabilities() -> None:
    rows, probability = teacher().chunk(5)
    bins = np.digitize(probability, np.linspace(0.05, 0.95, 19))
    for bin_number in np.unique(bins):
        chosen = bins == bin_number
        expected = probability[chosen].mean()
        error = np.sqrt(expected * (1 - expected) / chosen.sum())
        assert abs(rows.label[chosen].mean() - expected) < 4.5 * error


def test_bayes_metrics_equal_scikit_learns() -> None:
    from sklearn import metrics

    rows, probability = teacher().chunk(0)
    probability = np.round(probability, 2).clip(0.01, 0.99)  # ties
    got = bayes_metrics(rows.label, probability)
    assert got["auc"] == pytest.approx(metrics.roc_auc_score(rows.label, probability))
    log_loss = metrics.log_loss(rows.label, probability.astype(np.float64))
    assert got["log_loss"] == pytest.approx(log_loss)
    rate = rows.label.mean()
    entropy = -rate * np.log(rate) - (1 - rate) * np.log(1 - rate)
    assert got["normalized_entropy"] == pytest.approx(log_loss / entropy, rel=1e-5)


def test_one_class_has_no_auc() -> None:
    scores = bayes_metrics(np.zeros(2, np.float32), np.array([0.5, 0.25]))
    assert scores == {"log_loss": pytest.approx(-(np.log(0.5) + np.log(0.75)) / 2)}


def test_an_id_means_the_same_in_every_row() -> None:
    one = teacher()
    ids = np.array([0, 7, 1999, 7], np.int32)
    effects = one._effects(2, ids)
    np.testing.assert_array_equal(effects[:, 1], effects[:, 3])
    np.testing.assert_array_equal(effects[:, ::-1], one._effects(2, ids[::-1]))
    assert not np.array_equal(one._effects(1, ids[:1]), effects[:, :1])
    many = one._effects(2, np.arange(100_000, dtype=np.int32))
    # Standard errors: 1 / sqrt(100,000) = 0.003 for means, 0.0022 for deviations.
    np.testing.assert_allclose(many.mean(axis=1), 0.0, atol=0.016)
    np.testing.assert_allclose(many.std(axis=1), 1.0, atol=0.012)
    np.testing.assert_allclose(np.corrcoef(many), np.eye(4), atol=0.016)


@pytest.mark.parametrize("exponent", [0.0, 0.8, 1.0, 1.05, 2.0])
def test_ids_follow_the_power_law(exponent: float) -> None:
    size = 50
    ids = zipf_ids((np.arange(1_000_000) + 0.5) / 1_000_000, size, exponent)
    share = np.bincount(ids, minlength=size) / len(ids)
    edges = np.arange(1.0, size + 2.0)
    area = np.log(edges) if exponent == 1.0 else edges ** (1 - exponent) / (1 - exponent)
    np.testing.assert_allclose(share, np.diff(area) / (area[-1] - area[0]), atol=3e-6)
    assert zipf_ids(np.array([1.0 - 2**-33]), 10_131_227, exponent).max() < 10_131_227


def test_lists_of_ids(tmp_path: Path) -> None:
    config = SynthConfig(scale=0.001, rows=5000, multi_hot=("C1", "C3"), max_bag=4, workers=1)
    manifest = synthesize(tmp_path / "lists", config)
    data = PreparedDataset.open(tmp_path / "lists")
    assert [table.name for table in data.tables if table.multi_hot] == ["C1", "C3"]
    rows = data.split("train").rows()
    assert (len(rows.one_hot), len(rows.lists)) == (24, 2)
    lengths = np.diff(rows.lists[1].offsets)
    # Uniform on 0..4: mean 2, standard error 0.022.
    assert set(lengths) == {0, 1, 2, 3, 4}
    assert lengths.mean() == pytest.approx(2.0, abs=0.11)
    assert manifest.tables[2].lookups == len(rows.lists[1].ids)
    assert rows.lists[1].ids.max() < data.tables[2].num_rows
    batch = next(data.split("train").batches(64))
    assert batch.offsets is not None
    assert len(batch.offsets) == 26 * 64 + 1


def test_rarity_is_counted(small: PreparedDataset) -> None:
    train, test = small.split("train").rows(), small.split("test").rows()
    once = np.zeros(len(train), bool)
    unseen = np.zeros(len(test), bool)
    singles = 0
    for ids, later in zip(train.one_hot, test.one_hot, strict=True):
        values, counts = np.unique(ids, return_counts=True)
        once |= np.isin(ids, values[counts == 1])
        unseen |= ~np.isin(later, values)
        singles += int((counts == 1).sum())
    rarity = small.manifest.report["rarity"]
    assert rarity["train_rows_with_an_id_seen_once"] == once.mean()
    assert rarity["test_rows_with_an_id_never_trained"] == unseen.mean()
    assert rarity["train_lookups_of_ids_seen_once"] == singles / (26 * len(train))
    assert small.tables[0].lookups == len(train)


def test_many_rows_become_several_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: PreparedDataset
) -> None:
    monkeypatch.setattr(synth_module, "SHARD_CHUNKS", 1)
    synthesize(tmp_path / "cut", SMALL)
    cut = PreparedDataset.open(tmp_path / "cut")
    assert len(cut.manifest.splits["train"].shards) == 2
    assert cut.digest == small.digest
    np.testing.assert_array_equal(all_rows(cut).one_hot, all_rows(small).one_hot)


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(done: int, total: int) -> None:
        if done > CHUNK_ROWS:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        synthesize(tmp_path / "data", SMALL, progress=fail)
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_rows(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    config = SMALL.model_copy(update={"rows": 1000})
    synthesize(tmp_path / "data", config, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(857, 1000), (929, 1000), (1000, 1000)]


def test_what_exists_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path, tmp_path / "file"):
        with pytest.raises(ValueError, match="exists already; give a new folder"):
            synthesize(output, SMALL)
    assert (tmp_path / "file").read_text() == "mine"


def test_settings_that_cannot_be_are_refused() -> None:
    for settings, message in [
        ({"scale": 0.0}, "scale"),
        ({"rows": 50}, "generate 100 rows or more"),
        ({"multi_hot": ["C27"]}, "no column 'C27'"),
        ({"seed": 2**64}, "below 2\\^64"),
        ({"zpif": 1.0}, "zpif"),
    ]:
        with pytest.raises(ValueError, match=message):
            SynthConfig.model_validate(settings)
