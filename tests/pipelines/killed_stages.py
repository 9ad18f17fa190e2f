"""Runs a pipeline of text stages in processes that are killed, one in each stage.

Run as a program: ``killed_stages.py FILE WHOLE KEY...``. Each process is killed in the stage of its
key; another one ends what they left. Prints, for each, its exit status and the stages that were
complete behind it, with the time their record was written. Then runs the file WHOLE in one go.
"""

import json
import logging
import os
import signal
import sys
from pathlib import Path

# What stages import is here before the first fork: each process saves seconds.
import pyarrow  # noqa: F401
import torch
import transformers.models.bert.modeling_bert
import transformers.models.bert.tokenization_bert  # noqa: F401

from dqrm.pipelines import runner
from dqrm.pipelines.config import load_pipeline
from dqrm.pipelines.runner import run_pipeline
from dqrm.pipelines.text import classifier, finetune, pruning, reconstruction, tables  # noqa: F401

AFTER = 2
"""Units of progress a stage makes before it is killed."""


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def run_killed_in(config, key):
    """Die in the middle of a stage, or, of one without progress, when its files are written."""
    write_record = runner.write_record

    def kill_within(phase, done, total, unit):
        if phase.startswith(f"{key}: ") and done >= min(AFTER, total):
            kill()

    def kill_before_recording(folder, record):
        if folder.parent.name.startswith(f"{key}-"):
            kill()
        write_record(folder, record)

    runner.write_record = kill_before_recording
    run_pipeline(config, progress=kill_within)


def forked(run):
    """Exit status of a process that does nothing but ``run``."""
    process = os.fork()
    if process == 0:
        run()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def main(file, whole, *keys):
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO)
    config = load_pipeline(Path(file))
    for key in (*keys, None):
        code = forked(lambda key=key: run_killed_in(config, key))
        records = sorted((config.folder / "stages").glob("*/stage.json"))
        complete = {record.parent.name: record.stat().st_mtime_ns for record in records}
        print(json.dumps({"code": code, "complete": complete}), flush=True)
    sys.exit(forked(lambda: run_pipeline(load_pipeline(Path(whole)))))


if __name__ == "__main__":
    main(*sys.argv[1:])
