from pathlib import Path

import pytest

from dqrm.tracking.uri import experiment_name, resolve_uri, run_url, sqlite_file


def test_default_store_is_sqlite_in_the_current_folder(tmp_path: Path) -> None:
    assert resolve_uri(None) == f"sqlite:///{tmp_path}/mlflow.db"


def test_configuration_wins_over_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000/")
    assert resolve_uri(None) == "http://127.0.0.1:5000"
    assert resolve_uri("postgresql://host/db") == "postgresql://host/db"


def test_sqlite_path_becomes_absolute(tmp_path: Path) -> None:
    assert resolve_uri("sqlite:///a/b.db?timeout=9") == f"sqlite:///{tmp_path}/a/b.db?timeout=9"
    assert sqlite_file(f"sqlite:///{tmp_path}/b.db?timeout=9") == tmp_path / "b.db"
    assert sqlite_file("http://host") is None


@pytest.mark.parametrize("uri", ["file:./mlruns", "mlruns", "/tmp/mlruns"])
def test_folder_store_is_refused_with_the_fix(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"use sqlite:///mlflow\.db.*mlflow migrate-filestore"
    ) as e:
        resolve_uri(uri)
    assert uri in str(e.value)
    assert "\n" not in str(e.value)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    assert resolve_uri(uri) == uri


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("ftp://host/x", "unknown kind of store 'ftp:'"),
        ("sqlite://", "name a file"),
        ("sqlite:///:memory:", "name a file"),
        ("sqlite:////tmp", "is a folder"),
    ],
    ids=["unknown-scheme", "no-file", "in-memory", "folder"],
)
def test_address_that_cannot_work(uri: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        resolve_uri(uri)


def test_variable_is_named_in_the_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "./mlruns")
    with pytest.raises(ValueError, match=r"MLFLOW_TRACKING_URI=\./mlruns"):
        resolve_uri(None)


def test_experiment_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert experiment_name(None) == "dqrm"
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "team")
    assert experiment_name(None) == "team"
    assert experiment_name("mine") == "mine"


def test_run_url() -> None:
    assert run_url("http://host:5", "3", "abc") == "http://host:5/#/experiments/3/runs/abc"
    assert run_url("sqlite:////a/mlflow.db", "3", "abc") is None
