"""The bundled example and its cache."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from dqrm.data.census import EXAMPLE_FILE, TEST_YEAR, cached_census, census_config
from dqrm.data.dataset import PreparedDataset

LEFT_OUT = {
    "sex",
    "race",
    "hisp_origin",
    "country_father",
    "country_mother",
    "country_self",
    "citizenship",
    "instance_weight",
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def census(cache: Path, monkeypatch: pytest.MonkeyPatch) -> PreparedDataset:
    monkeypatch.setenv("DQRM_CACHE", str(cache))
    return PreparedDataset.open("census")


def test_attribution_lies_beside_the_file() -> None:
    text = (EXAMPLE_FILE.parent / "README.md").read_text()
    for needed in ("UCI Machine Learning Repository", "CC BY 4.0", "Changes made", *LEFT_OUT):
        assert needed in text


def test_sex_race_and_origin_are_not_in_the_file() -> None:
    names = set(pq.read_schema(EXAMPLE_FILE).names)
    assert not names & LEFT_OUT
    assert set(census_config().schema_.names) == names


def test_every_feature_takes_several_values_in_both_years() -> None:
    table = pq.read_table(EXAMPLE_FILE).to_pandas()
    for year, rows in table.groupby("year"):
        constant = [name for name in rows if name != "year" and rows[name].nunique() < 2]
        assert constant == [], year


def test_year_94_trains_and_year_95_tests(census: PreparedDataset) -> None:
    table = pq.read_table(EXAMPLE_FILE, columns=["label", "year"]).to_pandas()
    later = table[table["year"] == TEST_YEAR]
    splits = census.manifest.splits
    assert splits["test"].num_rows == len(later)
    assert splits["test"].positives == later["label"].sum()
    assert splits["train"].num_rows + splits["validation"].num_rows == len(table) - len(later)
    # A tenth of 79,934 rows; five standard deviations are 424.
    assert abs(splits["validation"].num_rows - 7993) < 424


def test_opening_again_uses_the_cache(census: PreparedDataset, cache: Path) -> None:
    written = (census.path / "dataset.json").stat().st_mtime_ns
    assert cached_census() == census.path
    assert (census.path / "dataset.json").stat().st_mtime_ns == written
    assert [path.name for path in cache.iterdir()] == [census.path.name]


def test_two_processes_at_once_share_one_folder(tmp_path: Path) -> None:
    code = "from dqrm.data.census import cached_census; print(cached_census())"
    environment = os.environ | {"DQRM_CACHE": str(tmp_path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    folders = {out.strip() for out, _ in results}
    assert [str(path) for path in tmp_path.iterdir()] == list(folders)
    assert PreparedDataset.open(folders.pop()).manifest.splits["test"].num_rows == 79684


def test_cache_folder_follows_the_environment(
    census: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The prepared folder is linked in place, so that only the choice of folder is tested.
    monkeypatch.delenv("DQRM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "dqrm").symlink_to(census.path.parent)
    assert cached_census() == tmp_path / "dqrm" / census.path.name
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "dqrm").symlink_to(census.path.parent)
    assert cached_census() == tmp_path / ".cache" / "dqrm" / census.path.name


def test_a_cache_that_cannot_be_written_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("DQRM_CACHE", str(blocked / "cache"))
    with pytest.raises(ValueError, match="set DQRM_CACHE to a folder that can be written"):
        PreparedDataset.open("census")


def test_a_folder_named_census_is_opened_as_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("census").mkdir()
    with pytest.raises(ValueError, match=r"no dataset\.json in it"):
        PreparedDataset.open("census")


def test_a_damaged_cache_is_prepared_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DQRM_CACHE", str(tmp_path))
    folder = cached_census()
    digest = PreparedDataset.open(folder).digest
    (folder / "dataset.json").write_text('{"version": 1}')
    assert PreparedDataset.open("census").digest == digest
