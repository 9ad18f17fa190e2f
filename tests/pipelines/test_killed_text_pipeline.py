"""A pipeline of every kind of text stage, killed in each of them once."""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

KILLED = Path(__file__).with_name("killed_stages.py")
SECONDS = 240
STAGES = ("finetune", "prune", "allocate", "reconstruct", "compress", "lower", "report")

PIPELINE = """\
name: {name}
threads: 1
tracking: {{enabled: false}}
data: {{train: {text}/train.tsv, dev: {text}/dev.tsv.gz}}
stages:
  - {{stage: finetune, model: {model}, lr: 3e-3, max_steps: 8, batch_size: 16, precision: fp32,
     save_minutes: 1e-6}}
  - {{stage: prune, model: 'stage:finetune', budget: {{macs: 0.6}}, samples: 64, held_out: 32}}
  - stage: allocate
    model: stage:prune
    match: 'bert\\.encoder\\..*dense'
    samples: 64
    ratio: 5
    options:
      - [{{kind: quant, weight: {{bits: 8}}}}]
      - [{{kind: quant, weight: {{bits: 4}}}}]
  - {{stage: reconstruct, model: 'stage:prune', allocation: 'stage:allocate', samples: 64,
     solver: lkd, steps: 4}}
  - stage: compress
    model: stage:prune
    max_steps: 6
    batch_size: 16
    precision: fp32
    save_minutes: 1e-6
    distill: {{teacher: 'stage:finetune', hidden: 0, attention: 0}}
    transforms:
      - {{kind: quant, match: 'bert\\.encoder\\..*dense', weight: {{bits: 4}}, act: {{bits: 8}}}}
  - {{stage: lower, model: 'stage:compress', buckets: [[1, 8]], seconds: 0.05}}
  - {{stage: report}}
"""


def run_both(model, text):
    """What each of the killed processes left behind, and what all of them logged."""
    for name in ("killed", "whole"):
        Path(f"{name}.yaml").write_text(PIPELINE.format(name=name, model=model, text=text))
    process = subprocess.Popen(
        [sys.executable, str(KILLED), "killed.yaml", "whole.yaml", *STAGES],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        printed, log = process.communicate(timeout=SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, log
    return [json.loads(line) for line in printed.splitlines()], log


def test_killed_in_each_stage_it_repeats_none_that_was_finished(tiny_bert, sentence_files):
    processes, log = run_both(tiny_bert, sentence_files)
    for position, process in enumerate(processes[:-1]):
        assert process["code"] == -signal.SIGKILL, STAGES[position]
        assert process["complete"].keys() == set(STAGES[:position]), "the killed one is not there"
    assert processes[-1]["code"] == 0, log
    assert processes[-1]["complete"].keys() == set(STAGES)
    for before, after in itertools.pairwise(processes):
        for stage, written in before["complete"].items():
            assert after["complete"][stage] == written, f"{stage} ran again"
    assert log.count("going on at step") == 2, "what was trained is not trained again"

    for stage in ("finetune", "prune", "reconstruct", "compress", "lower"):
        file = Path("runs/killed/stages", stage, "model", "model.safetensors")
        ours = load_file(file)
        theirs = load_file(Path("runs/whole", *file.parts[2:]))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), stage
