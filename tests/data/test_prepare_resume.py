"""A killed preparation continues; the result does not depend on how it came about."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from dqrm.data.config import PrepareConfig
from dqrm.data.manifest import read_manifest
from dqrm.data.prepare import prepare

SETTINGS = {
    "shard_bytes": 65536,
    "min_frequency": 2,
    "max_malformed": 5,
    "split": {"by": "rows", "test": 400, "validation_fraction": 0.1},
}

KILLED = textwrap.dedent(
    """
    import os, signal, sys
    from dqrm.data.config import PrepareConfig
    from dqrm.data.prepare import prepare

    source, output, config, phase, count = sys.argv[1:]
    seen = 0

    def die(progress):
        global seen
        seen += progress.phase == phase
        if seen == int(count):
            os.kill(os.getpid(), signal.SIGKILL)

    # Not under `if __name__ == "__main__"`: workers must not run this script again.
    prepare([source], output, PrepareConfig.model_validate_json(config), progress=die)
    """
)


def kill_in(phase: str, count: int, source: Path, output: Path, workers: int, **settings) -> None:
    config = PrepareConfig(**{**SETTINGS, "workers": workers, **settings})
    script = output.parent / "prepare_and_die.py"
    script.write_text(KILLED)
    text = config.model_dump_json(by_alias=True)
    done = subprocess.run(
        [sys.executable, script, source, output, text, phase, str(count)],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.fixture(scope="module")
def source(criteo_text, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("raw") / "rows.tsv"
    lines = criteo_text(2000, 5).splitlines(keepends=True)
    lines[700:700] = [b"bad\n"]
    path.write_bytes(b"".join(lines))
    return path


@pytest.fixture(scope="module")
def unbroken(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "out"
    prepare([source], folder, PrepareConfig(**SETTINGS, workers=1))
    return folder


@pytest.mark.parametrize(
    ("phase", "count", "workers"),
    [("parse", 3, 2), ("parse", 1, 1), ("vocabularies", 5, 1), ("encode", 2, 2), ("encode", 4, 1)],
)
def test_killed_run_continues(phase, count, workers, source, unbroken, tmp_path, tree):
    output = tmp_path / "out"
    kill_in(phase, count, source, output, workers)
    assert not (output / "dataset.json").exists()
    with pytest.raises(ValueError, match="has not finished"):
        read_manifest(output)
    done = list((output / ".work" / "parsed").glob("*.rec"))
    assert len(done) >= count if phase == "parse" else len(done) > 5
    times = {path.name: path.stat().st_mtime_ns for path in done}

    again: dict[str, int] = {}

    def look(progress):
        for path in (output / ".work" / "parsed").glob("*.rec"):
            again[path.name] = path.stat().st_mtime_ns

    prepare([source], output, PrepareConfig(**SETTINGS, workers=1), progress=look)
    assert tree(output) == tree(unbroken)
    assert {name: again[name] for name in times} == times  # Nothing was parsed twice.


def test_machine_restarted_since(source, unbroken, tmp_path, tree):
    """Files that were not forced to the disk may be damaged then, and are not used."""
    output = tmp_path / "out"
    kill_in("encode", 2, source, output, 1)
    work = output / ".work"
    for path in (work / "parsed").glob("*.rec"):
        path.write_bytes(bytes(path.stat().st_size))
    (work / "boot.json").write_text('{"boot": "another"}')
    prepare([source], output, PrepareConfig(**SETTINGS, workers=1))
    assert tree(output) == tree(unbroken)


def test_killed_stream_continues(source, tmp_path, tree):
    """A compressed file is one task; its finished shards are not parsed again."""
    import gzip

    packed = tmp_path / "rows.gz"
    packed.write_bytes(gzip.compress(source.read_bytes(), mtime=0))
    prepare([packed], tmp_path / "whole", PrepareConfig(**SETTINGS, workers=1))
    kill_in("vocabularies", 1, packed, tmp_path / "out", 1)
    for record in sorted((tmp_path / "out" / ".work" / "parsed").glob("*.rec"))[3:]:
        record.unlink()
    prepare([packed], tmp_path / "out", PrepareConfig(**SETTINGS, workers=1))
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_killed_one_pass_continues(source, tmp_path, tree):
    settings = {**SETTINGS, "split": {"by": "fraction"}, "min_frequency": None}
    settings["hash_buckets"] = 99
    prepare([source], tmp_path / "whole", PrepareConfig(**settings, workers=1))
    kill_in("parse", 4, source, tmp_path / "out", 2, **settings)
    prepare([source], tmp_path / "out", PrepareConfig(**settings, workers=2))
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert not (tmp_path / "out" / "vocabulary").exists()


@pytest.mark.parametrize("start", ["fork", "forkserver"])
def test_workers_end_with_their_parent(start, source, tmp_path, monkeypatch):
    if start == "fork":
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    else:
        # A second thread, so that the process is not forked.
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", "2")
    before = {p.pid for p in psutil.process_iter()}
    kill_in("parse", 2, source, tmp_path / "out", 2)
    # A forked worker has the command line of its parent, the fork server says what it is.
    mark = str(tmp_path) if start == "fork" else "forkserver"
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        left = [p for p in psutil.process_iter(["cmdline"]) if p.pid not in before]
        ours = [p for p in left if mark in " ".join(p.info["cmdline"] or [])]
        if not ours:
            return
        time.sleep(0.1)
    pytest.fail(f"still running: {ours}")


@pytest.mark.parametrize("workers", [2, 3])
def test_number_of_workers_changes_nothing(workers, source, unbroken, tmp_path, tree):
    # Small enough a budget that vocabularies are merged in several parts.
    config = PrepareConfig(**SETTINGS, workers=workers, merge_bytes=2**20)
    prepare([source], tmp_path / "out", config)
    assert tree(tmp_path / "out") == tree(unbroken)


def test_layout(unbroken):
    names = {path.name for path in unbroken.iterdir()}
    assert names == {"dataset.json", "vocabulary", "train", "validation", "test", "malformed.tsv"}
    manifest = read_manifest(unbroken)
    for name, split in manifest.splits.items():
        files = [f"{name}/{number:05d}.arrow" for number in range(len(split.shards))]
        assert [shard.file for shard in split.shards] == files
        assert sorted(p.name for p in (unbroken / name).iterdir()) == [f[-11:] for f in files]
    assert {f.name for f in (unbroken / "vocabulary").iterdir()} == {
        f"C{i}.npy" for i in range(1, 27)
    }


def test_other_settings_do_not_continue(source, unbroken, tmp_path, tree):
    output = tmp_path / "out"
    kill_in("parse", 2, source, output, 1)
    other = PrepareConfig(**{**SETTINGS, "min_frequency": 3}, workers=1)
    with pytest.raises(ValueError, match=r"other sources or settings.*--overwrite"):
        prepare([source], output, other)
    # The refusal broke nothing, and workers and limits are not settings of the content.
    prepare([source], output, PrepareConfig(**{**SETTINGS, "max_malformed": 0.5}, workers=2))
    assert tree(output) == tree(unbroken)


def test_changed_source_does_not_continue(source, tmp_path):
    copy = tmp_path / "rows"
    copy.write_bytes(source.read_bytes())
    kill_in("parse", 2, copy, tmp_path / "out", 1)
    os.utime(copy, ns=(1, 1))
    with pytest.raises(ValueError, match="--overwrite"):
        prepare([copy], tmp_path / "out", PrepareConfig(**SETTINGS, workers=1))


def test_finished_data_set_is_replaced_only_when_told(source, unbroken, tmp_path, tree):
    output = tmp_path / "out"
    config = PrepareConfig(hash_buckets=10, max_malformed=5, workers=1)
    prepare([source], output, config)
    before = tree(output)
    with pytest.raises(ValueError, match="holds a data set already; --overwrite replaces it"):
        prepare([source], output, PrepareConfig(**SETTINGS, workers=1))
    assert tree(output) == before
    prepare([source], output, PrepareConfig(**SETTINGS, workers=1), overwrite=True)
    assert tree(output) == tree(unbroken)


def test_one_process_at_a_time(source, tmp_path):
    def meanwhile(_):
        with pytest.raises(ValueError, match="another process is preparing"):
            prepare([source], tmp_path / "out", PrepareConfig(**SETTINGS, workers=1))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(
            [source], tmp_path / "out", PrepareConfig(**SETTINGS, workers=1), progress=meanwhile
        )


def test_checksums_know_a_changed_byte(source, unbroken, tmp_path):
    text = bytearray(source.read_bytes())
    text[-3] ^= 1
    copy = tmp_path / "rows.tsv"
    copy.write_bytes(text)
    prepare([copy], tmp_path / "out", PrepareConfig(**SETTINGS, workers=1))
    ours, theirs = read_manifest(tmp_path / "out"), read_manifest(unbroken)
    assert ours.sources[0].checksum != theirs.sources[0].checksum
    assert ours.digest != theirs.digest
