"""Text models trained by several processes: the same weights as one, codecs, stops, kills."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from killing import SECONDS
from safetensors.torch import load_file
from worlds import run_world

FINETUNE = """\
threads: 1
output: {output}
tracking: {{enabled: false}}
exchange: {{backend: gloo, dense: {codec}, rows: {rows}}}
stages:
  - stage: finetune
    model: {model}
    data: {{train: {text}/train.tsv, dev: {text}/dev.tsv}}
    lr: 3e-3
    epochs: 2
    batch_size: 16
    precision: fp32
"""

COMPRESS = """\
  - stage: compress
    model: stage:finetune
    data: {{train: {text}/train.tsv, dev: {text}/dev.tsv}}
    epochs: 3
    batch_size: 16
    precision: fp32
    distill: {{teacher: 'stage:finetune', labels: 0.5}}
    transforms:
      - {{kind: nm, match: 'bert\\.encoder.*dense', rho: 100, updates: 4}}
      - kind: quant
        match: ['bert\\.encoder.*dense', '.*word_embeddings']
        weight: {{bits: 4}}
        schedule: {{start: 6, period: 3, sensitivity: eigenvalue}}
  - stage: report
"""


@pytest.fixture(scope="module")
def material(tmp_path_factory, tiny_bert, sentence_files):
    """A BERT that drops nothing, so that rows may be shared out, and rows for it.

    Of the last batch of an epoch, a single row, one process of two has none.
    """
    folder = tmp_path_factory.mktemp("shared")
    shutil.copytree(tiny_bert, folder / "model")
    config = json.loads((folder / "model" / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "model" / "config.json").write_text(json.dumps(config))
    for name, source, rows in (("train", "train.tsv", 161), ("dev", "dev.tsv.gz", 60)):
        table = pd.read_csv(sentence_files / source, sep="\t")
        table[:rows].to_csv(folder / f"{name}.tsv", sep="\t", index=False)
    return folder


def pipeline(folder, material, name, codec="fp32", rows="fp32", more=""):
    """A file, and its name."""
    text = (FINETUNE + more).format(
        output=folder, model=material / "model", text=material, codec=codec, rows=rows
    )
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return path


def run_all(rank, world_size, *, files, stopped):
    """Run the files one after the other; the last one is stopped by rank 1, and goes on."""
    import transformers

    from dqrm.pipelines import runner
    from dqrm.pipelines.config import load_pipeline
    from dqrm.pipelines.text import finetune
    from dqrm.tracking.base import NullTracker

    transformers.logging.set_verbosity_error()
    logged = {}

    class Recorder(NullTracker):
        def log_metrics(self, metrics, step):
            logged.update(metrics)

        def log_params(self, params):
            logged.update({k: v for k, v in params.items() if k == "world_size"})

    runner.start_tracker = lambda *arguments, **named: Recorder()
    metrics = {}
    for name, file in files.items():
        logged.clear()
        result = runner.run_pipeline(load_pipeline(file))
        assert result.interrupted is None
        metrics[name] = {k: v for k, v in logged.items() if k.startswith(("comm/", "world"))}
    take = finetune.train_step

    def signalled(model, optimizer, training, batch, step, *rest):
        if step == 7 and rank == 1:
            signal.raise_signal(signal.SIGINT)
        return take(model, optimizer, training, batch, step, *rest)

    finetune.train_step = signalled
    config = load_pipeline(stopped, ["stages.finetune.save_minutes=1e-6"])
    interrupted = runner.run_pipeline(config).interrupted
    finetune.train_step = take
    if rank == 0:
        shutil.copytree(config.folder, config.folder.with_name("alone"))
    assert runner.run_pipeline(load_pipeline(stopped)).interrupted is None
    return metrics, interrupted


def weights(folder, name, stage="finetune"):
    return load_file(folder / name / "stages" / stage / "model" / "model.safetensors")


def assert_near(left, right, share):
    """No weight differs by more than a share of the largest of its tensor.

    Biases of keys have no gradient but rounding errors.
    """
    assert left.keys() == right.keys()
    for name in left:
        off = (left[name] - right[name]).abs().max()
        assert off <= share * max(0.01, right[name].abs().max()), (name, float(off))


def test_two_processes_train_what_one_does(material, tmp_path, caplog):
    from dqrm.pipelines.config import load_pipeline
    from dqrm.pipelines.runner import run_pipeline

    files = {
        "exact": pipeline(tmp_path, material, "exact", more=COMPRESS),
        "int8": pipeline(tmp_path, material, "int8", "int8", "int8"),
        "sign": pipeline(tmp_path, material, "sign", "sign", "int8"),
    }
    stopped = pipeline(tmp_path, material, "stopped", "int8", "int8")
    (metrics, number), (others, their_number) = run_world(
        run_all, 2, backend=None, timeout=100, files=files, stopped=stopped
    )
    # Rank 1 heard the signal, and both stopped after the same step.
    assert (number, their_number) == (signal.SIGTERM, signal.SIGINT)
    assert not any(others.values()), "rank 0 alone records"
    assert metrics["exact"]["comm/ratio"] == pytest.approx(1.0, abs=0.1)
    assert metrics["int8"]["comm/ratio"] > 3
    assert metrics["sign"]["comm/ratio"] > 12
    assert 0 < metrics["sign"]["comm/sent_bytes_per_step"] < 8_000
    assert metrics["sign"]["world_size"] == 2

    single = run_pipeline(load_pipeline(files["exact"], ["name=single"]))
    ours, theirs = (
        json.loads((tmp_path / name / "stages" / "finetune" / "stage.json").read_text())
        for name in ("exact", "single")
    )
    assert ours["digest"] == theirs["digest"]
    assert_near(weights(tmp_path, "exact"), weights(tmp_path, "single"), 1e-3)
    # At a border a code may go the other way: one step of 4 bits. Of two weights of one size either
    # may be cut, and then differs by all of it: those are few.
    left, right = (weights(tmp_path, name, "compress") for name in ("exact", "single"))
    kept = {name: (left[name] != 0) & (right[name] != 0) for name in left}
    assert_near(
        {name: torch.where(kept[name], left[name], 0.0) for name in left},
        {name: torch.where(kept[name], right[name], 0.0) for name in right},
        0.15,
    )
    moved = sum(int((~torch.isclose(left[n], right[n], atol=2e-3)).sum()) for n in left)
    assert moved < 0.01 * sum(tensor.numel() for tensor in left.values())
    done = single.stages[1].record.metrics
    again = json.loads((tmp_path / "exact/stages/compress/stage.json").read_text())["metrics"]
    assert again["best/val_accuracy"] == pytest.approx(done["best/val_accuracy"], abs=0.05)

    exact = single.stages[0].record.metrics
    for name in ("int8", "sign"):
        record = json.loads((tmp_path / name / "stages/finetune/stage.json").read_text())
        assert record["metrics"]["best/val_accuracy"] > exact["best/val_accuracy"] - 0.1, name
        assert record["metrics"]["best/val_loss"] < exact["best/val_loss"] + 0.05, name
    resumed, unbroken = weights(tmp_path, "stopped"), weights(tmp_path, "int8")
    assert all(torch.equal(resumed[name], unbroken[name]) for name in unbroken)

    # What two processes left to do, one can do.
    with caplog.at_level("INFO", logger="dqrm"):
        run_pipeline(load_pipeline(stopped, ["name=alone"]))
    assert "was written by 2 processes; what they still owed each other" in caplog.text
    assert "going on at step 8" in caplog.text
    assert_near(weights(tmp_path, "alone"), unbroken, 0.5)


def worker_pids(launcher):
    """Ids of the workers that a launcher started, by rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/status"):
        try:
            parent = path.read_text().partition("PPid:\t")[2].split("\n")[0]
            environment = (path.parent / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if parent == str(launcher):
            for entry in environment:
                if entry.startswith(b"RANK="):
                    found[int(entry.partition(b"=")[2])] = int(path.parent.name)
    return found


def test_the_command_ends_all_when_one_is_killed_and_names_it(material, tmp_path):
    file = pipeline(tmp_path, material, "killed", "int8", "int8")
    command = [sys.executable, "-m", "dqrm", "pipeline", "run", str(file), "--nproc", "2"]
    command += ["stages.finetune.epochs=100000", "stages.finetune.save_minutes=1e-6"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + SECONDS
        while not list((tmp_path / "killed").glob("work/*/scratch/step-*")):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        pids = worker_pids(process.pid)
        assert sorted(pids) == [0, 1]
        os.kill(pids[1], signal.SIGKILL)
        output = process.communicate(timeout=60)[0]
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 128 + signal.SIGKILL, output
    assert "rank 1" in output or "local_rank: 1" in output, output
    assert not worker_pids(process.pid)
