"""`dqrm doctor`, `ui` and `configs`: what they say about this machine, and their error paths."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from dqrm.config import RunConfig
from dqrm.configuration import load, shipped_configs, shipped_text

Run = Callable[..., Result]


def by_name(result: Result) -> dict[str, dict[str, str]]:
    return {found["name"]: found for found in json.loads(result.stdout)}


def test_doctor_says_what_will_be_used_and_why(dqrm: Run) -> None:
    result = dqrm("doctor", "--json")
    assert result.exit_code == 0, result.stdout
    found = by_name(result)
    assert {"model", "features", "cores", "threads", "native", "version"} <= set(found)
    assert {"vector level", "oneDNN", "oneCCL", "Gloo", "IPEX", "mlflow", "store"} <= set(found)
    assert found["store"]["value"].endswith("will be made by the first run")
    assert all(finding["fix"] for finding in found.values() if finding["level"] != "ok")
    text = dqrm("doctor").stdout
    for name, finding in found.items():
        if name != "load":  # changes between two calls
            assert name in text
            assert finding["section"] in text


@pytest.mark.parametrize(
    ("variable", "value", "name", "message"),
    [
        ("MLFLOW_TRACKING_URI", "sqlite:////absent/folder/m.db", "store", "does not exist"),
        ("MLFLOW_TRACKING_URI", "file:./mlruns", "store", "no longer writes to folders"),
        ("MLFLOW_TRACKING_URI", "gopher://x", "store", "unknown kind of store"),
        ("DQRM_CPU_ISA", "mmx", "native", "DQRM_CPU_ISA=mmx"),
    ],
)
def test_doctor_fails_on_what_is_broken(
    dqrm: Run,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    value: str,
    name: str,
    message: str,
) -> None:
    from dqrm.kernels import cpu

    if name == "native" and not cpu.native_available():
        pytest.skip("the compiled kernels are not installed")
    monkeypatch.setenv(variable, value)
    result = dqrm("doctor", "--json")
    assert result.exit_code == 1
    finding = by_name(result)[name]
    assert finding["level"] == "problem"
    assert message in finding["value"]
    assert finding["fix"]
    assert "! " in dqrm("doctor").stdout


def test_doctor_on_a_server_that_is_away_is_only_a_note(dqrm: Run) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    result = dqrm("doctor", "--json", "--tracking-uri", f"http://127.0.0.1:{port}")
    assert result.exit_code == 0
    assert by_name(result)["store"]["level"] == "note"
    assert "does not answer" in by_name(result)["store"]["value"]


def test_doctor_notes_too_many_threads(dqrm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "999")
    result = dqrm("doctor", "--json")
    assert result.exit_code == 0
    (finding,) = (
        found
        for found in json.loads(result.stdout)
        if (found["section"], found["name"]) == ("processor", "threads")
    )
    assert finding["level"] == "note"
    assert "999 (from: OMP_NUM_THREADS)" in finding["value"]
    assert "train.threads=" in finding["fix"]


def test_configs_ls_and_cp(dqrm: Run, tmp_path: Path) -> None:
    names = shipped_configs()
    assert "census" in names
    listed = dqrm("configs", "ls")
    assert [line.split()[0] for line in listed.stdout.splitlines()] == list(names)
    for line in names.values():
        assert line in listed.stdout

    copied = dqrm("configs", "cp", "census")
    assert copied.stdout == "census.yaml\n"
    assert (tmp_path / "census.yaml").read_text() == shipped_text("census")
    assert load(RunConfig, tmp_path / "census.yaml") == load(RunConfig, "census")

    (tmp_path / "census.yaml").write_text("mine\n")
    refused = dqrm("configs", "cp", "census")
    assert refused.exit_code == 2
    assert "--force" in refused.stderr
    assert (tmp_path / "census.yaml").read_text() == "mine\n"
    assert dqrm("configs", "cp", "census", "--force").exit_code == 0
    assert (tmp_path / "census.yaml").read_text() == shipped_text("census")

    (tmp_path / "folder").mkdir()
    assert dqrm("configs", "cp", "census", "folder").stdout == "folder/census.yaml\n"
    assert dqrm("configs", "cp", "census", "folder/other.yaml").exit_code == 0
    for arguments, message in (
        (["census", "absent/x.yaml"], "absent: no such folder"),
        (["cencus"], "did you mean census?"),
    ):
        wrong = dqrm("configs", "cp", *arguments)
        assert wrong.exit_code == 2
        assert message in wrong.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "mlflow.db: no runs are recorded there"),
        (["--backend-store-uri", "sqlite:///other.db"], "other.db: no runs are recorded there"),
        (["--backend-store-uri", "gopher://x"], "unknown kind of store"),
        (["--port", "70000"], "70000 is not in the range"),
        (["--backend-store-uri", "postgresql://h/d", "--host", "192.0.2.1"], "listen"),
    ],
)
def test_ui_mistakes(dqrm: Run, options: list[str], message: str) -> None:
    result = dqrm("ui", *options)
    assert result.exit_code == 2
    assert message in result.stderr


def test_ui_of_a_server_is_the_server(dqrm: Run) -> None:
    result = dqrm("ui", "--backend-store-uri", "http://mlflow.example:8080")
    assert result.exit_code == 0
    assert result.stdout == "the store is a server; open http://mlflow.example:8080\n"


def test_ui_names_a_free_port_when_one_is_taken(dqrm: Run, tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = dqrm("ui", "--port", str(port))
    assert result.exit_code == 2
    assert f"cannot listen on 127.0.0.1:{port}" in result.stderr
    assert "try --port" in result.stderr


@pytest.mark.slow
def test_ui_serves_the_store_and_ends_cleanly(tmp_path: Path) -> None:
    import sqlite3

    sqlite3.connect(tmp_path / "mlflow.db").close()
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "dqrm", "ui", "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if f"open http://127.0.0.1:{port}" in line:
                break
        assert process.poll() is None, "".join(lines)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as page:
            assert b"mlflow" in page.read().lower()
        os.killpg(process.pid, signal.SIGINT)
        _, rest = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    assert "Traceback" not in rest
    deadline = time.monotonic() + 10
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                break
        assert time.monotonic() < deadline, "something still listens"
        time.sleep(0.1)
