"""What a user is told before training starts, instead of a run that cannot be recorded."""

from pathlib import Path
from typing import Any

import pytest

from dqrm.tracking.quiet import import_mlflow
from dqrm.tracking.spool import Spool
from dqrm.tracking.store import Store


class TestRefusedAtTheStart:
    def test_unknown_run(self, store: str, start: Any) -> None:
        with pytest.raises(ValueError, match=r"abc.*name the store the run was recorded in"):
            start(run_id="abc")
        assert not Path("runs/run/spool").exists()

    def test_deleted_experiment(self, store: str, start: Any) -> None:
        client = import_mlflow().MlflowClient(store)
        client.delete_experiment(Store(store).experiment_id("old"))
        with pytest.raises(ValueError, match=r"experiment old was deleted.*experiments restore"):
            start(experiment="old")

    def test_folder_store(self, start: Any) -> None:
        with pytest.raises(ValueError, match="MLflow no longer writes to folders"):
            start(uri="file:./mlruns")

    def test_folder_in_use(self, store: str, start: Any) -> None:
        tracker = start()
        with pytest.raises(ValueError, match="in use by process"):
            start()
        assert tracker.finish("FINISHED")

    @pytest.mark.parametrize(
        "change", [{"uri": "sqlite:///other.db"}, {"run_id": "abc"}], ids=["store", "run-id"]
    )
    def test_folder_with_records_of_another_run(
        self, store: str, start: Any, change: dict[str, str], left_behind: Any
    ) -> None:
        run_dir = left_behind(store, 1)
        spool = Spool.open(run_dir)
        spool.state.run_id = "def"
        spool.save_state()
        spool.close()
        with pytest.raises(ValueError, match="dqrm tracking sync runs/run"):
            start(**change)

    def test_folder_with_records_of_another_name(
        self, store: str, start: Any, left_behind: Any
    ) -> None:
        left_behind(store, 1).rename("runs/new")
        with pytest.raises(ValueError, match="holds records of run run, not new"):
            start("new")
