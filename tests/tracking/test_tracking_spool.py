import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dqrm.tracking import spool as spool_module
from dqrm.tracking.spool import RunHeader, Spool, SpoolBusy
from dqrm.tracking.sync import find_spools, sync_spool

HEADER = RunHeader("sqlite:////x.db", "dqrm", "run", None)


def kinds(spool: Spool, offset: int = 0) -> list[str]:
    return [record["t"] for record, _ in spool.records(offset)]


def test_records_come_back_in_order_from_any_offset(tmp_path: Path) -> None:
    spool = Spool.open(tmp_path, HEADER)
    for number in range(5):
        spool.append(f"r{number}", value=float("nan"), text="\u00e4\n")
    offsets = [offset for _, offset in spool.records(0)]
    assert offsets[-1] == spool.size
    assert kinds(spool, offsets[1]) == ["r2", "r3", "r4"]
    spool.close()
    again = Spool.open(tmp_path)
    assert again.header == HEADER
    assert not again.fresh
    assert len(kinds(again)) == 5
    again.close()


def test_line_cut_off_by_a_kill_costs_that_line_only(tmp_path: Path) -> None:
    spool = Spool.open(tmp_path, HEADER)
    spool.append("a")
    spool.close()
    with (tmp_path / "spool" / "journal.jsonl").open("ab") as file:
        file.write(b'{"t":"b","val')
    again = Spool.open(tmp_path)
    again.append("c")
    assert kinds(again) == ["a", "c"]
    again.close()


def test_full_disk_costs_one_record_and_leaves_the_rest_readable(tmp_path: Path) -> None:
    # A limit on the size of files ends a write as a full disk does: part of it is written.
    script = f"""
import resource, signal
from pathlib import Path
from dqrm.tracking.spool import RunHeader, Spool
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
spool = Spool.open(Path({str(tmp_path)!r}), RunHeader("sqlite:////x.db", "dqrm", "run", None))
spool.append("a")
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (spool.size + 20, hard))
try:
    spool.append("b", text="x" * 100)
except OSError as error:
    print("refused")
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
spool.append("c")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "refused\n", done.stderr
    spool = Spool.open(tmp_path)
    assert kinds(spool) == ["a", "c"]
    spool.close()


def test_second_holder_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    spool = Spool.open(tmp_path, HEADER)
    with pytest.raises(SpoolBusy, match=f"in use by process {os.getpid()}"):
        Spool.open(tmp_path, HEADER)
    with pytest.raises(SpoolBusy):
        sync_spool(tmp_path)
    spool.close()
    Spool.open(tmp_path).close()


def test_nothing_to_sync(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no records wait"):
        sync_spool(tmp_path)
    assert not (tmp_path / "spool").exists()


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("run.json", "{", "run.json: damaged"),
        ("run.json", '{"version": 1}', "run.json: damaged"),
        ("run.json", '{"version": 99}', "version 99 is not 1"),
        ("state.json", '{"offse": 1}', "state.json: damaged"),
    ],
    ids=["no-json", "missing-field", "newer-version", "unknown-field"],
)
def test_damaged_spool_is_refused_and_let_go(
    tmp_path: Path, file: str, text: str, words: str
) -> None:
    Spool.open(tmp_path, HEADER).close()
    (tmp_path / "spool" / file).write_text(text)
    for _ in range(2):
        with pytest.raises(ValueError, match=words):
            Spool.open(tmp_path)


def test_kept_files_are_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "_COPY_BYTES", 100)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    small, large = folder / "small.json", folder / "large.bin"
    small.write_text("before")
    large.write_bytes(bytes(200))
    spool = Spool.open(tmp_path, HEADER)
    name = spool.keep(folder)
    small.write_text("after")
    replacement = folder / "new"
    replacement.write_bytes(b"other")
    replacement.replace(large)
    assert (spool.kept(name) / "small.json").read_text() == "before"
    assert (spool.kept(name) / "large.bin").read_bytes() == bytes(200)
    spool.discard(name)
    assert not spool.kept(name).exists()
    spool.close()


def test_spools_are_found_at_any_depth(tmp_path: Path) -> None:
    for name in ("runs/a", "runs/sweep/b"):
        Spool.open(tmp_path / name, HEADER).close()
    (tmp_path / "runs" / "c").mkdir()
    found = [tmp_path / "runs/a", tmp_path / "runs/sweep/b"]
    assert find_spools([tmp_path / "runs"]) == found
    assert find_spools([tmp_path / "runs/a", tmp_path]) == found


def test_removed_spool_leaves_nothing(tmp_path: Path) -> None:
    spool = Spool.open(tmp_path, HEADER)
    spool.append("a")
    spool.save_state()
    assert json.loads((tmp_path / "spool" / "state.json").read_text())["offset"] == 0
    spool.remove()
    assert list(tmp_path.iterdir()) == []


def test_tracking_is_imported_without_heavy_packages() -> None:
    script = "import sys, dqrm.tracking.tracker, dqrm.tracking.sync as s; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    loaded = set(done.stdout.split())
    assert "dqrm.tracking.mlflow_tracker" in loaded
    assert not loaded & {"mlflow", "torch", "pandas", "pyarrow", "matplotlib", "sqlalchemy"}
