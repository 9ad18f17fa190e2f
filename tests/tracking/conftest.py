"""Real stores for the tests of tracking: SQLite files and one tracking server."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command_line import clean_environment

from dqrm.tracking.config import TrackingConfig
from dqrm.tracking.quiet import import_mlflow
from dqrm.tracking.spool import RunHeader, Spool, now_ms
from dqrm.tracking.tracker import Tracker, start_tracker

START_SECONDS = 120


@pytest.fixture(autouse=True)
def a_clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty current folder and none of the variables that steer MLflow or torchrun."""
    clean_environment(monkeypatch, tmp_path)


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with its tables made, which takes MLflow some seconds, for tests to copy."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    client = import_mlflow().MlflowClient(f"sqlite:///{path}")
    client.search_experiments()
    return path


@pytest.fixture
def store(empty_database: Path, tmp_path: Path) -> str:
    """The default store of the current folder: an SQLite database."""
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


Start = Callable[..., Tracker]


@pytest.fixture
def start() -> Start:
    """Start a tracker that uploads often and gives up soon, without system metrics."""

    def start(name: str = "run", *, run_id: str | None = None, **settings: object) -> Tracker:
        values = {"system_metrics": False, "flush_seconds": 0.1, "finish_seconds": 20.0} | settings
        config = TrackingConfig.model_validate(values)
        return start_tracker(config, run_name=name, run_dir=Path("runs") / name, run_id=run_id)

    return start


@pytest.fixture
def left_behind() -> Callable[[str, int], Path]:
    """Make the folder of a run whose store was away from the start and whose process is gone."""

    def left_behind(uri: str, steps: int) -> Path:
        run_dir = Path("runs/run")
        spool = Spool.open(run_dir, RunHeader(uri, "dqrm", "run", None))
        spool.append("open", time=now_ms(), resumed=False, tags={})
        for step in range(steps):
            spool.append("metrics", time=now_ms(), step=step, values={"train/loss": float(step)})
        spool.close()
        return run_dir

    return left_behind


class Server:
    """``mlflow server`` on a loopback port, to be killed and started again."""

    def __init__(self, folder: Path, database: Path) -> None:
        self._folder = folder
        shutil.copy(database, folder / "server.db")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it unless it runs; return when it answers."""
        if self._process is not None:
            return
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", "sqlite:///server.db"]
        command += ["--artifacts-destination", str(self._folder / "artifacts")]
        # Its job runner is four more processes that nothing here needs.
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self._folder,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                if self._process.poll() is not None:
                    break
                time.sleep(0.2)
        raise RuntimeError((self._folder / "server.log").read_text()[-2000:])

    def kill(self) -> None:
        """End it and its workers at once, in the middle of whatever they do."""
        if self._process is not None:
            os.killpg(self._process.pid, 9)
            self._process.wait()
            self._process = None


@pytest.fixture(scope="session")
def session_server(
    tmp_path_factory: pytest.TempPathFactory, empty_database: Path
) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"), empty_database)
    yield server
    server.kill()


@pytest.fixture
def server(session_server: Server) -> Server:
    """The tracking server, running."""
    session_server.start()
    return session_server


@pytest.fixture
def black_hole() -> Iterator[str]:
    """The address of a server that accepts connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
