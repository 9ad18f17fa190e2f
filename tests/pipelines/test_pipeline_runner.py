"""What runs, what does not run again, and what a kill at any point leaves behind."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dqrm.pipelines.folders import PipelineFolder
from dqrm.pipelines.record import read_record

TOY = Path(__file__).with_name("toy_stages.py")
SECONDS = 120


def stages(**changes):
    """Three stages: b takes a, c takes b; changes by stage name."""
    listed = [
        {"name": "a", "add": 3},
        {"name": "b", "add": 4, "takes": "a"},
        {"name": "c", "add": 5, "takes": "b"},
    ]
    return [{**s, "log": "log.txt", **changes.get(s["name"], {})} for s in listed]


def command(given):
    return [sys.executable, str(TOY), "runs", json.dumps(given)]


def toy(stages, code=0, **given):
    """Run the toy pipeline in a process of its own; return what it printed and its attempts."""
    Path("log.txt").unlink(missing_ok=True)
    done = subprocess.run(
        command({"stages": stages, **given}),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == code, done.stderr
    attempts = Path("log.txt").read_text().splitlines() if Path("log.txt").exists() else []
    return (json.loads(done.stdout) if code == 0 else None), attempts


def total(name="c"):
    return int(Path(f"runs/toy/stages/{name}/total").read_text())


def test_kills_within_a_stage_between_stages_and_before_publishing():
    killed = -signal.SIGKILL
    _, attempts = toy(stages(b={"die_at": 2}), code=killed)
    assert attempts == ["a from 0", "b from 0"]
    assert total("a") == 3
    assert not Path("runs/toy/stages/b").exists(), "nothing half-done is visible"

    _, attempts = toy(stages(), code=killed, unpublished="b")
    assert attempts == ["b from 2"], "what was saved is not done again"
    assert not Path("runs/toy/stages/b").exists()

    result, attempts = toy(stages())
    assert attempts == ["c from 0"], "b was finished: it is published, not run"
    assert result["ran"] == ["b", "c"]
    assert total() == 12
    assert list(Path("runs/toy/work").iterdir()) == []

    result, attempts = toy(stages())
    assert (result["ran"], attempts) == ([], [])


def test_what_changes_runs_again_and_what_it_does_not_reach_stays():
    Path("data.txt").write_text("one")
    given = {"b": {"file": "data.txt"}}
    toy(stages(**given))

    result, _ = toy(stages(b={"file": "data.txt", "add": 7}))
    assert result["ran"] == ["b", "c"]
    assert total() == 15

    Path("data.txt").write_text("two")
    result, _ = toy(stages(b={"file": "data.txt", "add": 7}))
    assert result["ran"] == ["b"], "other data with the same result ends there"

    result, attempts = toy(stages(b={"file": "data.txt", "add": 7}), start="b")
    assert result["ran"] == ["b", "c"]
    assert attempts == ["b from 0", "c from 0"]

    Path("runs/toy/stages/a/total").unlink()
    result, _ = toy(stages(b={"file": "data.txt", "add": 7}))
    assert result["ran"] == ["a"], "a file that is gone is made again"


def test_training_that_diverges_names_its_stage():
    given = {"stages": stages(b={"diverges": True})}
    done = subprocess.run(command(given), capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 1
    assert done.stderr.endswith("stage b: the loss is nan at step 2; lower the lr\n")


def test_the_runner_is_light():
    # Plans of data alone are at once there.
    light = "import sys, dqrm.pipelines.runner; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", light], check=True, timeout=SECONDS)


def test_a_stage_that_shows_times_runs_when_they_change():
    given = {"b": {"file": "data.txt"}, "c": {"tells_times": True}}
    Path("data.txt").write_text("one")
    toy(stages(**given))
    assert toy(stages(**given))[0]["ran"] == []
    Path("data.txt").write_text("two")
    assert toy(stages(**given))[0]["ran"] == ["b", "c"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_a_stage_where_it_can_go_on(number):
    slow = stages(a={"add": 2000, "slow": True})
    process = subprocess.Popen(command({"stages": slow}), stdout=subprocess.PIPE, text=True)
    seconds = 0.5
    try:
        deadline = time.monotonic() + SECONDS
        while not list(Path("runs").glob("toy/work/*/scratch/saved")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(seconds)
        process.send_signal(number)
        printed, _ = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
        process.wait()
    assert json.loads(printed) == {"ran": [], "interrupted": int(number)}
    Path("log.txt").unlink()
    _, attempts = toy(stages(a={"add": 2000, "die_at": 1999}), code=-signal.SIGKILL)
    assert attempts[0].startswith("a from ")
    assert attempts != ["a from 0"]
    toy(stages(a={"add": 2000}))
    assert read_record(Path("runs/toy/stages/a")).seconds > seconds, "the stopped attempt's, too"


def test_one_process_at_a_time_in_a_folder_of_its_own(tmp_path):
    (tmp_path / "runs" / "other").mkdir(parents=True)
    (tmp_path / "runs" / "other" / "summary.json").touch()
    with (
        pytest.raises(ValueError, match=r"holds summary\.json, which is of no pipeline"),
        PipelineFolder(tmp_path / "runs" / "other"),
    ):
        pass
    with (
        PipelineFolder(tmp_path / "runs" / "toy"),
        pytest.raises(ValueError, match="another process runs this pipeline"),
        PipelineFolder(tmp_path / "runs" / "toy"),
    ):
        pass
    with PipelineFolder(tmp_path / "runs" / "toy"):
        pass


def test_unfinished_work_stays_until_the_stage_is_complete(tmp_path):
    folder = PipelineFolder(tmp_path / "toy")
    meant, typed, other = (letter * 64 for letter in "abc")
    _, scratch = folder.prepare("train", meant)
    (scratch / "state").write_text("hours of work")
    neighbour, _ = folder.prepare("train-more", other)
    # One setting was mistyped; the command as it was meant finds what it left.
    folder.prepare("train", typed)
    _, again = folder.prepare("train", meant)
    assert (again / "state").read_text() == "hours of work"
    folder.publish("train", typed)
    assert folder.stage("train").is_dir()
    assert [path.name for path in (tmp_path / "toy" / "work").iterdir()] == [neighbour.parent.name]
